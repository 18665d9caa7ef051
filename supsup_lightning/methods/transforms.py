"""Transformed copies of images, which superfluous outputs learn.

Class ``c`` under transform ``r`` is output ``r * C + c``. ``C`` is the largest number of classes of a task, the same
for all tasks. Transform 0 is the identity, so outputs 0 to ``C - 1`` stay the classes. A mask that was trained so knows
its own images: it names the transform right, too.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from supsup_lightning.errors import ConfigurationError

Transform = Callable[[Tensor], Tensor]
Option = str | Sequence[Transform]


def rotated(images: Tensor, *, quarters: int) -> Tensor:
    """Turn images ``(..., height, width)`` by ``90 * quarters`` degrees, counterclockwise.

    >>> rotated(torch.tensor([[1, 2], [3, 4]]), quarters=1).tolist()
    [[2, 4], [1, 3]]
    """
    return images.rot90(quarters, dims=(-2, -1))


def make_transforms(option: Option) -> tuple[Transform, ...]:
    """Transforms for ``method.superfluous``: none for ``idle``, four for ``rotations``, or identity and those given.

    Raises:
        ConfigurationError: neither one of these names nor a list of functions.
    """
    if option == "idle":
        return ()
    if option == "rotations":
        return (_unchanged, *(partial(rotated, quarters=quarters) for quarters in (1, 2, 3)))
    if isinstance(option, str) or not isinstance(option, Sequence) or not option or not all(map(callable, option)):
        raise ConfigurationError(
            f"method.superfluous={option!r} is neither idle, nor rotations, nor a list of functions of images "
            "(batch, *shape)."
        )
    return (_unchanged, *option)


def described(option: Option) -> str:
    """The option as text, which a checkpoint or file has to share.

    >>> described("rotations"), described([partial(rotated, quarters=2)])
    ('rotations', "supsup_lightning.methods.transforms.rotated{'quarters': 2}")
    """
    return option if isinstance(option, str) else ", ".join(map(_name, option))


def copies(
    images: Tensor, labels: Tensor, transforms: Sequence[Transform], *, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Every image under every transform, with the outputs that these copies are to be.

    Args:
        images: ``(tasks, batch, *shape)``.
        labels: ``(tasks, batch)``, from 0 to ``num_classes - 1``.
        transforms: functions of ``(batch, *shape)``.
        num_classes: of the task with most of them.

    Returns:
        Images ``(tasks, transforms * batch, *shape)`` and labels ``(tasks, transforms * batch)``; the images themselves
        come first.
    """
    flat = images.flatten(0, 1)
    turned = [transform(flat).reshape(images.shape) for transform in transforms]
    return torch.cat(turned, 1), torch.cat([labels + place * num_classes for place in range(len(transforms))], 1)


def check_transforms(
    option: Option, transforms: Sequence[Transform], images: Tensor, *, output_size: int, num_classes: int
) -> None:
    """Raise `ConfigurationError` unless the images can be transformed and the network has an output for each copy."""
    shape = list(images.shape[1:])
    if option == "rotations" and not (len(shape) == 3 and shape[1] == shape[2] and images.is_floating_point()):
        raise ConfigurationError(
            f"method.superfluous=rotations turns images by 90 degrees, which needs square images [channels, size, size]"
            f", and the inputs have shape {shape} and type {images.dtype}; make them square, or use "
            "method.superfluous=idle."
        )
    for place, transform in enumerate(transforms):
        turned = transform(images)
        if turned.shape != images.shape or turned.dtype != images.dtype:
            raise ConfigurationError(
                f"method.superfluous: transform {place} makes {tuple(turned.shape)} {turned.dtype} of images "
                f"{tuple(images.shape)} {images.dtype}; it has to keep shape and type."
            )
    needed = len(transforms) * num_classes
    if output_size < needed:
        raise ConfigurationError(
            f"network.output_size={output_size} is smaller than {needed}: method.superfluous={described(option)} needs "
            f"an output for each of {num_classes} classes under each of {len(transforms)} transforms; raise "
            f"network.output_size to at least {needed}, or use method.superfluous=idle."
        )


def _unchanged(images: Tensor) -> Tensor:
    return images


def _name(transform: Transform) -> str:
    if isinstance(transform, partial):
        return f"{_name(transform.func)}{transform.keywords or ''}{transform.args or ''}"
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{named.__module__}.{named.__qualname__}"
