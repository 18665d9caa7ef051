"""Metrics of continual learning: accuracy per task, task assignment, mask recovery, forgetting."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class TaskAccuracy(Metric):
    """Share of images per task that are predicted right, and whose task is found; summed over processes.

    >>> metric = TaskAccuracy(num_tasks=2)
    >>> metric.update(1, right=torch.tensor([True, False]), found=torch.tensor([True, True]))
    >>> accuracy, found = metric.compute()
    >>> accuracy.tolist(), found.tolist()
    ([nan, 0.5], [nan, 1.0])

    Args:
        num_tasks: number of tasks that are counted.
        first_task: number of the first of them.
    """

    full_state_update = False
    right: Tensor
    found: Tensor
    images: Tensor

    def __init__(self, num_tasks: int, *, first_task: int = 0) -> None:
        super().__init__()
        self.first_task = first_task
        for count in ("right", "found", "images"):
            self.add_state(count, torch.zeros(num_tasks, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, task: int, *, right: Tensor, found: Tensor) -> None:
        """Count one batch of ``task``: ``right`` and ``found`` are ``(batch,)`` bool."""
        place = task - self.first_task
        self.right[place] += right.sum()
        self.found[place] += found.sum()
        self.images[place] += len(right)

    def compute(self) -> Tensor:
        """Shares of images predicted right, and whose task is found, ``(2, tasks)`` in [0, 1]; NaN without images."""
        return torch.stack([self.right, self.found]).double() / self.images


class TaskConfusion(Metric):
    """Number of images of each task that are taken for each task; summed over processes.

    >>> metric = TaskConfusion()
    >>> metric.update(0, torch.tensor([0, 0, 2]))
    >>> metric.update(0, torch.tensor([0]))
    >>> metric.compute().tolist()
    [[0, 0, 3], [0, 2, 1]]
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Only pairs that occur, as a table of all would be most of the memory for thousands of tasks.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, task: int, found: Tensor) -> None:
        """Count one batch of ``task``: ``found`` ``(batch,)`` int64 are the inferred tasks; -1 if one is unknown."""
        values, images = found.unique(return_counts=True)
        self.rows.append(torch.stack([torch.full_like(values, task), values, images], dim=1))

    def compute(self) -> Tensor:
        """Task, inferred task and number of images of each pair that occurs, ``(pairs, 3)`` int64, in order."""
        if not len(self.rows):
            return torch.empty(0, 3, dtype=torch.int64)
        rows = dim_zero_cat(self.rows)
        pairs, place = rows[:, :2].unique(dim=0, return_inverse=True)
        images = rows.new_zeros(len(pairs)).index_add(0, place, rows[:, 2])
        return torch.cat([pairs, images[:, None]], dim=1)


class TaskAssignment(Metric):
    """Agreement of a learner's tasks with the true ones, counted in training batches.

    ``adjusted_rand_index``: 1 for a perfect match whatever the numbering, 0 on average for a random one (Hubert and
    Arabie 1985). ``matched``: share of batches that agree, with tasks and true tasks paired one to one in the best way.

    >>> metric = TaskAssignment()
    >>> for task, true_task, batches in ((5, 0, 100), (3, 1, 90), (5, 1, 10)):
    ...     metric.update(task, true_task, batches=batches)
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'adjusted_rand_index': 0.809, 'matched': 0.95}
    """

    full_state_update = False
    tasks: list[Tensor]
    true_tasks: list[Tensor]

    def __init__(self) -> None:
        # Every process makes the same assignment, so there is nothing to synchronise.
        super().__init__(sync_on_compute=False)
        for name in ("tasks", "true_tasks"):
            self.add_state(name, [])

    def update(self, task: int, true_task: int, *, batches: int = 1) -> None:
        """Count ``batches`` in a row of ``true_task`` that trained ``task``."""
        self.tasks.append(torch.full((batches,), task))
        self.true_tasks.append(torch.full((batches,), true_task))

    def compute(self) -> dict[str, Tensor]:
        """Return both numbers, ``()`` float each; NaN before any batch is counted."""
        if not self.tasks:
            return dict.fromkeys(("adjusted_rand_index", "matched"), torch.tensor(torch.nan))
        from scipy.optimize import linear_sum_assignment  # half a second, only for unannounced tasks
        from sklearn.metrics import adjusted_rand_score

        tasks, numbers = torch.cat(self.tasks).unique(return_inverse=True)
        true_tasks, true_numbers = torch.cat(self.true_tasks).unique(return_inverse=True)
        shape = (len(tasks), len(true_tasks))
        counts = (numbers * shape[1] + true_numbers).bincount(minlength=shape[0] * shape[1]).view(shape)
        pairs = linear_sum_assignment(counts.numpy(), maximize=True)
        return {
            "adjusted_rand_index": torch.tensor(adjusted_rand_score(true_numbers, numbers)),
            "matched": counts[pairs].sum() / len(numbers),
        }


