"""Data sets, read whole into memory."""

import logging
import struct
from pathlib import Path
from typing import Protocol

import torch
import torchvision
from torch import Tensor

from supsup_lightning.data.images import Images
from supsup_lightning.errors import DataError

logger = logging.getLogger(__name__)


class Source(Protocol):
    """A data set with a training and a test half."""

    num_classes: int

    def prepare(self) -> None:
        """Download what is absent; called by one process of a machine. Raises `DataError`."""

    def load(self) -> tuple[Images, Images]:
        """Training and test images, normalised by the training images. Raises `DataError`."""


class Digits:
    """scikit-learn's embedded digits: 1,797 images of 8 x 8, 10 classes; every fifth of them is a test image."""

    num_classes = 10

    def prepare(self) -> None:
        """Nothing to do: the images come with scikit-learn."""

    def load(self) -> tuple[Images, Images]:
        """1,437 training and 360 test images."""
        from sklearn.datasets import load_digits  # a second of import that no other data set needs

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)  # 0 to 16
        labels = torch.from_numpy(digits.target).long()
        test = torch.arange(len(labels)) % 5 == 0
        train = ~test
        return _halves(pixels[train], labels[train], pixels[test], labels[test])


class MNIST:
    """MNIST in torchvision's layout, ``root/MNIST/raw/*-ubyte``; downloaded where absent, and said so.

    Args:
        root: the folder that holds, or gets, ``MNIST/raw``.
    """

    num_classes = 10
    dataset = torchvision.datasets.MNIST

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()

    def prepare(self) -> None:
        """Download through torchvision if a file is absent."""
        try:
            if all(path.exists() for path in self._files()):
                return
        except OSError as error:
            raise DataError(f"data.root={self.root} cannot be read ({error}); check its permissions.") from error
        logger.warning("%s is not in data.root=%s: downloading it there.", self.dataset.__name__, self.root)
        try:
            self.dataset(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.dataset.__name__} is not in data.root={self.root} and could not be downloaded ({error}). "
                f"Put its files under {self._folder()}, or point data.root (or the variable SUPSUP_DATA) to a folder "
                "that has them."
            ) from error

    def load(self) -> tuple[Images, Images]:
        """60,000 training and 10,000 test images of 28 x 28."""
        for path in self._files():
            _check_idx(path)
        train, test = self.dataset(self.root, train=True), self.dataset(self.root, train=False)
        return _halves(train.data.unsqueeze(1), train.targets, test.data.unsqueeze(1), test.targets)

    def _folder(self) -> Path:
        return self.root / self.dataset.__name__ / "raw"

    def _files(self) -> list[Path]:
        kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
        return [self._folder() / f"{half}-{kind}" for half in ("train", "t10k") for kind in kinds]


def _halves(
    train_pixels: Tensor, train_labels: Tensor, test_pixels: Tensor, test_labels: Tensor
) -> tuple[Images, Images]:
    train = Images.normalised(train_pixels, train_labels)
    return train, Images(test_pixels, test_labels, train.mean, train.std)


def _check_idx(path: Path) -> None:
    """Raise `DataError` if an idx file is unreadable, or its size is not what its header announces."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            dimensions = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
        size = path.stat().st_size
    except (OSError, IndexError, struct.error) as error:
        raise DataError(f"The data file {path} cannot be read ({error}); check data.root and the file.") from error
    expected = 4 + 4 * len(dimensions)
    elements = 1
    for dimension in dimensions:
        elements *= dimension
    if size != expected + elements:
        raise DataError(
            f"The data file {path} is damaged: {size} bytes where its header announces {expected + elements}. "
            "Delete it and run again to download it, or copy it anew."
        )
