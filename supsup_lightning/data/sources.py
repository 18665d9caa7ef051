"""Data sets with a training and a test half; the families that torchvision and scikit-learn know."""

import hashlib
import logging
from collections.abc import Callable
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
    """How images that lie in files are read; data sets that fit in memory need none of it.

    Attributes:
        input_shape: to bring images to, ``(channels, height, width)``; None if the data do not say.
        in_memory: read all of them at the start; ``auto``: if they take a gigabyte at most.
        num_workers: processes that read them; None for one a core, up to 8.
        on_error: ``raise`` or ``skip``, where an image is missing or damaged.
        resized_crop: train on random parts of them.
    """

    input_shape: tuple[int, ...] | None = None
    in_memory: bool | str = "auto"
    num_workers: int | None = None
    on_error: str = "raise"
    resized_crop: bool = False


def refuse_crops(source: Any, reading: Reading) -> None:
    """Raise `ConfigurationError` if crops are to be drawn from files, where ``source`` has none."""
    if reading.resized_crop:
        raise ConfigurationError(
            f"data.augment=resized_crop has no effect on {type(source).__name__}, as it is drawn while image files are "
            "read; use data.augment=crop_flip."
        )


class Source(Protocol):
    """A data set with a training and a test half. All methods take the folder that holds the data sets.

    A class of your own may inherit from it, and has to define `num_classes` and `load`.
    """

    def prepare(self, root: Path) -> None:
        """Download what is absent; called by one process per machine. By default nothing. Raises `DataError`."""

    def num_classes(self, root: Path) -> int:
        """How many classes there are; known without reading an image. Raises `DataError`."""
        ...

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Training and test images, normalised by the training images; `halves` makes them from tensors.

        Raises:
            DataError: missing or damaged files.
        """
        ...

    def num_skipped(self) -> int:
        """Number of images that were left out because they could not be read."""
        return 0


@runtime_checkable
class Named(Protocol):
    """A data set whose classes have names."""

    def class_names(self, root: Path) -> list[str]:
        """In the order of their numbers."""
        ...


class Digits:
    """scikit-learn's embedded digits: 1,797 images of 8 x 8, 10 classes; every fifth of them is a test image."""

    def prepare(self, root: Path) -> None:
        """Nothing to do: the images come with scikit-learn."""

    def num_classes(self, root: Path) -> int:
        """Ten."""
        return 10

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """1,437 training and 360 test images."""
        refuse_crops(self, reading)
        from sklearn.datasets import load_digits  # a second of import that no other data set needs

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)  # 0 to 16
        labels = torch.from_numpy(digits.target).long()
        test = torch.arange(len(labels)) % 5 == 0
        train = ~test
        return halves(pixels[train], labels[train], pixels[test], labels[test])

    def num_skipped(self) -> int:
        """None."""
        return 0


class _Torchvision:
    """A data set of torchvision's: downloaded where absent, and said so; then whole in memory."""

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
        """Number of classes, as published."""
        return self.classes

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Training and test images."""
        refuse_crops(self, reading)
        return halves(*self.read(root, train=True), *self.read(root, train=False))

    def num_skipped(self) -> int:
        """None: a damaged file is an error."""
        return 0

    def digest(self, root: Path) -> str | None:
        """Digest of names and sizes of the files; None if one is absent, as the published one would take its place."""
        paths = self.files(root)
        if not all(path.exists() for path in paths):
            return None
        return hashlib.sha256(repr([(path.name, path.stat().st_size) for path in paths]).encode()).hexdigest()

    def files(self, root: Path) -> list[Path]:
        """What has to be there."""
        raise NotImplementedError

    def read(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        """Images ``(images, channels, height, width)`` uint8, and labels. Raises `DataError` naming a damaged file."""
        raise NotImplementedError


class MNIST(_Torchvision):
    """Handwritten digits in torchvision's layout, ``MNIST/raw/*-ubyte``: 60,000 and 10,000 of 28 x 28, 10 classes."""

    dataset = torchvision.datasets.MNIST
    classes = 10

    def files(self, root: Path) -> list[Path]:
        """Two a half."""
        kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
        folder = root / self.dataset.__name__ / "raw"
        return [folder / f"{half}-{kind}" for half in ("train", "t10k") for kind in kinds]

    def read(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        """One channel. Straight from these files, as torchvision may take others that lie beside them."""
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
    """Articles of clothing, in the form of MNIST, under ``FashionMNIST/raw``."""

    dataset = torchvision.datasets.FashionMNIST


class KMNIST(MNIST):
    """Cursive Japanese characters, in the form of MNIST, under ``KMNIST/raw``."""

    dataset = torchvision.datasets.KMNIST


class CIFAR10(_Torchvision):
    """Photographs in torchvision's layout, ``cifar-10-batches-py``: 50,000 and 10,000 of 32 x 32, 10 classes."""

    dataset = torchvision.datasets.CIFAR10
    classes = 10

    def files(self, root: Path) -> list[Path]:
        """Names and checksums of the files, as torchvision lists them."""
        return list(self._checksums(root))

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Training and test images; all files are checked first, as torchvision names none."""
        for path, checksum in self._checksums(root).items():
            if not check_integrity(path, checksum):
                raise DataError(
                    f"The data file {path} is damaged: its MD5 sum is not {checksum}. Delete it and run again to "
                    "download it, or copy it anew."
                )
        return super().load(root, reading)

    def read(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        """Three channels."""
        dataset = self.dataset(root, train=train)
        return torch.from_numpy(dataset.data).movedim(-1, 1).contiguous(), torch.as_tensor(dataset.targets)

    def _checksums(self, root: Path) -> dict[Path, str]:
        dataset: Any = self.dataset
        folder = root / dataset.base_folder
        listed = {folder / name: checksum for name, checksum in (*dataset.train_list, *dataset.test_list)}
        return {**listed, folder / dataset.meta["filename"]: dataset.meta["md5"]}


class CIFAR100(CIFAR10):
    """CIFAR in 100 classes, under ``cifar-100-python``."""

    dataset = torchvision.datasets.CIFAR100
    classes = 100


def halves(
    train_pixels: Tensor, train_labels: Tensor, test_pixels: Tensor, test_labels: Tensor
) -> tuple[Images, Images]:
    """Both halves in memory, normalised by the training half.

    Args:
        train_pixels: ``(images, channels, height, width)``, uint8, or floats which are taken as they are.
        train_labels: ``(images,)`` int64, from 0.
        test_pixels: as ``train_pixels``.
        test_labels: as ``train_labels``.

    Raises:
        DataError: the images of the halves differ in shape.
    """
    if train_pixels.shape[1:] != test_pixels.shape[1:]:
        one, two = (list(pixels.shape[1:]) for pixels in (train_pixels, test_pixels))
        raise DataError(f"Training images have the shape {one} and test images {two}; both halves have to be alike.")
    train, test = Images.in_memory(train_pixels, train_labels), Images.in_memory(test_pixels, test_labels)
    return train, Images.of(test.store, test.labels, mean=train.mean, std=train.std)
