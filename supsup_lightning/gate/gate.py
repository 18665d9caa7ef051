"""The gate of a method: a feature map, the sums over its features, and what was measured on validation images."""

import copy
import json
import logging
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from supsup_lightning.bank import codec
from supsup_lightning.bank.rows import TaskRows, check_names
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from supsup_lightning.gate import features
from supsup_lightning.gate.class_sums import ClassSums, TaskSums
from supsup_lightning.gate.linear_discriminant import LinearDiscriminant

if TYPE_CHECKING:
    from supsup_lightning.methods import Method

logger = logging.getLogger(__name__)

Batches = Iterable[tuple[Tensor, Tensor]]

WEIGHTS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)  # of masks, that are tried

NAMERS = ("mask", "discriminant", "both")  # of classes, once the task is found
_LEVELS = 101  # of quantiles
_LEAST_IMAGES = 3  # per feature, for relative distances: with one per feature, all images of a first task are refused
_MOST_IMAGES = 20_000  # of a task, that are learned of a stream; MNIST's 60,000 find no more tasks


class Gate(nn.Module):
    """Sums over frozen features of the training images of each task; part of a method, its checkpoints and files.

    Args:
        kind: of features: one of `features.KINDS`, or a module of your own from images to ``(batch, features)``.
        num_features: of ``projection`` and ``convolution``; None for the usual number.
        per_task: a scatter matrix per task in place of one for all.
        regularisation: ``lambda`` of the covariance matrix; see `LinearDiscriminant`.

    Attributes:
        sums: the sums.
        pending: sums since the last decision in a stream that announces no task, until it is known whose they are.
        rows: per finished task, on its own validation images when it ended: ``accuracies`` of its mask, of the
            discriminant and of `both`, the task given; and quantiles of the ``distances`` from the nearest class, in
            units of the mean distance of all images then, at equal steps from 0 to 1, by which unknown inputs are told.
            All are 0 without validation images.
        relative_rows: per finished task that was trained with inference.unknown_distance=relative, such quantiles of
            the relative ``distances``, less their expectation then, in the same units.
        mask_rows: per finished task that was trained with inference.mask_weight, on the same images: the number of the
            ``objective``, the ``scale`` of its values under the task's mask (mean, spread), how many images ``found``
            the task by gate and masks under each of `WEIGHTS`, and the number of ``images`` (`inference.mask_weight`).
        description: what the feature map is made from; None while it is not known.
        patches: of the first task's images; empty unless the features are a convolution.
        map: the feature map; None until the first images pass through it.
    """

    def __init__(
        self,
        kind: str | nn.Module = "auto",
        *,
        num_features: int | None = None,
        per_task: bool = False,
        regularisation: float | str = "auto",
    ) -> None:
        super().__init__()
        self.sums = ClassSums(per_task=per_task)
        self.pending = ClassSums(per_task=per_task)
        self.rows = TaskRows(accuracies=(len(NAMERS), torch.float32), distances=(_LEVELS, torch.float32))
        self.relative_rows = TaskRows(distances=(_LEVELS, torch.float32))
        self.mask_rows = TaskRows(
            objective=(1, torch.int64),
            scale=(2, torch.float32),
            found=(len(WEIGHTS), torch.int64),
            images=(1, torch.int64),
        )
        self.patches = features.PatchStatistics()
        self.description: dict[str, Any] | None = None
        self.map: Any = None
        self._solved: tuple[Tensor, LinearDiscriminant] | None = None
        self._set_options(kind, num_features, regularisation)
        self.register_load_state_dict_post_hook(_after_loading)

    def _set_options(self, kind: str | nn.Module, num_features: int | None, regularisation: float | str) -> None:
        self.kind, self.num_features, self.regularisation = kind, num_features, regularisation
        if isinstance(kind, nn.Module):
            self.description, self.map = features.describe_own(kind), kind.requires_grad_(False).eval()
        else:
            features.check_kind(kind)

    @property
    def options(self) -> dict[str, Any]:
        """Options as they were given, by name."""
        return {
            "kind": self.kind,
            "num_features": self.num_features,
            "per_task": self.sums.per_task,
            "regularisation": self.regularisation,
        }

    def follow(self, options: Mapping[str, Any]) -> None:
        """Take other options, as another inference has, and keep the sums.

        Raises:
            MismatchError: the sums are over other features, or of another number of matrices, than these ask for.
        """
        if self.options == options:
            return
        made = Gate(**options)
        if len(self.sums):
            known = self.description or {}
            asked = {"kind": made.kind, "features": made.num_features} if made.description is None else made.description
            wrong = {name: value for name, value in asked.items() if value not in (None, "auto", known.get(name))}
            if wrong or made.sums.per_task != self.sums.per_task:
                raise MismatchError(
                    f"This inference asks for the features {_text(asked)} with per_task={made.sums.per_task}, and the "
                    f"sums of the finished tasks are over {_text(known)} with per_task={self.sums.per_task}; use the "
                    "options of training."
                )
        else:
            self.sums, self.pending, self.description = made.sums, made.pending, None
            self._forget_map()
        self._set_options(made.kind, made.num_features, made.regularisation)
        self._forget()

    # Features.

    def choose_features(self, method: "Method", example: Tensor, *, keeps_neighbours: bool) -> None:
        """Decide on the feature map; see `features.describe`.

        Raises:
            MismatchError: there are sums, over other features.
        """
        if isinstance(self.kind, nn.Module):
            return
        description = features.describe(
            self.kind,
            num_features=self.num_features,
            method=method,
            example=example,
            keeps_neighbours=keeps_neighbours,
        )
        if len(self.sums):
            self._check_same(description)
        else:
            self.description = description
            self._forget_map()

    def features(self, method: "Method", images: Tensor) -> Tensor:
        """Features ``(batch, features)`` float32 of images ``(batch, *shape)``."""
        if self.map is None:
            self.map = self._made()
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if isinstance(self.map, features.HiddenInputs):
                return self.map(method, images)
            found = self.map.to(images.device)(images)
        if not (isinstance(found, Tensor) and found.ndim == 2 and len(found) == len(images)):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigurationError(
                f"inference.features: {type(self.map).__name__} must return (batch, features); it returned {got} for "
                f"{len(images)} images."
            )
        return found.float()

    @property
    def needs_first_task(self) -> bool:
        """Whether the features need images of the first task that `prepare` has not had."""
        return (self.description or {}).get("kind") == "convolution" and not len(self.patches.mean)

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take from the first task's images what the features need of them, if anything and if it is not known."""
        if self.needs_first_task:
            self.patches.measure(images for images, _ in batches)
            self.map = None

    def _made(self) -> Any:
        if self.description is None:
            raise ConfigurationError(
                "The features of inference=discriminant are not known before there are data, or a bank that says."
            )
        if self.description["kind"] == "convolution" and not len(self.patches.mean):
            raise ConfigurationError("inference=discriminant has seen no image of a first task yet; train first.")
        return features.make(self.description, self.patches)

    # A task's life.

    @torch.no_grad()
    def learn(self, method: "Method", task: int, batches: Batches, *, num_classes: int) -> None:
        """Add training images of a task, in batches of ``(images, labels)``; each image once, and not augmented."""
        pairs = ((self.features(method, images), labels) for images, labels in batches if len(labels))
        sums = TaskSums.of(pairs, num_labels=num_classes)
        if sums is not None:
            self.sums.add(task, sums)
        self._forget()

    @torch.no_grad()
    def judge(self, method: "Method", task: int, batches: Batches, *, num_classes: int, relative: bool = False) -> None:
        """Measure on a task's own validation images who names its classes better, and how far away they are.

        Only this task's classes are asked, so that the time for a task does not grow with their number; all are for
        ``relative`` distances, which are measured beside the others.

        Raises:
            ConfigurationError: ``relative`` distances with too few images for a covariance that later tasks leave as it
                is, roughly.
        """
        tasks = torch.tensor([task], device=self.sums.tasks.device)
        discriminant = LinearDiscriminant(self.sums.rounded(), tasks, regularisation=self.regularisation)
        right, distances, relatives = torch.zeros(len(NAMERS)), [], []
        images_so_far = int(self.sums.counts.sum())
        if relative and images_so_far < _LEAST_IMAGES * self.sums.num_features:
            raise ConfigurationError(
                f"inference.unknown_distance=relative needs at least {_LEAST_IMAGES} training images per feature, and "
                f"up to task {task} there are {images_so_far} for {self.sums.num_features} features; lower "
                "inference.num_features, or use inference.unknown_distance=absolute."
            )
        everyone = self.discriminant(self.sums.tasks.unique()) if relative else discriminant
        place = int((self.sums.tasks.unique() == task).nonzero()[0, 0])
        for images, labels in batches:
            features = self.features(method, images)
            by_mask = method(images, task)[:, :num_classes]
            by_gate = discriminant.of_classes(discriminant.log_posterior(features), 0, num_classes)
            ways = (by_mask, by_gate, both(by_mask, by_gate))
            right += torch.stack([(way.argmax(1) == labels).sum() for way in ways]).cpu()
            distances.append((discriminant.distances(features).amin(1) / discriminant.mean_distances()[0]).cpu())
            if relative:
                relatives.append(everyone.relative_distances(features)[:, everyone.places == place].amin(1).cpu())
        quantiles = torch.zeros(_LEVELS)
        if number := sum(map(len, distances)):
            quantiles = torch.quantile(torch.cat(distances), torch.linspace(0, 1, _LEVELS))
        self.rows.append(task, accuracies=right / max(1, number), distances=quantiles)
        if relative and number:
            expected = float(everyone.expected_relative_distances()[place])
            apart = (torch.cat(relatives) - expected) / everyone.mean_distances()[place]
            self.relative_rows.append(task, distances=torch.quantile(apart, torch.linspace(0, 1, _LEVELS)))

    def assume(self, task: int) -> None:
        """Enter a task as if it had been judged, where there are too few images to judge by: in a trial."""
        self.rows.append(task, accuracies=torch.zeros(len(NAMERS)), distances=torch.linspace(0, 1, _LEVELS))
        self.relative_rows.append(task, distances=torch.linspace(0, 1, _LEVELS))

    def remove(self, task: int) -> None:
        """Remove a task: it is found no more. See `ClassSums.remove` for what stays.

        Raises:
            KeyError: a task that is not there.
        """
        self.sums.remove(task)
        for rows in (self.rows, self.relative_rows, self.mask_rows):
            if task in rows:
                rows.remove(task)
        self._forget()

    def discriminant(self, tasks: Tensor, *, rounded: bool = True) -> LinearDiscriminant:
        """Discriminant over these tasks ``(k,)``, solved once.

        Args:
            tasks: of which there are sums.
            rounded: from the sums as a file holds them, so that predictions do not change when it is read.
        """
        if not rounded:
            return LinearDiscriminant(self._all(), tasks, regularisation=self.regularisation)
        if self._solved is None or not torch.equal(self._solved[0], tasks):
            sums = self._all().rounded()
            self._solved = tasks.clone(), LinearDiscriminant(sums, tasks, regularisation=self.regularisation)
        return self._solved[1]

    # Streams that announce no task (scenario NNs).

    @torch.no_grad()
    def gather(self, method: "Method", task: int, images: Tensor, labels: Tensor, *, num_classes: int) -> None:
        """Add a training batch of a task to what is pending, until the task has so many images that more change little.

        Args:
            method: whose gate this is.
            task: the task in training.
            images: ``(batch, *shape)``.
            labels: ``(batch,)``.
            num_classes: of the task with most of them.
        """
        seen = sum(int(sums.counts[sums.tasks == task].sum()) for sums in (self.sums, self.pending))
        if seen < _MOST_IMAGES:
            self.prepare([(images, labels)])
            sums = TaskSums.of([(self.features(method, images), labels)], num_labels=num_classes)
            assert sums is not None
            self.pending.add(task, sums)
            self._forget()

    def settle(self, task: int, *, finished: AbstractSet[int]) -> None:
        """Keep what is pending if it is of ``task``, or of a finished task without sums; else drop it.

        A batch that does not fit the task in training says that the stream has changed, some batches ago perhaps.
        """
        known = {*self.sums.tasks.tolist()}
        kept = {
            each for each in self.pending.tasks.tolist() if each in finished and (each == task or each not in known)
        }
        if kept:
            self.sums.merge(self.pending.of_tasks(kept))
        self.pending = ClassSums(per_task=self.sums.per_task).to(self.rows.tasks.device)
        self._forget()

    def _all(self) -> ClassSums:
        if not len(self.pending):
            return self.sums
        both = copy.deepcopy(self.sums)
        both.merge(self.pending)
        return both

    def best_namer(self, task: int) -> str:
        """Which of `NAMERS` named the classes of a task's validation images best; the first of equals."""
        return NAMERS[int(self.rows.read(task, "accuracies").argmax())] if task in self.rows else NAMERS[0]

    def furthest(self, tasks: Tensor, *, refused: float, relative: bool = False) -> Tensor:
        """Distance from the nearest class that this share of a task's own images exceeds, ``(k,)``.

        The distances were measured when the task ended. Later tasks change the covariance matrix, so they count in
        units of the mean distance; ``relative`` ones from their expectation on.

        Raises:
            ConfigurationError: a task without validation images, or without relative distances.
        """
        table = self.relative_rows if relative else self.rows
        rows = {task: row for row, task in enumerate(table.tasks.tolist())}
        places = [rows.get(task, -1) for task in tasks.tolist()]
        values = table.get_buffer("distances")
        without = [task for task, row in zip(tasks.tolist(), places, strict=True) if row < 0 or not values[row].any()]
        if without and relative:
            raise ConfigurationError(
                f"inference.unknown_distance=relative is measured on validation images when a task ends, and task "
                f"{without[0]} had none or was trained without it; train with it, or use "
                "inference.unknown_distance=absolute."
            )
        if without:
            raise ConfigurationError(
                f"inference.unknown={refused} needs validation images of each task, and task {without[0]} had none; "
                "give it some, or use inference.unknown=null."
            )
        place = (1 - refused) * (_LEVELS - 1)
        below = int(place)
        quantiles = values[places]  # (k, levels)
        limits = torch.lerp(quantiles[:, below], quantiles[:, min(below + 1, _LEVELS - 1)], place - below)
        discriminant = self.discriminant(tasks)
        limits = limits * limits.new_tensor(discriminant.mean_distances())
        return limits + discriminant.expected_relative_distances().to(limits) if relative else limits

    def _forget(self) -> None:
        self._solved = None

    # Files.

    def identity(self) -> dict[str, str]:
        """What the features are made from, for a file's header."""
        return {"gate": _text(self.description)} if len(self.sums) else {}

    def kept(self) -> dict[str, Tensor]:
        """Tensors for a file."""
        if not len(self.sums):
            return {}
        patches = codec.prefixed("patches.", self.patches.state_dict()) if len(self.patches.mean) else {}
        asked = {f"{name}.": rows.state_dict() for name, rows in self._if_asked().items() if len(rows)}
        others = {key: value for name, state in asked.items() for key, value in codec.prefixed(name, state).items()}
        return {**self.sums.packed(), **codec.prefixed("rows.", self.rows.state_dict()), **others, **patches}

    def _if_asked(self) -> dict[str, TaskRows]:
        """Tables that are filled for some options alone; files without these options do not have them."""
        return {"mask_rows": self.mask_rows, "relative_rows": self.relative_rows}

    def read(self, tensors: Mapping[str, Tensor], description: str | None, source: str) -> "Gate":
        """A gate out of what a file holds; one without sums if it holds none.

        Raises:
            MismatchError: it is of other features, or has a matrix per task and this one has not, or the reverse.
            DataError: it is damaged.
        """
        found = Gate(per_task=self.sums.per_task, regularisation=self.regularisation)
        if not tensors:
            return found
        try:
            found.description = json.loads(description or "")
            check_names(codec.under("rows.", tensors), {*self.rows.state_dict()})
            found.rows.load_state_dict(_with_both(codec.under("rows.", tensors)))
            for name, rows in found._if_asked().items():
                if state := codec.under(f"{name}.", tensors):
                    check_names(state, {*rows.state_dict()})
                    rows.load_state_dict(state)
            if patches := codec.under("patches.", tensors):
                check_names(patches, {*self.patches.state_dict()})
                found.patches.load_state_dict(patches)
            sums = {name: value for name, value in tensors.items() if "." not in name}
            found.sums = ClassSums.unpacked(sums, per_task=self.sums.per_task)
        except ValueError as error:
            if isinstance(error, MismatchError):
                raise
            raise DataError(f"{source} is damaged: it does not say what features its gate has.") from error
        if self.description is not None:
            self._check_same(found.description or {}, source)
        if len(self.patches.mean) and not torch.equal(self.patches.covariance.cpu(), found.patches.covariance):
            raise MismatchError(
                f"{source} has filters for the images of another first task than those here; train all tasks of a bank "
                "from the same first one."
            )
        return found

    def take(self, other: "Gate") -> None:
        """Replace the sums by another's."""
        self._take(other)
        self.sums = other.sums.to(self.rows.tasks.device)
        self.pending = ClassSums(per_task=self.sums.per_task).to(self.rows.tasks.device)
        self.rows.load_state_dict(other.rows.state_dict())
        for name, rows in self._if_asked().items():
            rows.load_state_dict(other._if_asked()[name].state_dict())
        self._forget()

    def check_merge(self, other: "Gate", *, tasks: AbstractSet[int]) -> None:
        """Check that these tasks of another gate can be added.

        Raises:
            MismatchError: in one matrix for all tasks, the other gate also has tasks that are known here.
        """
        both = {*other.sums.tasks.tolist()} - tasks
        if both and tasks and not self.sums.per_task:
            raise MismatchError(
                f"Tasks {', '.join(map(str, sorted(both)))} are in both gates, whose one matrix for all tasks would "
                "count them twice; merge banks of different tasks, or train with inference.per_task=true."
            )

    def merge(self, other: "Gate", *, tasks: AbstractSet[int]) -> None:
        """Add these tasks of another gate; see `check_merge`."""
        self._take(other)
        self.sums.merge(other.sums.of_tasks(tasks))
        tables = {"rows": self.rows, **self._if_asked()}
        for own, others in ((table, other.get_submodule(name)) for name, table in tables.items()):
            assert isinstance(others, TaskRows)
            for task in others.tasks.tolist():
                if task in tasks:
                    own.append(task, **{name: others.read(task, name) for name in own.columns})
        self._forget()

    def _take(self, other: "Gate") -> None:
        """Take another gate's features where there are none."""
        if self.description is None:
            self.description = other.description
        if not len(self.patches.mean):
            self.patches.load_state_dict(other.patches.state_dict())
            self._forget_map()

    def _forget_map(self) -> None:
        """Make the feature map anew when it is needed."""
        if not isinstance(self.kind, nn.Module):
            self.map = None

    def _check_same(self, description: Mapping[str, Any], source: str = "The configuration") -> None:
        if dict(description) != self.description:
            raise MismatchError(
                f"{source} has the features {_text(description)} for inference=discriminant, and the sums here are "
                f"over {_text(self.description)}; use the same inference.features, inference.num_features and seed."
            )

    # Checkpoints.

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Raise `MismatchError` for a checkpoint with other features."""
        extra = stored.get("_extra_state")
        if not isinstance(extra, Mapping) or "description" not in extra:
            raise DataError("What is stored of the gate is damaged: it does not say what features it has.")
        if self.description is not None and extra["description"] is not None:
            self._check_same(extra["description"], "The checkpoint")

    def fill_in(self, state: dict[str, Any], prefix: str) -> None:
        """Add to a stored state what older checkpoints do not have."""
        if f"{prefix}_extra_state" in state:
            for table, rows in Gate()._if_asked().items():
                for name, value in rows.state_dict().items():
                    state.setdefault(f"{prefix}{table}.{name}", value)

    def get_extra_state(self) -> dict[str, Any]:
        """What the features are made from, into `state_dict`."""
        return {"description": self.description}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        if self.description is None:
            self.description = state["description"]

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)


def both(by_mask: Tensor, by_gate: Tensor) -> Tensor:
    """Mean log probability of a task's classes by its mask and by the discriminant, ``(batch, num_classes)``.

    Args:
        by_mask: logits.
        by_gate: log posteriors, -inf for labels that the task does not have.
    """
    return (by_mask.float().log_softmax(1) + by_gate.log_softmax(1)) / 2


def _text(description: Mapping[str, Any] | None) -> str:
    return json.dumps(description, sort_keys=True)


def _with_both(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of a file, of which earlier ones know two of `NAMERS`: the third is taken for the worst."""
    known = rows["accuracies"]
    if known.ndim == 2 and known.shape[1] == len(NAMERS) - 1:
        rows = {**rows, "accuracies": torch.cat([known, torch.zeros_like(known[:, :1])], 1)}
    return rows


def _after_loading(gate: Gate, _: Any) -> None:
    gate._forget()
    gate._forget_map()
