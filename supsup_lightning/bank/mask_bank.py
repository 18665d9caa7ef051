"""Bank of finished masks: one bit per weight, and the running statistics of normalisation layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from supsup_lightning import bits
from supsup_lightning.bank.rows import TaskRows
from supsup_lightning.errors import DataError, MismatchError


class MaskBank(TaskRows):
    """Packed masks by task id. `load_state_dict` accepts any number of masks.

    Attributes:
        packed: ``(masks, ceil(weights / 8))`` uint8, in the order in which masks were added.
        tasks: ``(masks,)`` int64, the task of each row.
        statistics: ``(masks, statistics)`` float32, the running statistics of normalisation layers.
        standardisation: ``(masks, 2)`` float32, mean and spread of a score on the task's own images; present only
            ``with_standardisation``.
        counts: ``(weights,)`` int32, number of masks in which each weight is on; gives the mean mask without unpacking.

    >>> bank = MaskBank(3)
    >>> bank.add(0, torch.tensor([True, False, True]))
    >>> bank.add(7, torch.tensor([True, True, False]))
    >>> len(bank), bank.get(7).int().tolist(), bank.superpose().tolist()
    (2, [1, 1, 0], [1.0, 0.5, 0.5])
    """

    packed: Tensor
    statistics: Tensor
    counts: Tensor
    kind = "mask"

    def __init__(self, num_weights: int, num_statistics: int = 0, *, with_standardisation: bool = False) -> None:
        columns = {"packed": (-(-num_weights // 8), torch.uint8), "statistics": (num_statistics, torch.float32)}
        if with_standardisation:  # other banks, and their checkpoints and files, have no such table
            columns["standardisation"] = (2, torch.float32)
        super().__init__(**columns)
        self.num_weights = num_weights
        self.with_standardisation = with_standardisation
        self.register_buffer("counts", torch.zeros(num_weights, dtype=torch.int32), persistent=False)

    def add(self, task: int, mask: Tensor, statistics: Tensor | None = None) -> None:
        """Store ``mask`` ``(weights,)`` and ``statistics`` ``(statistics,)``, if there are any, of a new ``task``.

        Raises:
            KeyError: the task has a mask already; `replace` or `remove` it.
            ValueError: the mask has another shape.
        """
        if mask.shape != (self.num_weights,):
            raise ValueError(f"A mask of this bank has shape ({self.num_weights},); got {tuple(mask.shape)}.")
        mask = mask.to(self.counts.device, torch.bool)
        none = self.statistics.new_empty(0)
        rows = {"packed": bits.pack(mask), "statistics": none if statistics is None else statistics}
        if self.with_standardisation:
            rows["standardisation"] = self.statistics.new_tensor([0.0, 1.0])  # until it is measured
        self.append(task, **rows)
        self.counts += mask

    def get(self, task: int) -> Tensor:
        """Return the mask of ``task``, ``(weights,)`` bool. Raises `KeyError` if it has none."""
        return bits.unpack(self.packed[self.row(task)], self.num_weights)

    def select(self, task: int, vector: Tensor) -> Tensor:
        """Return ``vector`` ``(weights,)`` with 0 where the mask of ``task`` is off. Raises `KeyError` without one."""
        row = self.row(task)
        return bits.select(self.packed[row : row + 1], vector)[0]

    def get_statistics(self, task: int) -> Tensor:
        """Return a copy of the statistics of ``task``, ``(statistics,)``. Raises `KeyError` if it has none."""
        return self.read(task, "statistics")

    def standardise(self, task: int, mean: float, spread: float) -> None:
        """Store mean and spread of the task's score. Raises `KeyError` if it has no mask."""
        table = self.get_buffer("standardisation")
        row = self.row(task)  # a new table, as copies of a bank may share the old one
        self.standardisation = table.index_copy(0, self.tasks.new_tensor([row]), table.new_tensor([[mean, spread]]))

    def replace(self, task: int, mask: Tensor, statistics: Tensor | None = None) -> None:
        """Replace the mask, and the statistics if given, of ``task``. Raises `KeyError` if it has none."""
        row = self.row(task)
        mask = mask.to(self.counts.device, torch.bool)
        self.counts += mask.int() - bits.unpack(self.packed[row], self.num_weights).int()
        self.packed[row] = bits.pack(mask)
        if statistics is not None:
            self.statistics[row] = statistics.detach().to(self.statistics)

    def remove(self, task: int) -> None:
        """Remove the mask of ``task``. Raises `KeyError` if it has none."""
        self.counts -= self.get(task).int()
        super().remove(task)

    def merge(self, other: "MaskBank") -> None:
        """Add every mask of ``other``, trained elsewhere on the same network (`SupSup.merge` checks that).

        Raises:
            MismatchError: the banks have different numbers of weights or statistics.
            KeyError: a task has a mask in both banks and the two differ. Nothing is merged then.
        """
        if other.num_weights != self.num_weights or other.statistics.shape[1] != self.statistics.shape[1]:
            raise MismatchError(f"A bank over {other.num_weights} weights cannot join one over {self.num_weights}.")
        clashes = [
            task
            for task in other.tasks.tolist()
            if task in self
            and not all(
                torch.equal(self.read(task, name), other.read(task, name).to(self.packed.device))
                for name in self.columns
            )
        ]
        if clashes:
            raise KeyError(f"Tasks {clashes} have different masks in the two banks; remove one of each first.")
        for task in other.tasks.tolist():
            if task not in self:
                self.add(task, other.get(task), other.get_statistics(task))
                if self.with_standardisation:
                    self.standardise(task, *other.read(task, "standardisation").tolist())

    def superpose(self, coefficients: Tensor | None = None) -> Tensor:
        """Superposition ``sum_i a_i M_i``, ``(weights,)`` float32. Raises `KeyError` if the bank is empty.

        Args:
            coefficients: ``(masks,)``, in the order of `tasks`; may require gradients. By default ``1 / masks`` each,
                computed from `counts`.
        """
        if not len(self):
            raise KeyError("The bank is empty: there is no mask to superpose yet.")
        if coefficients is None:
            return self.counts / len(self)
        return _WeightedSum.apply(coefficients, self.packed, self.num_weights)

    def project(self, vector: Tensor, rows: Tensor | None = None) -> Tensor:
        """Inner products of all masks, or of some rows, with ``vector`` ``(..., weights)``: ``(..., masks)``."""
        if rows is None:
            return bits.dot(self.packed, vector)
        if len(rows) > len(self) // 4:  # copying many rows costs more than computing with all of them
            return bits.dot(self.packed, vector)[..., rows]
        return bits.dot(self.packed[rows], vector)

    def sparsity(self) -> Tensor:
        """Measured sparsity: share of weights switched off, ``(masks,)``."""
        return 1 - self.project(torch.ones(self.num_weights, device=self.packed.device)) / self.num_weights

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Check a state as `TaskRows.check_state` does, and that padding bits, which stand for no weight, are 0."""
        super().check_state(stored)
        if (used := self.num_weights % 8) and (stored["packed"][:, -1] >> used).any():
            raise DataError("What is stored of each mask is damaged: bits are set that stand for no weight.")

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.counts.copy_(self._count())

    def _count(self) -> Tensor:
        counts = torch.zeros_like(self.counts)
        for row in self.packed:  # one at a time: the unpacked bank would be eight times as large
            counts += bits.unpack(row, self.num_weights)
        return counts


class _WeightedSum(torch.autograd.Function):
    """`bits.weighted_sum`, whose gradient by the coefficients is `bits.dot`."""

    @staticmethod
    def forward(coefficients: Tensor, packed: Tensor, num_weights: int) -> Tensor:
        with torch.autocast(packed.device.type, enabled=False):  # weights keep their precision, as masked ones do
            return bits.weighted_sum(packed, coefficients, num_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        with torch.autocast(packed.device.type, enabled=False):
            return bits.dot(packed, gradient), None, None
