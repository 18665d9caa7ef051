"""Accuracy by task, and what the accuracy matrix says about forgetting."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskAccuracy(Metric):
    """Counts, for each task, images that are predicted right and images whose task is found; summed over processes.

    >>> metric = TaskAccuracy(num_tasks=2)
    >>> metric.update(1, right=torch.tensor([True, False]), found=torch.tensor([True, True]))
    >>> accuracy, found = metric.compute()
    >>> accuracy.tolist(), found.tolist()
    ([nan, 0.5], [nan, 1.0])
    """

    full_state_update = False
    right: Tensor
    found: Tensor
    images: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        for count in ("right", "found", "images"):
            self.add_state(count, torch.zeros(num_tasks, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, task: int, *, right: Tensor, found: Tensor) -> None:
        """Count one batch of ``task``: ``right`` and ``found`` are ``(batch,)`` bool."""
        self.right[task] += right.sum()
        self.found[task] += found.sum()
        self.images[task] += len(right)

    def compute(self) -> Tensor:
        """``(2, tasks)`` in [0, 1]: shares of images predicted right, and whose task is found; NaN without images."""
        return torch.stack([self.right, self.found]).double() / self.images


def forgetting(matrix: Tensor) -> float | None:
    """Mean over tasks of the best accuracy before the end minus the accuracy at the end.

    Args:
        matrix: ``(tasks, tasks)``: row ``n - 1`` after learning ``n`` tasks, column a task; NaN where not evaluated.

    Returns:
        In [-1, 1]; ``None`` if no task was evaluated before the end.

    >>> forgetting(torch.tensor([[0.9, float("nan")], [0.6, 0.8]]))
    0.3
    """
    before = matrix[:-1].nan_to_num(-torch.inf).amax(0) if len(matrix) > 1 else matrix.new_empty(0)
    known = before.isfinite() & matrix[-1].isfinite() if len(before) else before.bool()
    return round((before - matrix[-1])[known].mean().item(), 6) if known.any() else None


def backward_transfer(matrix: Tensor) -> float | None:
    """Mean over tasks of the accuracy at the end minus the accuracy right after learning the task (Lopez-Paz 2017).

    Args and result as in `forgetting`; only tasks evaluated right after they were learned count, the last one not.

    >>> backward_transfer(torch.tensor([[0.9, float("nan")], [0.6, 0.8]]))
    -0.3
    """
    change = (matrix[-1] - matrix.diagonal())[:-1]
    change = change[change.isfinite()]
    return round(change.mean().item(), 6) if len(change) else None