class RecoveryStatistics(Metric):
    """Statistics of mask recovery from a Hopfield memory, over batches of images; summed over processes.

    ``recovered``: share of batches that end exactly at their task's mask; ``steps_mean`` and ``steps_max``: number of
    steps after which these stay at it; ``confidence`` and ``confidence_min``: mean and minimum over all batches. Values
    are None if the masks are not known, or none was recovered.

    >>> statistics = RecoveryStatistics()
    >>> statistics.update(torch.tensor([9, 0, 2, 0, 0]), confidence=0.75)
    >>> statistics.update(torch.tensor([9, 8, 7, 7, 7]), confidence=0.25)
    >>> statistics.compute()
    {'recovered': 0.5, 'steps_mean': 3.0, 'steps_max': 3, 'confidence': 0.5, 'confidence_min': 0.25}
    """

    full_state_update = False
    batches: Tensor
    compared: Tensor
    recovered: Tensor
    steps: Tensor
    steps_max: Tensor
    confidence: Tensor
    confidence_min: Tensor

    def __init__(self) -> None:
        super().__init__()
        for count in ("batches", "compared", "recovered", "steps"):
            self.add_state(count, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("steps_max", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("confidence", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("confidence_min", torch.tensor(1.0, dtype=torch.float64), dist_reduce_fx="min")

    def update(self, distances: Tensor | None, *, confidence: float) -> None:
        """Count one batch.

        Args:
            distances: ``(steps + 1,)`` int, units that differ from the task's mask at the start and after each step;
                None if the mask is not known.
            confidence: confidence of the recovery, in [0, 1].
        """
        self.batches += 1
        self.confidence += confidence
        self.confidence_min = self.confidence_min.clamp(max=confidence)
        if distances is None:
            return
        self.compared += 1
        if distances[-1] == 0:
            away = distances.nonzero()
            steps = away[-1, 0] + 1 if len(away) else torch.zeros_like(self.steps)
            self.recovered += 1
            self.steps += steps
            self.steps_max = torch.maximum(self.steps_max, steps)

    def compute(self) -> dict[str, float | int | None]:
        """Return all statistics by name."""
        counts = {name: int(getattr(self, name)) for name in ("batches", "compared", "recovered", "steps", "steps_max")}
        recovered = counts["recovered"]
        return {
            "recovered": round(recovered / counts["compared"], 6) if counts["compared"] else None,
            "steps_mean": round(counts["steps"] / recovered, 3) if recovered else None,
            "steps_max": counts["steps_max"] if recovered else None,
            "confidence": round(self.confidence.item() / counts["batches"], 6) if counts["batches"] else None,
            "confidence_min": round(self.confidence_min.item(), 6) if counts["batches"] else None,
        }


def forgetting(matrix: Tensor) -> float | None:
    """Mean over tasks of the best accuracy before the end minus the accuracy at the end.

    Args:
        matrix: ``(tasks, tasks)``: row ``n - 1`` after learning ``n`` tasks, one column per task; NaN if not evaluated.

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

    Argument and result are as in `forgetting`. Tasks that were evaluated right after learning count, without the last.

    >>> backward_transfer(torch.tensor([[0.9, float("nan")], [0.6, 0.8]]))
    -0.3
    """
    change = (matrix[-1] - matrix.diagonal())[:-1]
    change = change[change.isfinite()]
    return round(change.mean().item(), 6) if len(change) else None
