"""Any pair of torch ``Dataset``s as a data set of this package."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.transforms.v2 import functional as F

from supsup_lightning.data.images import Images, Memory, measure
from supsup_lightning.data.sources import Reading, refuse_crops
from supsup_lightning.data.workers import Workers, seeded
from supsup_lightning.errors import DataError

logger = logging.getLogger(__name__)

_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")


class Datasets:
    """A training and a test ``Dataset`` whose items are ``(image, label)``.

    Images are PIL images, arrays or tensors. Bytes (uint8) are normalised by the training images; anything else is
    taken as it is. A `TensorDataset` stays in memory. Of others each image is asked for anew whenever it is needed, as
    a DataLoader does, so that what they draw at random stays random in training; in validation, where they draw as
    well, it is the same each time. ``data.in_memory=true`` reads each image once instead.

    Args:
        train: with labels from any set of whole numbers.
        test: with labels that the training half has, too.
    """

    def __init__(self, train: Dataset, test: Dataset) -> None:
        self.train = train
        self.test = test
        self._labels: tuple[Tensor, Tensor] | None = None
        self._classes: list[int] = []

    def prepare(self, root: Path) -> None:
        """Nothing to do: the data sets are there."""

    def num_classes(self, root: Path) -> int:
        """Distinct labels of the training half."""
        self._read_labels()
        return len(self._classes)

    def num_skipped(self) -> int:
        """None: errors are the data set's own."""
        return 0

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """In memory or through workers. Raises `DataError` for labels that are missing or no whole numbers."""
        refuse_crops(self, reading)
        train_labels, test_labels = self._read_labels()
        train = _images(self.train, train_labels, reading, "training")
        test = _images(self.test, test_labels, reading, "test")
        first = next(iter(train.store.batches([torch.tensor([0])], seeds=None, device=torch.device("cpu")))).pixels
        if first.dtype != torch.uint8:
            return train, test
        if first.ndim != 4:
            raise DataError(
                f"Images of bytes must be (channels, height, width); the training data set's have shape "
                f"{tuple(first.shape[1:])}. Add what is missing (`image.unsqueeze(0)` for channels), or give floats."
            )
        mean, std = measure(train)
        return (
            Images.of(train.store, train.labels, mean=mean, std=std),
            Images.of(test.store, test.labels, mean=mean, std=std),
        )

    def _read_labels(self) -> tuple[Tensor, Tensor]:
        """Both halves' labels, numbered from 0 in their order."""
        if self._labels is None:
            train, test = labels_of(self.train, "training"), labels_of(self.test, "test")
            self._classes = train.unique().tolist()
            unknown = sorted(set(test.tolist()) - set(self._classes))
            if unknown:
                raise DataError(f"The test data have the label {unknown[0]}, which the training data have not.")
            place = {label: number for number, label in enumerate(self._classes)}
            numbered = [torch.tensor([place[label] for label in labels.tolist()]) for labels in (train, test)]
            self._labels = numbered[0], numbered[1]
        return self._labels


class _Items:
    """A ``Dataset``'s images, without their labels."""

    def __init__(self, dataset: Any, half: str) -> None:
        self.dataset = dataset
        self.half = half
        self.shape = _as_tensor(dataset[0][0]).shape

    def fetch(self, position: int) -> Tensor:
        """As the data set gives it, what it draws at random the same each time."""
        with seeded(position):
            return self.fetch_random(position)

    def fetch_random(self, position: int) -> Tensor:
        """As the data set gives it. Raises `DataError` if it has another shape than the first image."""
        image = _as_tensor(self.dataset[position][0])
        if image.shape != self.shape:
            raise DataError(
                f"Image {position} of the {self.half} data set has shape {tuple(image.shape)}, the first one "
                f"{tuple(self.shape)}; bring them to one shape in the data set."
            )
        return image


def labels_of(dataset: Any, half: str) -> Tensor:
    """All labels, ``(images,)`` int64: from the attributes that data sets keep them in, or else from its items.

    Raises:
        DataError: items without labels, or labels that are no whole numbers.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"The {half} data set ({type(dataset).__name__}) has no length or no positions; give a map-style Dataset."
        )
    if not len(dataset):
        raise DataError(f"The {half} data set is empty.")
    labels = _known_labels(dataset)
    if labels is None:
        item = dataset[0]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise DataError(
                f"The {half} data set ({type(dataset).__name__}) has no labels: its items must be (image, label), "
                f"not {type(item).__name__}."
            )
        logger.info("Reading %d %s images for their labels; an attribute `targets` saves this.", len(dataset), half)
        labels = [dataset[position][1] for position in range(len(dataset))]
    try:
        values = torch.as_tensor(np.asarray(labels))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"The labels of the {half} data set are not integers: {labels[0]!r}. Number the classes."
        ) from error
    if values.is_floating_point() or values.is_complex() or values.ndim != 1:
        example = values.flatten()[0].item()
        raise DataError(
            f"The labels of the {half} data set are not integers, one an image: {example!r} of shape "
            f"{tuple(values.shape)}. Make them whole numbers."
        )
    return values.long()


def _known_labels(dataset: Any) -> Sequence[Any] | None:
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_known_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part or ()]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].tolist() if len(dataset.tensors) > 1 else None
    if getattr(dataset, "target_transform", None) is not None:  # the attribute would not be what items say
        return None
    found = (getattr(dataset, name, None) for name in _LABEL_ATTRIBUTES)
    labels = next((labels for labels in found if labels is not None and len(labels) == len(dataset)), None)
    return labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels


def _images(dataset: Any, labels: Tensor, reading: Reading, half: str) -> Images:
    if isinstance(dataset, TensorDataset) and reading.in_memory is not False:
        return Images.of(Memory(_as_tensor(dataset.tensors[0])), labels)
    store = Workers(_Items(dataset, half), num_workers=reading.num_workers or 0)
    if reading.in_memory is not True:
        return Images.of(store, labels)
    positions = torch.arange(len(labels)).split(100)
    batches = store.batches(positions, seeds=None, device=torch.device("cpu"))
    return Images.of(Memory(torch.cat([batch.pixels for batch in batches])), labels)


def _as_tensor(image: Any) -> Tensor:
    """As it is, but for numpy's double precision, which no layer takes."""
    if not isinstance(image, (Tensor, np.ndarray)):
        return F.pil_to_tensor(image)
    tensor = torch.as_tensor(image)
    return tensor.float() if tensor.dtype == torch.float64 else tensor
