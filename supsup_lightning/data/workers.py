"""Store of images that do not fit in memory: worker processes read them batch by batch."""

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

# Ratio of the short side to the crop in evaluation: 256 to 224, as usual for ImageNet.
_RESIZE_BEFORE_CROP = 256 / 224


class Items(Protocol):
    """Images that are read one by one; every worker has a copy of this object."""

    def fetch(self, position: int) -> Tensor:
        """Return the image for evaluation, ``(channels, height, width)``. Raises `DataError` if it cannot be read."""
        ...

    def fetch_random(self, position: int) -> Tensor:
        """Return the image for training, with its random transforms. All generators are seeded before the call."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files (`decoding.read_image`) brought to one shape.

    Attributes:
        paths: paths of the images.
        shape: ``(channels, height, width)`` to bring them to; one channel is grey.
        resized_crop: crop as usual for ImageNet: a random part of the image in training, mirrored half of the time, and
            the centre in evaluation. Otherwise the whole image is resized.
    """

    paths: Sequence[Path]
    shape: tuple[int, ...]
    resized_crop: bool = False

    def fetch(self, position: int) -> Tensor:
        """Return the centre of the image, or all of it, uint8."""
        return self._evaluation(self._read(position))

    def fetch_random(self, position: int) -> Tensor:
        """Return a random part of the image, or all of it, uint8."""
        return self._training(self._read(position))

    @cached_property
    def _training(self) -> v2.Transform:
        if not self.resized_crop:
            return self._evaluation
        crop = v2.RandomResizedCrop(self.shape[1:], antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    @cached_property
    def _evaluation(self) -> v2.Compose:
        size = self.shape[1:]
        if not self.resized_crop:
            return v2.Compose([v2.Resize(size, antialias=True), v2.PILToTensor()])
        middle = [v2.Resize(round(min(size) * _RESIZE_BEFORE_CROP), antialias=True), v2.CenterCrop(size)]
        return v2.Compose([*middle, v2.PILToTensor()])

    def evaluated(self, picture: Image.Image) -> Tensor:
        """Return the centre of a picture, or all of it, as `fetch` does with one that it has read."""
        return self._evaluation(picture)

    def resized(self, pixels: Tensor) -> Tensor:
        """Bring images ``(batch, channels, height, width)``, or the centre of each, to this height and width."""
        return v2.Compose(self._evaluation.transforms[:-1])(pixels)

    def _read(self, position: int) -> Image.Image:
        return read_image(self.paths[position], channels=self.shape[0])


class _Guarded(Dataset):
    """Data set that returns an error message for an unreadable image; the main process raises or skips."""

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
    """Seed the generators of torch (CPU), numpy and Python for one image, and restore them afterwards.

    An image's random numbers thus do not depend on the number of workers, on a resume, or on what ran before.
    `torch.manual_seed` would seed every other device's generator as well, which takes 0.2 ms.
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
    """Seed the generators of torch (CPU), numpy and Python. Call it within `seeded`, which restores them."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class _Requests:
    """Batch sampler whose batches are replaced between passes, so that workers persist over epochs."""

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
    """DataLoader with persistent workers, for one pass at a time."""

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
            generator=torch.Generator(),  # otherwise each pass would draw from the global generator
        )

    def batches(self, positions: Sequence[Tensor], seeds: Tensor | None) -> Iterator[tuple[Tensor | None, Any, Any]]:
        self.requests.positions, self.requests.seeds = positions, seeds
        self.busy = True
        try:
            yield from self.loader
        finally:
            self.busy = False


class Workers:
    """Store whose images are read by persistent worker processes; on CUDA, batches come through pinned memory.

    Args:
        items: the images.
        shape: shape of one image; by default that of the first.
        num_workers: processes for training, and as many for evaluation; 0 reads in the main process.
        on_error: ``raise``, or ``skip`` to leave an unreadable image out of its batch, with a warning.

    Attributes:
        skipped: messages of the images that were left out in this process.
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
        """Yield batches without the images that cannot be read.

        Raises:
            DataError: an image cannot be read and ``on_error`` is ``raise``; or no image of a batch can be read.
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
        if pool is None or pool.busy:  # two passes at once: the second gets its own workers
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
