"""Data sets with a training and a test half, among them those of torchvision and scikit-learn."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torchvision
from torch import Tensor
from torchvision.datasets.utils import check_integrity

from supsup_lightning.data.idx import read_idx
from supsup_lightning.data.images import Images
from supsup_lightning.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Options for reading image files; data sets that are always in memory ignore them.

    Attributes:
        input_shape: shape to bring images to, ``(channels, height, width)``; None if not given.
        in_memory: read all images at the start; ``auto`` does so if they take at most one gigabyte.
        num_workers: processes that read images; None for one per core, up to 8.
        on_error: ``raise`` or ``skip``, if an image is missing or damaged.
        resized_crop: train on random crops of the images.
    """

    input_shape: tuple[int, ...] | None = None
    in_memory: bool | str = "auto"
    num_workers: int | None = None
    on_error: str = "raise"
    resized_crop: bool = False


def refuse_crops(source: Any, reading: Reading) -> None:
    """Raise `ConfigurationError` if crops are to be drawn from image files, and ``source`` has none."""
    if reading.resized_crop:
        raise ConfigurationError(
            f"data.augment=resized_crop has no effect on {type(source).__name__}, as it is drawn while image files are "
            "read; use data.augment=crop_flip."
        )


class Source(Protocol):
    """Data set with a training and a test half. Methods take the folder that holds the data sets.

    Your own class may inherit from it, and must define `num_classes` and `load`.
    """

    def prepare(self, root: Path) -> None:
        """Download missing files; called by one process per machine. Does nothing by default. Raises `DataError`."""

    def num_classes(self, root: Path) -> int:
        """Number of classes, known without reading an image. Raises `DataError`."""
        ...

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Return training and test images, normalised by the training images; `halves` makes them from tensors.

        Raises:
            DataError: missing or damaged files.
        """
        ...

    def num_skipped(self) -> int:
        """Number of images that were left out because they could not be read."""
        return 0


@runtime_checkable
class Named(Protocol):
    """Data set whose classes have names."""

    def class_names(self, root: Path) -> list[str]:
        """Names of the classes in the order of their labels."""
        ...


class Digits:
    """scikit-learn's bundled digits: 1,797 images of 8 x 8, 10 classes; every fifth image is a test image."""

    def prepare(self, root: Path) -> None:
        """Do nothing: the images come with scikit-learn."""

    def num_classes(self, root: Path) -> int:
        """Number of classes: 10."""
        return 10

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Return 1,437 training and 360 test images."""
        refuse_crops(self, reading)
        from sklearn.datasets import load_digits  # takes a second to import, and no other data set needs it

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)  # 0 to 16
        labels = torch.from_numpy(digits.target).long()
        test = torch.arange(len(labels)) % 5 == 0
        train = ~test
        return halves(pixels[train], labels[train], pixels[test], labels[test])

    def num_skipped(self) -> int:
        """Always 0: the images come with scikit-learn."""
        return 0


class _Torchvision:
    """Data set of torchvision, held in memory. Missing files are downloaded, with a warning."""

    dataset: Callable[..., Any]
    classes: int

    def prepare(self, root: Path) -> None:
        """Download through torchvision if a file is absent."""
        try:
            if all(path.exists() for path in self.files(root)):
                return
        except OSError as error:
            raise DataError(f"data.root={root} cannot be read ({error}); check its permissions.") from error
        name = type(self).__name__
        logger.warning("%s is not in data.root=%s: downloading it there.", name, root)
        try:
            self.dataset(root, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{name} is not in data.root={root} and could not be downloaded ({error}). "
                f"Put its files under {self.files(root)[0].parent}, or point data.root (or the variable SUPSUP_DATA) "
                "to a folder that has them."
            ) from error

    def num_classes(self, root: Path) -> int:
        """Number of classes of the published data set."""
        return self.classes

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Return training and test images."""
        refuse_crops(self, reading)
        return halves(*self.read(root, train=True), *self.read(root, train=False))

    def num_skipped(self) -> int:
        """Always 0: a damaged file is an error."""
        return 0

    def digest(self, root: Path) -> str | None:
        """Digest of the files' names and sizes; None if one is absent, as it would be downloaded."""
        paths = self.files(root)
        if not all(path.exists() for path in paths):
            return None
        return hashlib.sha256(repr([(path.name, path.stat().st_size) for path in paths]).encode()).hexdigest()

    def files(self, root: Path) -> list[Path]:
        """Paths of the files that the data set needs."""
        raise NotImplementedError

    def read(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        """Read images ``(images, channels, height, width)`` uint8 and labels. Raises `DataError` for a damaged file."""
        raise NotImplementedError


class MNIST(_Torchvision):
    """Handwritten digits: 60,000 training and 10,000 test images of 28 x 28, 10 classes; ``MNIST/raw/*-ubyte``."""

    dataset = torchvision.datasets.MNIST
    classes = 10

    def files(self, root: Path) -> list[Path]:
        """Paths of the idx files: images and labels of each half."""
        kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
        folder = root / self.dataset.__name__ / "raw"
        return [folder / f"{half}-{kind}" for half in ("train", "t10k") for kind in kinds]

    def read(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        """Read images of one channel, and labels, from `files`; torchvision may take other files of the folder."""
        image_file, label_file = self.files(root)[:2] if train else self.files(root)[2:]
        images, labels = read_idx(image_file, dimensions=3), read_idx(label_file, dimensions=1).long()
        if len(images) != len(labels):
            raise DataError(
                f"{image_file} has {len(images)} images, and {label_file} has {len(labels)} labels; copy both anew."
            )
        if labels.max() >= self.classes:
            place = int(labels.argmax())
            raise DataError(
                f"{label_file} has the label {int(labels[place])} at place {place}; there are {self.classes} classes."
            )
        return images.unsqueeze(1), labels


class FashionMNIST(MNIST):
    """Articles of clothing, in the format of MNIST, under ``FashionMNIST/raw``."""

    dataset = torchvision.datasets.FashionMNIST
    names: Sequence[str] = tuple(torchvision.datasets.FashionMNIST.classes)


class KMNIST(MNIST):
    """Cursive Japanese characters, in the format of MNIST, under ``KMNIST/raw``."""

    dataset = torchvision.datasets.KMNIST
    names: Sequence[str] = tuple(torchvision.datasets.KMNIST.classes)


class CIFAR10(_Torchvision):
    """Photographs: 50,000 training and 10,000 test images of 32 x 32, 10 classes; ``cifar-10-batches-py``."""

    dataset = torchvision.datasets.CIFAR10
    classes = 10
    names: Sequence[str] = ()  # of the classes; known once the files are read

    def files(self, root: Path) -> list[Path]:
        """Paths of the files that torchvision lists."""
        return list(self._checksums(root))

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Return training and test images. Checksums come first, as torchvision does not name a damaged file."""
        for path, checksum in self._checksums(root).items():
            if not check_integrity(path, checksum):
                raise DataError(
                    f"The data file {path} is damaged: its MD5 sum is not {checksum}. Delete it and run again to "
                    "download it, or copy it anew."
                )
        return super().load(root, reading)

    def read(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        """Read images of three channels, and labels."""
        dataset = self.dataset(root, train=train)
        self.names = [*dataset.classes]
        return torch.from_numpy(dataset.data).movedim(-1, 1).contiguous(), torch.as_tensor(dataset.targets)

    def _checksums(self, root: Path) -> dict[Path, str]:
        dataset: Any = self.dataset
        folder = root / dataset.base_folder
        listed = {folder / name: checksum for name, checksum in (*dataset.train_list, *dataset.test_list)}
        return {**listed, folder / dataset.meta["filename"]: dataset.meta["md5"]}


class CIFAR100(CIFAR10):
    """Photographs as in CIFAR-10, but in 100 classes; ``cifar-100-python``."""

    dataset = torchvision.datasets.CIFAR100
    classes = 100


def halves(
    train_pixels: Tensor, train_labels: Tensor, test_pixels: Tensor, test_labels: Tensor
) -> tuple[Images, Images]:
    """Return training and test images in memory, normalised by the training images.

    Args:
        train_pixels: ``(images, channels, height, width)``, uint8, or floats, which are not normalised.
        train_labels: ``(images,)`` int64, from 0.
        test_pixels: test images in the format of ``train_pixels``.
        test_labels: test labels in the format of ``train_labels``.

    Raises:
        DataError: the images of the halves differ in shape.
    """
    if train_pixels.shape[1:] != test_pixels.shape[1:]:
        one, two = (list(pixels.shape[1:]) for pixels in (train_pixels, test_pixels))
        raise DataError(f"Training images have the shape {one} and test images {two}; both halves have to be alike.")
    train, test = Images.in_memory(train_pixels, train_labels), Images.in_memory(test_pixels, test_labels)
    return train, Images.of(test.store, test.labels, mean=train.mean, std=train.std)
