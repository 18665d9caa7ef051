"""Data set made from any pair of torch ``Dataset``s."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import CIFAR10, MNIST, SVHN, DatasetFolder

from supsup_lightning.data.images import Images, Memory, is_channels_last, measure
from supsup_lightning.data.items import as_tensor, image_and_label, label_of, num_ignored
from supsup_lightning.data.sources import Reading, refuse_crops
from supsup_lightning.data.values import check_numbers
from supsup_lightning.data.workers import Workers, draw_from, seeded
from supsup_lightning.errors import DataError

logger = logging.getLogger(__name__)

# The attribute from which ``__getitem__`` of these classes, and of subclasses that inherit it, takes the label.
_LABEL_ATTRIBUTES = {MNIST: "targets", CIFAR10: "targets", SVHN: "labels"}


class Datasets:
    """Data set made from a training and a test ``Dataset`` whose items are ``(image, label)``, or a dict of these.

    Labels are those of the items (`labels_of`). Images are PIL images, arrays or tensors. Bytes (uint8) are normalised
    by the training images; other types are left unchanged. A `TensorDataset` stays in memory. Other data sets are asked
    for an image each time it is needed, as a DataLoader does. Their random transforms thus stay random in training; in
    validation and test they give the same image each time. ``data.in_memory=true`` reads each image once instead.

    Args:
        train: training data; labels may be any set of integers.
        test: test data; every label must occur in the training data, too.
    """

    def __init__(self, train: Dataset, test: Dataset) -> None:
        self.train = train
        self.test = test
        self._labels: tuple[Tensor, Tensor] | None = None  # numbered
        self._labels_of_items: tuple[Tensor, Tensor] | tuple[()] = ()
        self._classes: list[int] = []

    def prepare(self, root: Path) -> None:
        """Do nothing: the data sets exist already."""

    def num_classes(self, root: Path) -> int:
        """Number of distinct labels in the training data."""
        self._read_labels()
        return len(self._classes)

    def num_skipped(self) -> int:
        """Always 0: a ``Dataset`` raises its own errors."""
        return 0

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Return training and test images, in memory or read by workers.

        Raises:
            DataError: labels that are missing or no integers, or bytes that are not (channels, height, width).
        """
        refuse_crops(self, reading)
        numbered = self._read_labels()
        train, test = (
            replace(_images(dataset, labels, reading, half), labels=numbers)
            for dataset, labels, half, numbers in zip(
                (self.train, self.test), self._labels_of_items, ("training", "test"), numbered, strict=True
            )
        )
        first = next(iter(train.store.batches([torch.tensor([0])], seeds=None, device=torch.device("cpu")))).pixels
        if first.dtype != torch.uint8:
            return train, test
        if first.ndim != 4 or is_channels_last(first.shape[1:]):
            remedy = "Add what is missing (`image.unsqueeze(0)` for channels), or give floats"
            raise DataError(
                f"Images of bytes must be (channels, height, width); the training data set's have shape "
                f"{tuple(first.shape[1:])}. {remedy if first.ndim != 4 else 'Bring channels to the front'}."
            )
        mean, std = measure(train)
        return (
            Images.of(train.store, train.labels, mean=mean, std=std),
            Images.of(test.store, test.labels, mean=mean, std=std),
        )

    def _read_labels(self) -> tuple[Tensor, Tensor]:
        """Return the labels of both halves, renumbered from 0 in ascending order."""
        if self._labels is None:
            train, test = labels_of(self.train, "training"), labels_of(self.test, "test")
            self._classes = train.unique().tolist()
            unknown = sorted(set(test.tolist()) - set(self._classes))
            if unknown:
                raise DataError(
                    f"The test data have the label {unknown[0]}, which the training data have not: those have "
                    f"{_shown(self._classes)}, the test data {_shown(sorted(set(test.tolist())))}."
                )
            absent = sorted(set(self._classes) - set(test.tolist()))
            if absent:
                logger.warning(
                    "The test data have none of the training data's labels %s. Were labels numbered anew in each half, "
                    "they would not mean the same.",
                    _shown(absent),
                )
            if self._classes[0] < 0 and len(self._classes) > 2:
                logger.warning("The label %d counts as a class; leave out what has no label.", self._classes[0])
            self._labels_of_items = train, test
            place = {label: number for number, label in enumerate(self._classes)}
            numbered = [torch.tensor([place[label] for label in labels.tolist()]) for labels in (train, test)]
            self._labels = numbered[0], numbered[1]
        return self._labels


def class_names_of(source: Datasets) -> list[str]:
    """Names of the classes, where the training data set has them (``classes``) and its labels count them."""
    names = getattr(source.train, "classes", None)
    counted = _known_labels(source.train) is not None and bool(source._classes) and source._classes[0] >= 0
    if counted and isinstance(names, (list, tuple)) and source._classes[-1] < len(names):
        return [str(names[label]) for label in source._classes]
    return [str(label) for label in source._classes]


def _shown(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:10])) + (f", ... ({len(labels)} in all)" if len(labels) > 10 else "")


