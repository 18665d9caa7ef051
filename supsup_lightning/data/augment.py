"""Augmentation of batches on the device, image by image (torchvision's transforms draw once per batch)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from supsup_lightning.data.images import Augment, check_picture
from supsup_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class CropFlip:
    """Random crop of the image padded with black, and a left-right flip of half of the images.

    Attributes:
        padding: pixels added on each side; crops have the size of the image (usual for CIFAR: 4).
        flip: mirror half of the images.

    >>> images = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)
    >>> CropFlip(padding=1)(images, torch.tensor([[0, 1, 0]]))  # up by 0 - 1 rows, right in place, not mirrored
    tensor([[[[0, 0, 0, 0],
              [0, 1, 2, 3],
              [4, 5, 6, 7]]]], dtype=torch.uint8)
    """

    padding: int = 4
    flip: bool = True

    def check(self, shape: Sequence[int]) -> None:
        """Raise `ConfigurationError` for images without height and width, which cannot be cropped."""
        check_picture(shape, "data.augment=crop_flip")

    def __call__(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Augment images ``(batch, channels, height, width)`` by integers ``(batch, 3)`` from 0; the shape stays."""
        height, width = pixels.shape[-2:]
        padded = torch.nn.functional.pad(pixels, [self.padding] * 4)
        top, left = (draws[:, :2] % (2 * self.padding + 1)).unbind(1)
        rows = torch.arange(height, device=pixels.device) + top[:, None]  # (batch, height)
        columns = torch.arange(width, device=pixels.device).expand(len(draws), -1)
        if self.flip:
            columns = torch.where(draws[:, 2:] % 2 == 1, columns.flip(1), columns)
        columns = columns + left[:, None]  # (batch, width)
        images = torch.arange(len(draws), device=pixels.device)
        chosen = padded.movedim(1, -1)[images[:, None, None], rows[:, :, None], columns[:, None, :]]
        return chosen.movedim(-1, 1)


# The workers draw `resized_crop` while they read a file (`workers.ImageFiles`).
AUGMENTS: dict[str, Augment | None] = {"none": None, "crop_flip": CropFlip(), "resized_crop": None}


def make_augment(option: str | Augment | None) -> Augment | None:
    """Return the function that ``data.augment`` names. Raises `ConfigurationError` for an unknown name."""
    if option is None or callable(option):
        return option
    if option not in AUGMENTS:
        raise ConfigurationError(
            f"data.augment={option!r} is not known; choose one of {', '.join(AUGMENTS)}, or give a function of a "
            "batch (batch, channels, height, width) and its random numbers (batch, 3)."
        )
    return AUGMENTS[option]


def name_of(option: str | Augment | None) -> str:
    """Name of the value of ``data.augment``, the same for a name and for the function that it names."""
    if option is None:
        return "none"
    if isinstance(option, str):
        return option
    named = next((name for name, augment in AUGMENTS.items() if augment == option), None)
    return named or str(getattr(option, "__name__", type(option).__name__))
