"""What is looked at in images before they are believed: that they are numbers, and both halves of one kind."""

from collections.abc import Callable

import torch
from torch import Tensor

from supsup_lightning.errors import DataError

_FEW = 8  # images, of which statistics say nothing

# How much the halves' standard deviations may differ, as a ratio, and their means, in the larger standard deviation.
_FLOATS = 3.0, 2.0  # 1 / 0.3081 is normalised MNIST over MNIST
# One half has negative values and the other none: only one was centred, or noise was added in training, which leaves
# the mean as it was. Normalised FashionMNIST over FashionMNIST: 2.8, 0.29; CIFAR centred at 0.5 in one half: 2, 1.
_CENTRED = 2.0, 0.4
_BYTES = 8.0, 2.0  # in one unit, but for 0 to 15 or 0 to 1 in place of 0 to 255; of little contrast in the test, say
_NEGATIVE = 0.1  # share of values at least
_PICTURE = 16  # values at least: the images of one class may well have fewer than that without a negative one


def are_numbers(images: Tensor) -> Tensor:
    """Whether images hold neither NaN nor an infinite value, ``()``, by one pass over them and without waiting.

    >>> are_numbers(torch.tensor([1.0, torch.nan])), are_numbers(torch.tensor([torch.inf, -torch.inf]))
    (tensor(False), tensor(False))
    """
    if images.is_complex():
        images = torch.view_as_real(images)
    if not images.is_floating_point() or not images.numel():
        return torch.ones((), dtype=torch.bool, device=images.device)
    low, high = images.aminmax()  # NaN if one is; 25 times as fast as `isfinite` on each value on a CPU (torch 2.14)
    return low.isfinite() & high.isfinite()


def check_numbers(images: Tensor, whose: Callable[[int], str]) -> None:
    """Raise `DataError` where an image holds a NaN or an infinite value.

    Args:
        images: ``(images, *shape)``.
        whose: the name of an image by its place, to begin the message with.
    """
    if not (images.is_floating_point() or images.is_complex()):
        return
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000]
        if are_numbers(part):
            continue
        bad = (~part.isfinite()).nonzero()
        if len(bad):
            image, *place = bad[0].tolist()
            others = len(bad[:, 0].unique()) - 1
            raise DataError(
                f"{whose(start + image)} has the value {part[tuple(bad[0])].item()} at {place}"
                f"{f', and {others} of the next {len(part)} images have such values' if others else ''}. Mend it, or "
                "leave it out: nothing can be learned or predicted from it."
            )


class Watch:
    """Looks at the batches of one pass: each at once on a CPU; on an accelerator, which a look makes wait, at its end.

    Args:
        whose: the name of an image by its batch and its place in it, to begin a message with.
    """

    def __init__(self, whose: Callable[[int, int], str]) -> None:
        self.whose = whose
        self.seen: list[Tensor] = []

    def look(self, images: Tensor, number: int) -> None:
        """See a batch. Raises `DataError`, on a CPU."""
        if not (images.is_floating_point() or images.is_complex()):
            return
        if images.device.type == "cpu":
            check_numbers(images, lambda place: self.whose(number, place))
        else:
            self.seen.append(are_numbers(images))

    def end(self) -> None:
        """Look at what was seen. Raises `DataError`."""
        bad = (~torch.stack(self.seen)).nonzero().flatten().tolist() if self.seen else []
        if bad:
            raise DataError(f"{self.whose(bad[0], -1)} holds a NaN or an infinite value. Mend or leave it out.")


def check_same(what: str, train: object, test: object, *, whose: str, other: str = "test") -> None:
    """Raise `DataError` where the images of two halves differ in what they are.

    Args:
        what: type or shape.
        train: that of the training images.
        test: that of the other half.
        whose: images they are, for a message.
        other: name of the other half.
    """
    if train != test:
        raise DataError(
            f"The training images of {whose} have {what} {train}, the {other} images {test}; prepare both halves alike."
        )


def check_same_range(train: Tensor, test: Tensor, *, whose: str, other: str = "test", were_bytes: bool = False) -> None:
    """Raise `DataError` where two halves were not normalised alike, by their mean and standard deviation.

    Args:
        train: some training images as the network gets them, ``(images, *shape)``.
        test: some of the other half.
        whose: images they are, for a message.
        other: name of the other half.
        were_bytes: before the training images' mean and standard deviation normalised both.
    """
    if not train.is_floating_point() or min(len(train), len(test)) < _FEW:
        return
    train, test = train.float(), test.float()
    low, high = sorted(part.std(correction=0).item() for part in (train, test))
    least, most = sorted((part < 0).float().mean().item() for part in (train, test))
    centred = most > _NEGATIVE and not least and train[0].numel() >= _PICTURE
    ratio, shift = _BYTES if were_bytes else _CENTRED if centred else _FLOATS
    if high > ratio * low or abs(train.mean() - test.mean()) > shift * high:
        raise DataError(
            f"The training and the {other} images of {whose} were not prepared alike: training {_described(train)}, "
            f"{other} {_described(test)}. Give both the same range and normalisation."
        )


def _described(images: Tensor) -> str:
    low, high = images.aminmax()
    return f"from {low:.4g} to {high:.4g} (mean {images.mean():.4g}, std {images.std(correction=0):.4g})"
