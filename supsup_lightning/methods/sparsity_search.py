"""`mask.sparsity=auto`: the sparsest mask of each task that is about as accurate as its densest."""

from collections.abc import Sequence
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from supsup_lightning.errors import ConfigurationError


class SparsitySearch(nn.Module):
    """Trains a task at several sparsities and keeps the sparsest mask within a tolerance of the densest.

    The densest comes first. Then the interval between the sparsest that was accurate enough and the densest that was
    not is halved until nothing lies between them, which assumes that accuracy falls with sparsity. Accuracy is that of
    validation images. Every task takes as many trainings, so that an epoch's place is known by arithmetic.

    Args:
        candidates: sparsities from the densest on; 2, 4, 8 or 16 of them.
        tolerance: of validation accuracy, below the densest mask's.
        num_weights: length of the scores.
        num_statistics: of normalisation layers.

    Attributes:
        tried: of each task, sparsities and accuracies in the order in which they were tried.

    >>> search = SparsitySearch((0.5, 0.7, 0.8, 0.9), tolerance=0.02, num_weights=1)
    >>> for accuracy in (0.90, 0.89, 0.80):
    ...     _ = search.begin(0)
    ...     search.judge(0, accuracy, torch.zeros(1), torch.zeros(0))
    >>> search.tried[0], search.chosen(0)
    ([(0.5, 0.9), (0.8, 0.89), (0.9, 0.8)], 0.8)
    """

    scores: Tensor
    statistics: Tensor

    def __init__(
        self, candidates: Sequence[float], *, tolerance: float, num_weights: int, num_statistics: int = 0
    ) -> None:
        super().__init__()
        numbers = not isinstance(candidates, str) and isinstance(candidates, Sequence)
        numbers = numbers and all(type(candidate) in (int, float) for candidate in candidates)
        if not numbers or len(candidates) not in (2, 4, 8, 16) or list(candidates) != sorted(set(candidates)):
            raise ConfigurationError(
                f"mask.search.candidates={candidates} must be 2, 4, 8 or 16 sparsities, from the densest on."
            )
        if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:
            raise ConfigurationError(f"mask.search.tolerance={tolerance!r} is a share of images; it lies in [0, 1).")
        self.candidates = tuple(candidates)
        self.tolerance = tolerance
        self.num_trials = 1 + int(log2(len(self.candidates)))
        self.tried: dict[int, list[tuple[float, float]]] = {}
        # Of the sparsest mask so far that is accurate enough.
        self.register_buffer("scores", torch.zeros(num_weights, dtype=torch.float32))
        self.register_buffer("statistics", torch.zeros(num_statistics, dtype=torch.float32))

    def begin(self, task: int) -> float:
        """Sparsity of the current training."""
        tried = dict(self.tried.setdefault(task, []))
        if not tried:
            return self.candidates[0]
        low, high = self._interval(tried)
        return self.candidates[(low + high) // 2]

    def judge(self, task: int, accuracy: float, scores: Tensor, statistics: Tensor) -> None:
        """Record the end of a training: validation accuracy, scores ``(weights,)``, statistics ``(statistics,)``."""
        self.tried[task].append((self.begin(task), accuracy))
        if self.chosen(task) == self.tried[task][-1][0]:
            self.scores.copy_(scores.detach())
            self.statistics.copy_(statistics)

    def chosen(self, task: int) -> float:
        """Sparsest accurate candidate so far."""
        return self.candidates[self._interval(dict(self.tried[task]))[0]]

    def _interval(self, tried: dict[float, float]) -> tuple[int, int]:
        """Indices of the sparsest accurate candidate and of the first inaccurate one."""
        least = tried[self.candidates[0]] - self.tolerance - 1e-6  # of rounding: accuracies were float32
        low, high = 0, len(self.candidates)
        for place, candidate in enumerate(self.candidates):
            if candidate in tried and low < place < high:
                low, high = (place, high) if tried[candidate] >= least else (low, place)
        return low, high

    def report(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "candidates": list(self.candidates),
            "tolerance": self.tolerance,
            "trainings_per_task": self.num_trials,
            "tried": {str(task): [list(pair) for pair in tried] for task, tried in self.tried.items()},
            "chosen": {str(task): self.chosen(task) for task, tried in self.tried.items() if tried},
        }

    def get_extra_state(self) -> dict[str, Any]:
        """State for `state_dict`."""
        return {"tried": self.tried}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        self.tried = state["tried"]
