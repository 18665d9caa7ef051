"""Consistency of a mask's answers on transformed copies of an image, for networks trained with `methods.transforms`.

score(x) = mean over r of max_c logits(transform_r(x))[r * C + c]
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.inference.objectives import Objective
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import StandardisesScores, require

NAME = "consistency"
_LEAST_SPREAD = 1e-3  # logits; a smaller one is of images that are all alike, and would decide alone


def consistency(logits: Tensor, num_classes: int) -> Tensor:
    """Minus the mean, over transforms, of the largest logit of the transform's own block of outputs.

    Args:
        logits: ``(transforms, batch, output_size)``, of each image under each transform.
        num_classes: outputs per block.

    Returns:
        ``(batch,)``, lower if the mask knows the images.

    >>> consistency(torch.tensor([[[1.0, 2.0, 9.0, 9.0]], [[9.0, 9.0, 4.0, 3.0]]]), 2)
    tensor([-3.])
    """
    blocks = [of_copy[..., r * num_classes : (r + 1) * num_classes].amax(-1) for r, of_copy in enumerate(logits)]
    return -torch.stack(blocks).mean(0)


def value_of(
    objective: Objective, network: Callable[[Tensor], Tensor], images: Tensor, num_classes: int, method: object
) -> Tensor:
    """An objective of each image, ``(batch,)``; for `consistency`, of all its copies.

    Args:
        objective: one of `objectives`, or `consistency`.
        network: from images to logits, with the parameters in question.
        images: ``(batch, *shape)``.
        num_classes: of the task with most of them.
        method: whose transforms make the copies.
    """
    if objective is not consistency:
        return objective(network(images), num_classes)
    transforms = method.transforms  # type: ignore[attr-defined]
    return consistency(torch.stack([network(transform(images)) for transform in transforms]), num_classes)


def standardised(values: Tensor, method: Method, task: int) -> Tensor:
    """`consistency` values in units of the spread that they have on the task's own images, around their mean there."""
    mean, spread = require(method, StandardisesScores).standardisation(task)
    return (values - mean) / spread


@torch.no_grad()
def measure(method: Method, batches: Iterable[tuple[Tensor, Tensor]], *, task: int, num_classes: int) -> None:
    """Measure mean and spread of a finished task's consistency on its own images, and keep them with the task.

    Over all processes, of which each has its share of the images. The method has to be in evaluation mode.

    Raises:
        ConfigurationError: there is no image.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=method.live.values.device)  # of 1, x and x^2
    for images, _ in batches:
        with torch.autocast(images.device.type, enabled=False):
            images = images.float() if images.is_floating_point() else images
            values = value_of(consistency, lambda copy: method(copy, task), images, num_classes, method).double()
        sums += torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    count, total, squares = sums.tolist()
    if not count:
        raise ConfigurationError(f"Task {task} has no validation image to measure its score on.")
    mean = total / count
    spread = max(squares / count - mean**2, 0.0) ** 0.5
    require(method, StandardisesScores).standardise(task, mean, max(spread, _LEAST_SPREAD))


def check_consistency(option: str, name: str | None, method: Method) -> None:
    """Raise `ConfigurationError` if an objective and what superfluous outputs learn do not fit one another."""
    if name == NAME and not method.transforms:
        raise ConfigurationError(
            f"{option}=consistency compares transformed copies of images, which the network has to have learned: add "
            "method.superfluous=rotations (of method=supsup), or use another objective."
        )
    if name == "superfluous" and method.transforms:
        raise ConfigurationError(
            f"{option}=superfluous takes outputs beyond the classes for idle ones, and with method.superfluous they "
            "learn transformed copies; use inference.objective=consistency, or method.superfluous=idle."
        )
