"""Task streams: how one data set becomes a sequence of tasks."""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from supsup_lightning.data.images import Images
from supsup_lightning.seeding import generator


class Stream(Protocol):
    """Makes a task's images from the data set's; train and test images of a task go through the same stream."""

    def __call__(self, images: Images, *, task: int, seed: int) -> Images:
        """The images of ``task``, or the same images under another transform."""
        ...


class Permuted:
    """Each task sees the pixels (over all channels) in one random order of its own, fixed by seed and task."""

    def __call__(self, images: Images, *, task: int, seed: int) -> Images:
        """The images with the permutation of ``task`` as their transform."""
        return replace(images, transform=_Permutation(images.pixels[0].numel(), task=task, seed=seed))


class _Permutation:
    def __init__(self, num_pixels: int, *, task: int, seed: int) -> None:
        self.order = torch.randperm(num_pixels, generator=generator(seed, "permutation", task))

    def __call__(self, batch: Tensor) -> Tensor:
        self.order = self.order.to(batch.device)
        return batch.flatten(1).index_select(1, self.order).view_as(batch)