class _Items:
    """Images of a ``Dataset``, each checked for the first one's shape and type and for an unchanged label."""

    def __init__(self, dataset: Any, labels: Tensor, half: str) -> None:
        self.dataset = dataset
        self.labels = labels
        self.half = half
        first = as_tensor(image_and_label(dataset[0], self._name(0))[0], self._name(0))
        self.shape, self.dtype = first.shape, first.dtype

    def fetch(self, position: int) -> Tensor:
        """Return one image, drawn with the same random numbers each time."""
        with seeded(position):
            return self.fetch_random(position)

    def fetch_random(self, position: int) -> Tensor:
        """Return one image, drawn with the current random numbers. Raises `DataError` if image or label changed kind.

        The shape and type must be those of the first image, and the label the one read at the start.
        """
        name = self._name(position)
        image, label = image_and_label(self.dataset[position], name)
        image = as_tensor(image, name)
        for what, own, first in (("shape", tuple(image.shape), tuple(self.shape)), ("type", image.dtype, self.dtype)):
            if own != first:
                raise DataError(f"{name} has {what} {own}, the first one {first}; bring them to one in the data set.")
        label, before = label_of(label, f"the {self.half} data set"), int(self.labels[position])
        if label != before:
            raise DataError(
                f"{name} has the label {label} now, and had {before} when all labels were read. A label has to stay; "
                "what a data set draws at random may change the image alone."
            )
        check_numbers(image.unsqueeze(0), lambda _: name)
        return image

    def _name(self, position: int) -> str:
        return f"Image {position} of the {self.half} data set"


def labels_of(dataset: Any, half: str) -> Tensor:
    """Return the labels of all items, ``(images,)`` int64.

    Labels are read item by item, because an attribute such as ``targets`` may differ from what ``__getitem__`` returns.
    Classes whose code is known are faster to read: torch's `TensorDataset`, `Subset` and `ConcatDataset`, and
    torchvision's MNIST, CIFAR, SVHN and folders without a ``target_transform``.

    Raises:
        DataError: no length or no items, items without labels, or labels that are no integers.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"The {half} data set ({type(dataset).__name__}) has no length or no positions; give a map-style Dataset."
        )
    if not len(dataset):
        raise DataError(f"The {half} data set is empty.")
    if isinstance(dataset, Subset) and torch.as_tensor(dataset.indices[:1]).dtype == torch.bool:
        raise DataError(
            f"The {half} data set is a Subset by a mask, and takes integers: Subset(dataset, "
            "torch.as_tensor(mask).nonzero().flatten())."
        )
    known = _known_labels(dataset)
    if known is None or len(known) != len(dataset):
        return torch.tensor(_read_labels(dataset, half))
    return torch.tensor([label_of(label, f"the {half} data set") for label in known])


def _read_labels(dataset: Any, half: str) -> list[int]:
    """Read the labels item by item."""
    whose = f"the {half} data set"
    began, labels = perf_counter(), []
    logger.info("Reading %d %s items for their labels.", len(dataset), half)
    with seeded(0):
        for position in range(len(dataset)):
            draw_from(position)  # the same random numbers as in `_Items.fetch`
            item = dataset[position]
            _, label = image_and_label(item, f"Item {position} of {whose} ({type(dataset).__name__})")
            labels.append(label_of(label, f"{whose} (item {position})"))
    if num_ignored(item) and not isinstance(item, Mapping):
        logger.info("Of each %s item the first two of %d parts are used, as image and label.", half, len(item))
    logger.info("Read the labels of %d %s items in %.1f s.", len(labels), half, perf_counter() - began)
    return labels


def _known_labels(dataset: Any) -> Sequence[Any] | None:
    """Return the labels without reading an image; None if the class of the data set is not known."""
    reads = type(dataset).__getitem__
    if reads is Subset.__getitem__:
        inner = _known_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if reads is ConcatDataset.__getitem__:
        parts = [_known_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part or ()]
    if reads is TensorDataset.__getitem__:
        return dataset.tensors[1].tolist() if len(dataset.tensors) > 1 else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    if reads is DatasetFolder.__getitem__:
        return [label for _, label in dataset.samples]
    name = next((name for kind, name in _LABEL_ATTRIBUTES.items() if reads is kind.__getitem__), None)
    return None if name is None else torch.as_tensor(getattr(dataset, name)).tolist()


def _images(dataset: Any, labels: Tensor, reading: Reading, half: str) -> Images:
    if type(dataset).__getitem__ is TensorDataset.__getitem__ and reading.in_memory is not False:
        return Images.of(Memory(as_tensor(dataset.tensors[0][: len(dataset)], f"The {half} data set")), labels)
    store = Workers(_Items(dataset, labels, half), num_workers=reading.num_workers or 0)
    if reading.in_memory is not True:
        return Images.of(store, labels)
    positions = torch.arange(len(labels)).split(100)
    batches = store.batches(positions, seeds=None, device=torch.device("cpu"))
    return Images.of(Memory(torch.cat([batch.pixels for batch in batches])), labels)
