"""Tasks stored as linear combinations of existing masks: a few numbers per task."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from supsup_lightning.bank.rows import check_tasks, check_tensor
from supsup_lightning.errors import DataError


class Combinations(nn.Module):
    """Coefficients over masks, by task id. `load_state_dict` accepts any number of combinations.

    Attributes:
        tasks: ``(combinations,)`` int64.
        masks: ``(masks,)`` int64, the tasks whose masks are combined.
        coefficients: ``(combinations, masks)`` float32; 0 for masks that were added after the combination.
        statistics: ``(combinations, statistics)`` float32, the running statistics of normalisation layers.

    >>> combined = Combinations()
    >>> combined.set(2, torch.tensor([0.5, 1.0]), masks=torch.tensor([0, 1]))
    >>> combined.matrix(torch.tensor([0, 1, 3])).tolist()
    [[0.5, 1.0, 0.0]]
    """

    tasks: Tensor
    masks: Tensor
    coefficients: Tensor
    statistics: Tensor

    def __init__(self, num_statistics: int = 0) -> None:
        super().__init__()
        self.register_buffer("tasks", torch.empty(0, dtype=torch.int64))
        self.register_buffer("masks", torch.empty(0, dtype=torch.int64))
        self.register_buffer("coefficients", torch.empty(0, 0, dtype=torch.float32))
        self.register_buffer("statistics", torch.empty(0, num_statistics, dtype=torch.float32))

    def __len__(self) -> int:
        return len(self.tasks)

    def __contains__(self, task: int) -> bool:
        return bool((self.tasks == task).any())

    def set(self, task: int, coefficients: Tensor, statistics: Tensor | None = None, *, masks: Tensor) -> None:
        """Store the coefficients of ``task`` over ``masks``, both ``(masks,)``, in place of old ones.

        ``masks`` must include the masks of all stored combinations. ``statistics`` is ``(statistics,)``.
        """
        self.coefficients = self.matrix(masks)
        self.masks = masks.clone()
        if task not in self:
            self.tasks = torch.cat([self.tasks, self.tasks.new_tensor([task])])
            self.coefficients = pad(self.coefficients, (0, 0, 0, 1))
            self.statistics = pad(self.statistics, (0, 0, 0, 1))
        row = self._row(task)
        self.coefficients[row] = coefficients.detach()
        if statistics is not None:
            self.statistics[row] = statistics.detach()

    def get(self, task: int, masks: Tensor) -> Tensor:
        """Return the coefficients of ``task`` over ``masks``, ``(masks,)``. Raises `KeyError` if it has none."""
        return self.matrix(masks)[self._row(task)]

    def get_statistics(self, task: int) -> Tensor:
        """Return a copy of the statistics of ``task``, ``(statistics,)``. Raises `KeyError` if it has none."""
        return self.statistics[self._row(task)].clone()

    def matrix(self, masks: Tensor) -> Tensor:
        """Return all coefficients over ``masks`` ``(masks,)``, in this order: ``(combinations, masks)``.

        Raises:
            KeyError: ``masks`` lacks a mask that a combination uses.
        """
        place = self.masks.unsqueeze(1) == masks  # (own masks, masks)
        absent = self.masks[~place.any(1) & self.coefficients.any(0)].tolist()
        if absent:
            raise KeyError(f"Combinations rest on the masks of tasks {absent}, which are not there any more.")
        known = place.any(1)
        matrix = self.coefficients.new_zeros(len(self), len(masks))
        matrix[:, place[known].int().argmax(1)] = self.coefficients[:, known]
        return matrix

    def rests_on(self, mask: int) -> bool:
        """Whether a combination has a coefficient other than 0 for the mask of this task."""
        return bool(self.coefficients[:, self.masks == mask].any())

    def _row(self, task: int) -> int:
        rows = (self.tasks == task).nonzero()
        if not len(rows):
            raise KeyError(f"Task {task} is no combination; there are {len(self)} of them.")
        return int(rows[0])

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Check a state before any of it is loaded. Raises `DataError` if it is damaged."""
        for name in ("tasks", "masks"):
            check_tasks(stored, "combination", name)
        shapes = {
            "coefficients": (len(stored["tasks"]), len(stored["masks"])),
            "statistics": (len(stored["tasks"]), self.statistics.shape[1]),
        }
        for name, shape in shapes.items():
            if check_tensor(stored, name, self.get_buffer(name), "combination").shape != shape:
                raise DataError(f"What is stored of each combination is damaged: {name} are not of shape {shape}.")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        names = ("tasks", "masks", "coefficients", "statistics")
        self.check_state({name: state_dict.get(prefix + name) for name in names})
        # Buffers grow, so loading takes on the stored sizes first; the default would refuse them.
        for name in names:
            setattr(self, name, self.get_buffer(name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
