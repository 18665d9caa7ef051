"""Tasks that are tried one by one: the best few of an image under a first score, judged by a second one."""

import torch
from torch import Tensor

from supsup_lightning.inference.inference import objective_of_each
from supsup_lightning.inference.objectives import Objective
from supsup_lightning.methods import Method


def best(scores: Tensor, candidates: int) -> Tensor:
    """The tasks with the highest scores: ``(rows, k)`` to ``(rows, k)`` bool.

    >>> best(torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.8]]), 2).int().tolist()
    [[0, 1, 1], [1, 0, 1]]
    """
    places = scores.topk(min(candidates, scores.shape[1])).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, True)


def objective_where(chosen: Tensor, method: Method, images: Tensor, num_classes: int, objective: Objective) -> Tensor:
    """Objective of images under the masks of the tasks that are chosen for them, ``(rows, k)``; infinite elsewhere.

    A task passes once over all images that it is tried for.

    Args:
        chosen: ``(rows, k)`` bool; a row per image, or one row for all images, whose objective is averaged then.
        method: with ``k`` finished tasks.
        images: ``(batch, *shape)``.
        num_classes: of the task with most of them.
        objective: one of `objectives`, or `consistency`.
    """
    together = len(chosen) == 1
    values = torch.full(chosen.shape, torch.inf, device=images.device)
    for row in chosen.any(0).nonzero().flatten():
        asked = chosen[:, row]
        tried = images if together else images[asked]
        own = objective_of_each(method, tried, row.view(1), num_classes, objective)[0].to(values)
        values[asked, row] = own.mean() if together else own
    return values
