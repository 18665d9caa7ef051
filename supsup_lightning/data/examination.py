"""Checks of a task's data before training."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from supsup_lightning.data.images import Images, Memory
from supsup_lightning.data.streams import Task
from supsup_lightning.data.values import check_numbers, check_same, check_same_range
from supsup_lightning.data.workers import ImageFiles, Workers
from supsup_lightning.errors import DataError

logger = logging.getLogger(__name__)

_SAMPLE = 100  # images of each half
_LARGE = 10.0  # a standard deviation above it means that images were not normalised


def examine(task: Task, number: int, seen: set[int]) -> None:
    """Check that a task's halves have images, labels in range, finite pixels, and the same kind of images.

    Args:
        task: the data.
        number: number of the task, for messages.
        seen: ids of the stores already checked; those of this task are added.

    Raises:
        DataError: the message names the half and the image, or what differs between the halves.
    """
    for half, images in (("training", task.train), ("test", task.test)):
        if not len(images):
            raise DataError(f"Task {number} has no {half} images.")
        if images.labels.min() < 0 or images.labels.max() >= task.num_classes:
            raise DataError(
                f"Task {number} has {half} labels from {images.labels.min()} to {images.labels.max()}, where its "
                f"{task.num_classes} classes are numbered from 0."
            )
        if isinstance(images.store, Memory) and id(images.store) not in seen:
            check_numbers(images.store.pixels, f"Image {{}} of the {half} data".format)
    stores = {id(images.store): images.store for images in (task.train, task.test)}
    in_memory = all(isinstance(store, Memory) for store in stores.values())
    if in_memory or not stores.keys() <= seen:  # stores outside memory take long to read
        _compare(task, number, first=not stores.keys() <= seen)
    seen |= stores.keys()


def _compare(task: Task, number: int, *, first: bool) -> None:
    if any(isinstance(images.store, Workers) and isinstance(images.store.items, ImageFiles) for images in _both(task)):
        return  # image files are read as bytes of one shape
    whose = f"task {number}"
    train, test = (_sample(images) for images in _both(task))
    check_same("type", train.dtype, test.dtype, whose=whose)
    raw = zip(_both(task), (train, test), strict=True)
    prepared = [replace(images, transform=None).prepare(part) for images, part in raw]
    check_same("shape", *(tuple(part.shape[1:]) for part in prepared), whose=whose)
    check_same_range(*prepared, whose=whose, were_bytes=train.dtype == torch.uint8)
    if first and train.is_floating_point() and train.float().std() > _LARGE:
        logger.warning(
            "The images of task %d are floats with a standard deviation of %.3g, and reach the network as they are; "
            "give bytes (uint8), which are normalised, or normalise them.",
            number,
            train.float().std(),
        )


def _both(task: Task) -> tuple[Images, Images]:
    return task.train, task.test


def _sample(images: Images) -> Tensor:
    """Return some evenly spaced images as stored."""
    places = torch.linspace(0, len(images) - 1, min(len(images), _SAMPLE)).long()
    batches = images.store.batches([images.positions[places]], seeds=None, device=torch.device("cpu"))
    return next(iter(batches)).pixels
