"""Gate and masks summed: log p(t | x) + w s_t(x), and the weight w that found most tasks on validation images.

s_t(x) = (mean_t - objective of x under the mask of t) / spread_t

Mean and spread are those of the objective on the task's own validation images. When a task ends, these images also
pass through the masks that the gate prefers among the tasks so far, and it is counted how many find their task under
each of some weights. No image is kept. An earlier task is therefore judged against fewer others than a later one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.gate import Gate
from supsup_lightning.gate.gate import WEIGHTS
from supsup_lightning.inference.consistency import NAME
from supsup_lightning.inference.objectives import OBJECTIVES, Objective
from supsup_lightning.inference.shortlist import best, objective_where
from supsup_lightning.methods import Method

_NAMES = (*OBJECTIVES, NAME)  # by their place, which is stored
_LEAST_SPREAD = 1e-3  # a smaller one is of images that are all alike, and would decide alone


@torch.no_grad()
def measure(
    gate: Gate,
    method: Method,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    task: int,
    num_classes: int,
    name: str,
    objective: Objective,
    candidates: int,
) -> None:
    """Measure a finished task's scores, and what weights of masks find, on its validation images; keep both.

    Args:
        gate: with the task's sums.
        method: in evaluation mode; the gate is its own.
        batches: of ``(images, labels)``.
        task: the task.
        num_classes: of the task with most of them.
        name: of the objective.
        objective: the objective.
        candidates: how many masks an image passes through, besides its own.

    Raises:
        ConfigurationError: there is no image.
    """
    so_far = torch.isin(method.tasks, gate.mask_rows.tasks)
    so_far |= method.tasks == task
    place = int((method.tasks[so_far] == task).nonzero()[0, 0])
    discriminant = gate.discriminant(method.tasks[so_far])
    posteriors, values, tried = [], [], []
    for images, _ in batches:
        with torch.autocast(images.device.type, enabled=False):
            images = images.float() if images.is_floating_point() else images
            posterior = discriminant.log_posterior_of_tasks(gate.features(method, images))
            chosen = best(posterior, candidates)
            asked = torch.zeros(len(images), len(so_far), dtype=torch.bool, device=images.device)
            asked[:, so_far] = chosen
            asked[:, method.tasks == task] = True
            found = objective_where(asked, method, images, num_classes, objective)
        posteriors.append(posterior)
        values.append(found[:, so_far])
        tried.append(chosen)
    if not posteriors:
        raise ConfigurationError(
            f"inference.mask_weight is measured on validation images, and task {task} has none; raise "
            "data.validation_share, or use inference.mask_weight=null."
        )
    value = torch.cat(values)
    own = value[:, place].double()
    scale = torch.stack([own.mean(), own.std(correction=0).clamp(min=_LEAST_SPREAD)]).float()
    means, spreads = _scales(gate, method.tasks[so_far], {task: scale}).to(value.device).unbind(1)
    scores = ((means - value) / spreads, torch.cat(tried), torch.cat(posteriors))
    right = [int((_summed(*scores, weight).argmax(1) == place).sum()) for weight in WEIGHTS]
    gate.mask_rows.append(
        task,
        objective=torch.tensor([_NAMES.index(name)]),
        scale=scale,
        found=torch.tensor(right),
        images=torch.tensor([len(value)]),
    )


def summed(gate: Gate, tasks: Tensor, log_posterior: Tensor, values: Tensor, chosen: Tensor, weight: float) -> Tensor:
    """``log p(t | x) + w s_t(x)`` of the tasks that are tried, ``(rows, k)``; minus infinity for others.

    Args:
        gate: whose table has the scale of each task's objective.
        tasks: ``(k,)``.
        log_posterior: ``(rows, k)``.
        values: objective, ``(rows, k)``.
        chosen: the tasks that are tried, ``(rows, k)`` bool.
        weight: ``w``.
    """
    means, spreads = _scales(gate, tasks, {}).to(values.device).unbind(1)
    return _summed((means - values) / spreads, chosen, log_posterior, weight)


def chosen_weight(gate: Gate, tasks: Tensor, *, name: str, asked: float | str) -> float:
    """The number that ``inference.mask_weight`` asks for; for ``auto`` the one that found most validation images.

    The least of equally good ones, so that masks have a part only if that is better.

    Args:
        gate: whose table is asked.
        tasks: that are to be found, ``(k,)``.
        name: of the objective.
        asked: the option.

    Raises:
        ConfigurationError: a task that was not measured, or by another objective.
    """
    rows = {task: row for row, task in enumerate(gate.mask_rows.tasks.tolist())}
    without = [task for task in tasks.tolist() if task not in rows]
    if without:
        raise ConfigurationError(
            f"inference.mask_weight={asked} needs each task's scores on its validation images, which are measured when "
            f"it ends, and task {without[0]} was trained without; train with inference.mask_weight, or use "
            "inference.mask_weight=null."
        )
    measured = {_NAMES[gate.mask_rows.get_buffer("objective")[rows[task], 0]] for task in tasks.tolist()}
    if measured != {name}:
        raise ConfigurationError(
            f"inference.mask_weight={asked} with inference.objective={name}: the tasks' scores were measured by "
            f"{' and '.join(sorted(measured))}; use the objective of training, or inference.mask_weight=null."
        )
    if not isinstance(asked, str):
        return asked
    found = gate.mask_rows.get_buffer("found")[[rows[task] for task in tasks.tolist()]].sum(0).tolist()
    return WEIGHTS[found.index(max(found))]


def _summed(scores: Tensor, chosen: Tensor, log_posterior: Tensor, weight: float) -> Tensor:
    together = log_posterior if weight == 0 else log_posterior + weight * scores
    return together.masked_fill(~chosen, -torch.inf)


def _scales(gate: Gate, tasks: Tensor, new: dict[int, Tensor]) -> Tensor:
    """Mean and spread of each task's objective, ``(k, 2)``."""
    return torch.stack([new[task] if task in new else gate.mask_rows.read(task, "scale") for task in tasks.tolist()])
