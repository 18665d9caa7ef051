"""Images to predict, out of files, folders, arrays and lists, in batches: never all of them in memory."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from supsup_lightning.data.inputs import Inputs
from supsup_lightning.data.raw_images import RawImages, network_inputs
from supsup_lightning.data.tree import is_hidden
from supsup_lightning.errors import DataError


@dataclass(frozen=True)
class Preparation:
    """How images become network inputs, for a model.

    Attributes:
        inputs: what the network was trained on.
        raw: how raw images were prepared in training; None if that is not known.
        network: the network.
        skips: images that cannot be read are left out in place of an error.
    """

    inputs: Inputs | None
    raw: RawImages | None
    network: nn.Module
    skips: bool = False


@dataclass(frozen=True)
class Batch:
    """Some images.

    Attributes:
        names: of each image.
        images: network inputs, ``(batch, *shape)``; empty if all were left out.
        skipped: message of each image that was left out.
    """

    names: list[str]
    images: Tensor
    skipped: list[str]


def listed(sources: Sequence[Path]) -> list[Path]:
    """Return files of images, and arrays, in the order given; those of a folder by name.

    Args:
        sources: files, folders (searched with their subfolders for names of images), ``.npy`` arrays, and ``.csv``
            lists with a column ``path``, relative to the list's folder.

    Raises:
        DataError: no such file, a folder without images, a list without that column.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            images = _images_below(source)
            if not images:
                raise DataError(f"The folder {source} has no images ({', '.join(IMG_EXTENSIONS)}).")
            found += images
        elif source.suffix.lower() == ".csv":
            found += _of_list(source)
        else:
            found.append(source)
    for path in found:
        if not path.is_file():
            raise DataError(f"There is no file {path} to predict; check its name.")
    return found


def _images_below(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        images = [name for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS) and not is_hidden(name)]
        found += [Path(place) / name for name in images]
    return found


def _of_list(path: Path) -> list[Path]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if "path" not in (rows.fieldnames or ()):
                columns = ", ".join(map(str, rows.fieldnames or ())) or "none"
                raise DataError(f"The list {path} needs a column named path; its columns are {columns:.200}.")
            paths = [row["path"] for row in rows]
    except (OSError, UnicodeError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The list {path} cannot be read: {error}.") from error
    if not paths or not all(paths):
        raise DataError(f"The list {path} has {'a row without a path' if paths else 'no row'}.")
    return [path.parent / each for each in paths]


def batches(paths: Sequence[Path], preparation: Preparation, *, size: int) -> Iterator[Batch]:
    """Read images and arrays, at most ``size`` images at a time.

    Raises:
        DataError: an image that cannot be read, unless such are left out; images that do not fit the network.
    """
    names: list[str] = []
    images: list[Tensor] = []
    skipped: list[str] = []
    for path in paths:
        if path.suffix.lower() == ".npy":
            if names or skipped:
                yield _joined(names, images, skipped)
                names, images, skipped = [], [], []
            yield from _of_array(path, preparation, size=size)
            continue
        try:
            image = network_inputs([path], preparation.inputs, preparation.raw, preparation.network)
        except DataError as error:
            text = str(error).replace("Image 0 of those to predict", str(path))
            text = text.replace("data.on_error=skip", "--skip-bad")
            text = text.replace("An image of those to predict", str(path))
            if preparation.skips and str(path) in text:  # else no image can be prepared
                skipped.append(text)
                continue
            raise DataError(text) from error
        names.append(str(path))
        images.append(image)
        if len(names) == size:
            yield _joined(names, images, skipped)
            names, images, skipped = [], [], []
    if names or skipped:
        yield _joined(names, images, skipped)


def _joined(names: list[str], images: list[Tensor], skipped: list[str]) -> Batch:
    return Batch(names, torch.cat(images) if images else torch.empty(0), skipped)


def _of_array(path: Path, preparation: Preparation, *, size: int) -> Iterator[Batch]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"The array {path} cannot be read ({error!s:.200}); write it with numpy.save.") from error
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.dtype.kind not in "uif":
        raise DataError(f"The array {path} has to hold numbers (images, ...), not {getattr(array, 'dtype', 'others')}.")
    if not len(array):
        raise DataError(f"The array {path} has no image.")
    inputs, raw = preparation.inputs, preparation.raw
    for start in range(0, len(array), size):
        part = torch.from_numpy(np.array(array[start : start + size]))
        grey = part.ndim == 3 and raw is not None and len(raw.shape) == 3 and raw.shape[0] == 1
        if part.dtype == torch.uint8 and grey:  # (batch, height, width), as MNIST and scikit-learn have images
            part = part.unsqueeze(1)
        if part.is_floating_point() and inputs is not None and inputs.dtype.is_floating_point:
            part = part.to(inputs.dtype)
        try:
            images = network_inputs(part, inputs, raw, preparation.network)
        except DataError as error:
            raise DataError(f"{path}, images {start} to {start + len(part) - 1}: {error}") from error
        yield Batch([f"{path}[{start + place}]" for place in range(len(part))], images, [])
