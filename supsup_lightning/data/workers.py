"""Images that do not fit in memory: read by worker processes, batch by batch."""

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from supsup_lightning.data.decoding import read_image
from supsup_lightning.data.images import Batch
from supsup_lightning.errors import DataError

logger = logging.getLogger(__name__)

# Of the short side over the crop, in evaluation: 256 over 224, ImageNet's custom.
_RESIZE_BEFORE_CROP = 256 / 224


class Items(Protocol):
    """Images one by one; a copy of this object lives in every worker."""

    def fetch(self, position: int) -> Tensor:
        """The image ``(channels, height, width)`` as it is evaluated. Raises `DataError` if it cannot be read."""
        ...

    def fetch_random(self, position: int) -> Tensor:
        """The image with what is random in training; called with all generators seeded for it."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files (`decoding.read_image`) brought to one shape.

    Attributes:
        paths: of the images.
        shape: ``(channels, height, width)`` to bring them to; one channel is grey.
        resized_crop: ImageNet's custom: in training a random part of the image, and every other one mirrored; in
            evaluation the middle of it. Otherwise the whole image is brought to the shape.
    """

    paths: Sequence[Path]
    shape: tuple[int, ...]
    resized_crop: bool = False

    def fetch(self, position: int) -> Tensor:
        """The middle of the image, or all of it, uint8."""
        return self._evaluation(self._read(position))

    def fetch_random(self, position: int) -> Tensor:
        """A random part of the image, or all of it, uint8."""
        return self._training(self._read(position))

    @cached_property
    def _training(self) -> v2.Transform:
        if not self.resized_crop:
            return self._evaluation
        crop = v2.RandomResizedCrop(self.shape[1:], antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    @cached_property
    def _evaluation(self) -> v2.Transform:
        size = self.shape[1:]
        if not self.resized_crop:
            return v2.Compose([v2.Resize(size, antialias=True), v2.PILToTensor()])
        middle = [v2.Resize(round(min(size) * _RESIZE_BEFORE_CROP), antialias=True), v2.CenterCrop(size)]
        return v2.Compose([*middle, v2.PILToTensor()])

    def _read(self, position: int) -> Image.Image:
        return read_image(self.paths[position], channels=self.shape[0])


class _Guarded(Dataset):
    """Turns what cannot be read into its message, which the main process decides about."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __getitem__(self, request: tuple[int, int | None]) -> Tensor | str:
        position, seed = request
        try:
            if seed is None:
                return self.items.fetch(position)
            with seeded(seed):
                return self.items.fetch_random(position)
        except DataError as error:
            return str(error)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The generators of torch (CPU), numpy and Python seeded for one image, and as they were afterwards.

    Neither the number of workers, nor a resume, nor what ran before changes what an image draws. `torch.manual_seed`
    would seed every other device's generator as well, in a fifth of a millisecond.
    """
    generator = torch.default_generator
    states = generator.get_state(), random.getstate(), np.random.get_state()
    draw_from(seed)
    try:
        yield
    finally:
        generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def draw_from(seed: int) -> None:
    """Seed the generators of torch (CPU), numpy and Python; within `seeded`, which puts them back."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class _Requests:
    """A batch sampler whose batches are exchanged between passes, so that workers outlive an epoch."""

    def __init__(self) -> None:
        self.positions: Sequence[Tensor] = ()
        self.seeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        for number, positions in enumerate(self.positions):
            seeds = [None] * len(positions) if self.seeds is None else self.seeds[number].tolist()
            yield list(zip(positions.tolist(), seeds, strict=True))


class _Pool:
    """A DataLoader with persistent workers; one pass at a time."""

    def __init__(self, items: Items, *, num_workers: int, pin_memory: bool) -> None:
        self.requests = _Requests()
        self.busy = False
        self.loader = DataLoader(
            _Guarded(items),
            batch_sampler=self.requests,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate,
            generator=torch.Generator(),  # otherwise each pass would draw from everybody's
        )

    def batches(self, positions: Sequence[Tensor], seeds: Tensor | None) -> Iterator[tuple[Tensor | None, Any, Any]]:
        self.requests.positions, self.requests.seeds = positions, seeds
        self.busy = True
        try:
            yield from self.loader
        finally:
            self.busy = False


class Workers:
    """A store whose images are read by worker processes, which persist; batches come through pinned memory.

    Args:
        items: the images.
        shape: of one image; by default that of the first.
        num_workers: processes for training, and as many for evaluation; 0 reads in the main process.
        on_error: ``raise``, or ``skip`` to leave an image that cannot be read out of its batch, and say so.

    Attributes:
        skipped: message of each image that was left out, in this process.
    """

    def __init__(
        self, items: Items, *, shape: tuple[int, ...] | None = None, num_workers: int, on_error: str = "raise"
    ) -> None:
        self.items = items
        self._shape = shape
        self.num_workers = num_workers
        self.on_error = on_error
        self.skipped: dict[str, None] = {}
        self._pools: dict[bool, _Pool] = {}

    def shape(self) -> tuple[int, ...]:
        """Shape of the first image, which all images have to have."""
        if self._shape is None:
            self._shape = tuple(self.items.fetch(0).shape)
        return self._shape

    def batches(self, positions: Sequence[Tensor], *, seeds: Tensor | None, device: torch.device) -> Iterator[Batch]:
        """Batches without the images that cannot be read.

        Raises:
            DataError: an image cannot be read and ``on_error`` is ``raise``; or none of a batch can.
        """
        for pixels, kept, failures in self._pool(seeds is not None, device).batches(positions, seeds):
            for failure in failures:
                if self.on_error == "raise":
                    raise DataError(failure)
                if failure not in self.skipped:
                    self.skipped[failure] = None
                    logger.warning("Skipped (%d so far): %s", len(self.skipped), failure)
            if pixels is None:
                raise DataError(f"Not one image of a whole batch can be read. {failures[0]}")
            yield Batch(pixels.to(device, non_blocking=True), kept if failures else None)

    def _pool(self, training: bool, device: torch.device) -> _Pool:
        pool = self._pools.get(training)
        if pool is None or pool.busy:  # two passes at once: the second gets workers of its own
            fresh = _Pool(self.items, num_workers=self.num_workers, pin_memory=device.type == "cuda")
            if pool is not None:
                return fresh
            self._pools[training] = pool = fresh
        return pool


def _collate(fetched: list[Tensor | str]) -> tuple[Tensor | None, Tensor, list[str]]:
    images = [image for image in fetched if isinstance(image, Tensor)]
    kept = torch.tensor([place for place, image in enumerate(fetched) if isinstance(image, Tensor)])
    failures = [message for message in fetched if isinstance(message, str)]
    return (torch.stack(images) if images else None), kept, failures


def default_num_workers() -> int:
    """Number of cores to run on, up to 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
