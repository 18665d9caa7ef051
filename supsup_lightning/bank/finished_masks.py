"""Finished tasks of `SupSup`: masks, and linear combinations of masks, behind one interface."""

import torch
from torch import Tensor

from supsup_lightning.bank import codec
from supsup_lightning.bank.combinations import Combinations
from supsup_lightning.bank.mask_bank import MaskBank
from supsup_lightning.bank.rows import check_names
from supsup_lightning.errors import DataError, MismatchError


class FinishedMasks:
    """Masks and combinations of masks, in one order: masks first.

    Args:
        bank: the masks.
        combinations: tasks that are linear combinations of these masks.
    """

    def __init__(self, bank: MaskBank, combinations: Combinations) -> None:
        self.bank = bank
        self.combinations = combinations

    def __contains__(self, task: int) -> bool:
        return task in self.bank or task in self.combinations

    @property
    def tasks(self) -> Tensor:
        """Task of each mask and combination, ``(k,)`` int64."""
        return torch.cat([self.bank.tasks, self.combinations.tasks])

    def select(self, task: int, vector: Tensor) -> Tensor:
        """Multiply ``vector`` ``(weights,)`` by the mask or combination of ``task``. Raises `KeyError` without one."""
        if task in self.combinations:
            return self.bank.superpose(self.combinations.get(task, self.bank.tasks)) * vector
        return self.bank.select(task, vector)

    def get_statistics(self, task: int) -> Tensor:
        """Return a copy of the running statistics of ``task``, ``(statistics,)``. Raises `KeyError` if it has none."""
        return (self.combinations if task in self.combinations else self.bank).get_statistics(task)

    def superpose(self, coefficients: Tensor | None = None) -> Tensor:
        """Superposition ``sum_i a_i M_i``, ``(weights,)``; a combination counts as a weighted mean of its masks.

        Args:
            coefficients: ``(k,)``; by default ``1/k`` each.
        """
        if len(self.combinations):
            masks, k = len(self.bank), len(self.tasks)
            if coefficients is None:
                coefficients = torch.full((k,), 1 / k, device=self.bank.counts.device)
            coefficients = coefficients[:masks] + coefficients[masks:] @ self._shares()
        return self.bank.superpose(coefficients)

    def project(self, vector: Tensor, rows: Tensor | None = None) -> Tensor:
        """Inner products of all, or some, rows with ``vector`` ``(*batch, weights)``: ``(*batch, rows)``."""
        if not len(self.combinations):
            return self.bank.project(vector, rows)
        masks = self.bank.project(vector)
        products = torch.cat([masks, masks @ self._shares().T], dim=-1)
        return products if rows is None else products[..., rows]

    def _shares(self) -> Tensor:
        """Coefficients scaled to a sum of magnitudes of 1; otherwise the larger sum would win every gradient."""
        matrix = self.combinations.matrix(self.bank.tasks)
        return matrix / matrix.abs().sum(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)

    def sparsity(self) -> Tensor:
        """Measured sparsity: share of weights that each mask or combination switches off, ``(k,)``."""
        combined = [self.bank.superpose(row) for row in self.combinations.matrix(self.bank.tasks)]
        return torch.cat([self.bank.sparsity(), *((weights == 0).float().mean().view(1) for weights in combined)])

    # Files.

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save in a file: the bank, and the combinations if there are any."""
        bank = {name: value for name, value in self.bank.state_dict().items() if name != "statistics" or value.shape[1]}
        combined = self.combinations.state_dict() if len(self.combinations) else {}
        return {**bank, **codec.prefixed("combinations.", combined)}

    def check_state(self, tensors: dict[str, Tensor]) -> None:
        """Raise `DataError` or `MismatchError` unless the tensors are a valid `state` of any number of tasks."""
        combined = {f"combinations.{name}" for name in self.combinations.state_dict()}
        optional = combined if combined <= tensors.keys() else set()
        needed = {"tasks", *self.bank.columns} - {"statistics"}
        check_names(tensors, needed, optional=optional | ({"statistics"} if self._num_statistics else set()))
        bank, combinations = self.parts_of(tensors)
        self.bank.check_state(bank)
        self.combinations.check_state(combinations)
        check_combined(bank, combinations)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Replace all tasks by those of a file that passed `check_state`."""
        bank, combined = self.parts_of(tensors)
        self.bank.load_state_dict(bank)
        self.combinations.load_state_dict(combined)

    def merge(self, tensors: dict[str, Tensor], source: str) -> None:
        """Add the masks of a file that passed `check_state`.

        Raises:
            MismatchError: the file holds combinations.
            KeyError: a task is in both and differs. Nothing is merged then.
        """
        bank, combined = self.parts_of(tensors)
        if len(combined["tasks"]):
            raise MismatchError(
                f"The mask bank {source} holds combinations of its masks, which cannot be merged; load it by itself."
            )
        other = MaskBank(
            self.bank.num_weights, self._num_statistics, with_standardisation=self.bank.with_standardisation
        )
        other.load_state_dict(bank)
        clashes = sorted({*other.tasks.tolist()} & {*self.combinations.tasks.tolist()})
        if clashes:
            raise KeyError(f"Tasks {clashes} are combinations here and masks in {source}; nothing is merged.")
        self.bank.merge(other)

    def parts_of(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Split a file's tensors into the states of the bank and of the combinations."""
        bank = {name: tensors[name] for name in ("tasks", *self.bank.columns) if name != "statistics"}
        bank["statistics"] = tensors.get("statistics", torch.empty(bank["tasks"].numel(), 0))
        combined = codec.under("combinations.", tensors)
        return bank, combined or Combinations(self._num_statistics).state_dict()

    @property
    def _num_statistics(self) -> int:
        return self.bank.statistics.shape[1]


def check_combined(bank: dict[str, Tensor], combined: dict[str, Tensor]) -> None:
    """Raise `DataError` if combinations use no masks or absent ones, or if their task has its own mask."""
    if not combined or not bank:
        return
    own = {*bank["tasks"].tolist()}
    used = combined["masks"][combined["coefficients"].any(0)]
    without_masks = ~combined["coefficients"].any(1)
    if own & {*combined["tasks"].tolist()} or not {*used.tolist()} <= own or without_masks.any():
        raise DataError("What is stored of each combination is damaged: it does not fit the masks.")
