"""Sums over the features of each class, from which a linear discriminant follows (streaming LDA).

Kept: per class its number of images and its mean ``mu_c``; and the scatter of all images about the means of their
classes, ``sum_c sum_{x in c} (phi - mu_c)(phi - mu_c)'``, one symmetric matrix for all tasks or one per task.
Adding is exact but for rounding, so neither order nor sharing out matters.
"""

import copy
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from supsup_lightning.bank.rows import check_names, check_tensor
from supsup_lightning.errors import DataError, MismatchError

_TABLES = {
    "centre": torch.float32,
    "tasks": torch.int64,
    "labels": torch.int64,
    "counts": torch.int64,
    "means": torch.float64,
    "scatters": torch.float64,
    "scatter_tasks": torch.int64,
    "scatter_counts": torch.int64,
}
_PACKED = {
    "centre": torch.float32,
    "tasks": torch.int32,
    "labels": torch.int32,
    "counts": torch.int64,
    "means": torch.float16,
    "scales": torch.float32,
    "units": torch.float32,
    "factors": torch.float16,
    "scatter_tasks": torch.int32,
    "scatter_counts": torch.int64,
}

_RIDGE = 1e-4  # of correlations, before they are factored; taken off again


class TaskSums(NamedTuple):
    """Sums over images of one task; add two of them part by part.

    Attributes:
        counts: number of images of each label, ``(labels,)`` int64.
        sums: sum of their features, ``(labels, features)`` float64.
        products: sum of ``phi phi'``, ``(features, features)`` float64.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor

    @classmethod
    def of(cls, batches: Iterable[tuple[Tensor, Tensor]], *, num_labels: int) -> "TaskSums | None":
        """Sum over batches of features ``(batch, features)`` and labels ``(batch,)``; None if there is no batch."""
        total: TaskSums | None = None
        for features, labels in batches:
            phi = features.double()
            if total is None:
                size = phi.shape[1]
                total = cls(
                    labels.new_zeros(num_labels, dtype=torch.int64),
                    phi.new_zeros(num_labels, size),
                    phi.new_zeros(size, size),
                )
            total.counts.add_(labels.bincount(minlength=num_labels))
            total.sums.index_add_(0, labels, phi)
            total.products.addmm_(phi.T, phi)
        return total


class ClassSums(nn.Module):
    """Counts, means and scatter of the features of classes. A class belongs to one task: (task, label).

    Args:
        per_task: one scatter matrix per task in place of one for all.

    Attributes:
        centre: mean of the first images, ``(features,)``, from which a file counts means.
        tasks: task of each class, ``(classes,)`` int64.
        labels: its label within the task, ``(classes,)`` int64.
        counts: number of its images, ``(classes,)`` int64.
        means: mean of its features, ``(classes, features)`` float64.
        scatters: upper triangles of the scatter matrices, ``(matrices, features * (features + 1) / 2)`` float64.
        scatter_tasks: the task of each matrix, ``(matrices,)`` int64; -1 for the one of all tasks.
        scatter_counts: number of images in each matrix, those of removed tasks included, ``(matrices,)`` int64.

    >>> sums = ClassSums()
    >>> features, labels = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> sums.add(3, TaskSums.of([(features, labels)], num_labels=2))
    >>> sums.means.flatten().tolist(), sums.scatters.tolist()
    ([1.0, 5.0], [[2.0]])
    """

    centre: Tensor
    tasks: Tensor
    labels: Tensor
    counts: Tensor
    means: Tensor
    scatters: Tensor
    scatter_tasks: Tensor
    scatter_counts: Tensor

    def __init__(self, *, per_task: bool = False) -> None:
        super().__init__()
        self.per_task = per_task
        self._as_read: dict[str, Tensor] | None = None  # a file's tensors, until something is added
        for name, dtype in _TABLES.items():
            shape = (0, 0) if name in ("means", "scatters") else (0,)
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def num_features(self) -> int:
        """Number of features; 0 before anything is added."""
        return self.means.shape[1]

    def add(self, task: int, sums: TaskSums) -> None:
        """Add images of a task, whose classes may be new or known. Labels without an image are left out."""
        present = sums.counts.nonzero().flatten()
        if not len(present):
            return
        counts, totals = sums.counts[present], sums.sums[present]
        means = totals / counts.unsqueeze(1)
        scatter = sums.products - totals.T @ means
        scatter = (scatter + scatter.T) / 2
        matrices = {self._matrix(task): (_packed(scatter), int(counts.sum()))}
        self._add(_Sums(torch.full_like(present, task), present, counts, means), matrices)

    def merge(self, other: "ClassSums") -> None:
        """Add all of the sums of another, of the same features."""
        if other.per_task != self.per_task:
            raise MismatchError("Sums with one matrix per task cannot join sums with one matrix for all tasks.")
        if not len(other):
            return
        numbers = other.scatter_counts.tolist()
        matrices = dict(zip(other.scatter_tasks.tolist(), zip(other.scatters, numbers, strict=True), strict=True))
        self._add(_Sums(other.tasks, other.labels, other.counts, other.means), matrices)

    def remove(self, task: int) -> None:
        """Remove the classes of a task, and its matrix where it has one of its own.

        In the matrix that all tasks share, the scatter of its images stays: it is a sum, and cannot be told apart.

        Raises:
            KeyError: a task without images here.
        """
        kept = self.tasks != task
        if kept.all():
            raise KeyError(f"Task {task} has no sums in the gate.")
        self._as_read = None
        for name in ("tasks", "labels", "counts", "means"):
            setattr(self, name, self.get_buffer(name)[kept])
        kept = self.scatter_tasks != task
        for name in ("scatters", "scatter_tasks", "scatter_counts"):
            setattr(self, name, self.get_buffer(name)[kept])

    def of_tasks(self, tasks: AbstractSet[int]) -> "ClassSums":
        """These sums without the classes, and the matrices, of other tasks."""
        found = copy.deepcopy(self)
        for task in {*self.tasks.tolist()} - tasks:
            found.remove(task)
        return found

    def scatter(self, task: int) -> Tensor:
        """Scatter matrix that applies to a task, ``(features, features)`` float64."""
        return _symmetric(self.scatters[self._row(task)], self.num_features)

    def scatter_count(self, task: int) -> int:
        """Number of images in that matrix. Of removed tasks too, where tasks share it, as their scatter stays."""
        return int(self.scatter_counts[self._row(task)])

    def _row(self, task: int) -> int:
        return int((self.scatter_tasks == self._matrix(task)).nonzero()[0, 0])

    def _matrix(self, task: int) -> int:
        return task if self.per_task else -1

    def _add(self, new: "_Sums", matrices: Mapping[int, tuple[Tensor, int]]) -> None:
        """Add classes, and per matrix its packed upper triangle and its number of images."""
        self._as_read = None
        if len(self) and new.means.shape[1] != self.num_features:
            raise MismatchError(
                f"Sums over {new.means.shape[1]} features cannot join sums over {self.num_features} features."
            )
        if not self.num_features:
            self.means = self.means.new_empty(0, new.means.shape[1])
            self.scatters = self.scatters.new_empty(0, len(next(iter(matrices.values()))[0]))
            self.centre = new.means.mean(0).to(self.centre)
        known = {key: row for row, key in enumerate(zip(self.tasks.tolist(), self.labels.tolist(), strict=True))}
        keys = [*zip(new.tasks.tolist(), new.labels.tolist(), strict=True)]
        matrices = dict(matrices)
        for place, key in enumerate(keys):
            if key in known:  # of the same class: the means differ, and their distance joins the scatter
                row, count = known[key], int(new.counts[place])
                before = int(self.counts[row])
                both = before + count
                apart = new.means[place] - self.means[row]
                between = torch.outer(apart, apart) * (before * count / both)
                scatter, number = matrices[self._matrix(key[0])]
                matrices[self._matrix(key[0])] = scatter + _packed(between), number
                means, counts = self.means.clone(), self.counts.clone()
                means[row] += apart * (count / both)
                counts[row] = both
                self.means, self.counts = means, counts
        fresh = torch.tensor([key not in known for key in keys], device=self.tasks.device)
        for name, value in new._asdict().items():
            setattr(self, name, torch.cat([self.get_buffer(name), value[fresh].to(self.get_buffer(name))]))
        rows = {task: row for row, task in enumerate(self.scatter_tasks.tolist())}
        for task, (packed, number) in matrices.items():
            packed = packed.to(self.scatters)
            if task in rows:
                self.scatters[rows[task]] += packed
                self.scatter_counts[rows[task]] += number
            else:
                self.scatters = torch.cat([self.scatters, packed.unsqueeze(0)])
                self.scatter_tasks = torch.cat([self.scatter_tasks, self.scatter_tasks.new_tensor([task])])
                self.scatter_counts = torch.cat([self.scatter_counts, self.scatter_counts.new_tensor([number])])

    # What a file holds: the scatter as correlations in float16, with a scale per feature.

    def packed(self) -> dict[str, Tensor]:
        """Tensors for a file: 2 bytes per pair of features, and per feature and class.

        The scatter is held as the Cholesky factor of its correlations, in float16, with a scale per feature: rounding a
        factor leaves a matrix that can be inverted, which rounding the matrix itself does not. The means are held as
        distances from the centre in units of the standard deviation.
        """
        if self._as_read is not None:
            return self._as_read
        size, device = self.num_features, self.scatters.device
        scales = self.scatters[:, _diagonal(size, device)].clamp(min=0).sqrt().float()
        pairs = zip(self.scatters, scales, strict=True)
        factors = [_packed(_factor(_symmetric(row, size), scale)) for row, scale in pairs]
        apart = self.means - self.centre.double()
        units = _units(scales, self.counts, apart)
        values = {
            **{name: self.get_buffer(name) for name in _PACKED if name in _TABLES},
            "means": apart / units,
            "scales": scales,
            "units": units,
            "factors": torch.stack(factors) if factors else self.scatters,
        }
        return {name: values[name].to(dtype) for name, dtype in _PACKED.items()}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], *, per_task: bool) -> "ClassSums":
        """Sums from what `packed` returned. Raises `DataError` if they are damaged."""
        check_names(tensors, {*_PACKED})
        for name, dtype in _PACKED.items():
            shape = (0, 0) if name in ("means", "scales", "factors") else (0,)
            check_tensor(tensors, name, torch.empty(shape, dtype=dtype), "class in the gate")
        scales = tensors["scales"].double()
        size = scales.shape[1]
        if (
            tensors["factors"].shape != (len(scales), size * (size + 1) // 2)
            or tensors["means"].shape[1] != size
            or tensors["centre"].shape != tensors["units"].shape
        ):
            raise DataError("What is stored of the gate is damaged: its tables have different numbers of features.")
        matrices = []
        for row, scale in zip(tensors["factors"].double(), scales, strict=True):
            factor = _upper(row, size)
            matrices.append(_packed((factor.T @ factor).mul_(scale.unsqueeze(1)).mul_(scale)))
            matrices[-1][_diagonal(size, scale.device)] -= _RIDGE * scale.square()
        state = {
            **{name: tensors[name] for name in _TABLES if name in _PACKED},
            "means": tensors["centre"].double() + tensors["means"].double() * tensors["units"].double(),
            "scatters": torch.stack(matrices) if matrices else tensors["factors"],
        }
        state = {name: value.to(_TABLES[name]) for name, value in state.items()}
        sums = cls(per_task=per_task)
        sums.check_state(state)
        for name, value in state.items():
            setattr(sums, name, value)
        sums._as_read = dict(tensors)
        return sums

    def rounded(self) -> "ClassSums":
        """These sums as they are when they come back from a file."""
        return ClassSums.unpacked(self.packed(), per_task=self.per_task)

    # Checkpoints hold the sums in float64, so that a resumed run goes on exactly.

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Raise `DataError` for damaged sums, and `MismatchError` for matrices of another kind."""
        for name in _TABLES:
            check_tensor(stored, name, self.get_buffer(name), "class in the gate")
        size, number = stored["means"].shape[1], len(stored["tasks"])
        if len(stored["centre"]) != size:
            raise DataError("What is stored of the gate is damaged: its tables have different numbers of features.")
        if any(len(stored[name]) != number for name in ("labels", "counts", "means")):
            raise DataError("What is stored of the gate is damaged: its tables differ in length.")
        matrices = stored["scatter_tasks"].tolist()
        own = {*stored["tasks"].tolist()} if self.per_task else {-1}
        sizes = {len(matrices), len(stored["scatters"]), len(stored["scatter_counts"])}
        if len(sizes) != 1 or len({*matrices}) != len(matrices):
            raise DataError("What is stored of the gate is damaged: its matrices are not one per task.")
        if (number and not own <= {*matrices}) or any((task == -1) == self.per_task for task in matrices):
            raise MismatchError(
                f"What is stored of the gate has {'one matrix' if -1 in matrices else 'a matrix per task'}; use "
                f"inference.per_task={str(-1 not in matrices).lower()}."
            )
        if number and stored["scatters"].shape[1] != size * (size + 1) // 2:
            raise DataError("What is stored of the gate is damaged: its matrices have another size than its means.")
        if (stored["counts"] < 1).any() or (stored["tasks"] < 0).any() or (stored["labels"] < 0).any():
            raise DataError("What is stored of the gate is damaged: a class has no image, or a negative number.")
        for task, images in zip(matrices, stored["scatter_counts"].tolist(), strict=True):
            own = stored["counts"] if task == -1 else stored["counts"][stored["tasks"] == task]
            if images < own.sum():
                raise DataError("What is stored of the gate is damaged: a matrix has fewer images than its classes.")
        classes = torch.stack([stored["tasks"], stored["labels"]], 1)
        if len(classes.unique(dim=0)) != number:
            raise DataError("What is stored of the gate is damaged: a class is there twice.")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        stored = {name: state_dict.get(prefix + name) for name in _TABLES}
        self.check_state(stored)
        self._as_read = None
        for name, value in stored.items():
            setattr(self, name, self.get_buffer(name).new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Sums(NamedTuple):
    tasks: Tensor
    labels: Tensor
    counts: Tensor
    means: Tensor


def _packed(matrix: Tensor) -> Tensor:
    """Upper triangle of a symmetric matrix, row by row, with the diagonal: ``(n * (n + 1) / 2,)``."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu_()]


def _upper(packed: Tensor, size: int) -> Tensor:
    matrix = packed.new_zeros(size, size)
    matrix[torch.ones_like(matrix, dtype=torch.bool).triu_()] = packed
    return matrix


def _symmetric(packed: Tensor, size: int) -> Tensor:
    matrix = _upper(packed, size)
    return matrix + matrix.triu(1).T


def _factor(scatter: Tensor, scale: Tensor) -> Tensor:
    """Upper triangular ``U`` with ``U'U`` the correlations plus a small ridge: fewer images than features are fine."""
    inverse = torch.where(scale > 0, 1 / scale.double(), 0)
    correlations = scatter * inverse.unsqueeze(1) * inverse
    correlations.diagonal().copy_(torch.ones_like(inverse)).add_(_RIDGE)
    return torch.linalg.cholesky(correlations, upper=True)


def _diagonal(size: int, device: torch.device) -> Tensor:
    """Places of the diagonal in a packed upper triangle."""
    rows = torch.arange(size, device=device)
    return rows * size - rows * (rows - 1) // 2


def _units(scales: Tensor, counts: Tensor, apart: Tensor) -> Tensor:
    """Standard deviation of each feature within classes, ``(features,)`` float32, by which a file divides means.

    Where a feature does not vary within classes: the largest distance of a class from the centre.
    """
    if not len(counts):
        return scales.new_ones(scales.shape[1])
    deviation = (scales.square().mean(0) * len(scales) / counts.sum()).sqrt()  # more where tasks were removed
    largest = apart.abs().amax(0).float()
    unit = torch.where(deviation > largest / 1000, deviation, largest)
    return torch.where(unit > 0, unit, 1.0)
