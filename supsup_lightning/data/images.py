"""A data set in memory: uint8 images, from which batches are made on the device by indexing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Images:
    """Images with their labels; a batch is an index, a normalisation and the task's transform.

    Attributes:
        pixels: ``(images, channels, height, width)`` uint8.
        labels: ``(images,)`` int64, from 0.
        mean: ``(channels, 1, 1)`` of the training pixels, in their units.
        std: likewise.
        transform: of a normalised batch ``(batch, channels, height, width)`` float32; keeps the first dimension.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    transform: Transform | None = None

    @classmethod
    def normalised(cls, pixels: Tensor, labels: Tensor) -> "Images":
        """With the mean and standard deviation of these very images, by channel."""
        # By histogram: exact, and without a float copy of the data set.
        values = torch.arange(256, dtype=torch.float64)
        counts = torch.stack([channel.flatten().bincount(minlength=256).double() for channel in pixels.unbind(1)])
        shares = counts / counts.sum(1, keepdim=True)  # (channels, 256)
        mean = shares @ values
        std = (shares @ values**2 - mean**2).sqrt()
        return cls(pixels, labels, mean.float().view(-1, 1, 1), std.float().clamp_min(1e-6).view(-1, 1, 1))

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(batch, *shape)`` float32 and labels ``(batch,)`` at these positions."""
        pixels = self.pixels[index].float().sub_(self.mean).div_(self.std)
        return pixels if self.transform is None else self.transform(pixels), self.labels[index]

    def to(self, device: torch.device) -> "Images":
        """The same on another device (the transform moves with its first batch)."""
        moved = {name: getattr(self, name).to(device) for name in ("pixels", "labels", "mean", "std")}
        return replace(self, **moved)

    def select(self, index: Tensor) -> "Images":
        """The images at these positions."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])


class BatchLoader:
    """Yields ``(images, labels)`` for each row of positions; what Lightning takes for a DataLoader, without workers.

    Args:
        images: on the device where batches are wanted.
        order: positions of each batch.
    """

    def __init__(self, images: Images, order: list[Tensor]) -> None:
        self.images = images
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.pixels.device
        for index in self.order:
            yield self.images.batch(index.to(device, non_blocking=True))
