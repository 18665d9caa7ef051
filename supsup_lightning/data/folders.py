"""Data sets of image files: a tree with one folder per class, or a table of paths and labels."""

import hashlib
import logging
from math import prod
from pathlib import Path

import torch

from supsup_lightning.data.images import Images, measure
from supsup_lightning.data.listing import (
    Listing,
    apart,
    class_order,
    each_once,
    half_named,
    hold_out,
    warn_of_alike,
)
from supsup_lightning.data.sources import Reading
from supsup_lightning.data.table import Line, located, read_table
from supsup_lightning.data.tree import folders_in, list_tree
from supsup_lightning.data.workers import ImageFiles, Workers, default_num_workers
from supsup_lightning.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)

_MOST_BYTES_IN_MEMORY = 2**30  # of ``in_memory=auto``, training and test images together
_IMAGES_AT_ONCE = 100


class _Files:
    """Data set of image files, given by a training and a test listing."""

    test_share: float
    resizes_files = True  # to `Reading.input_shape`, before they are normalised

    def __init__(self) -> None:
        self._listings: dict[Path, tuple[Listing, Listing]] = {}
        self._unread = 0
        self._stores: list[Workers] = []

    def listings(self, root: Path) -> tuple[Listing, Listing]:
        """Return the training and test files, listed once."""
        if root not in self._listings:
            self._listings[root] = self.list_files(root)
        return self._listings[root]

    def list_files(self, root: Path) -> tuple[Listing, Listing]:
        """List the training and test files. Raises `DataError`."""
        raise NotImplementedError

    def prepare(self, root: Path) -> None:
        """Check that the files exist; there is nothing to download."""
        self.listings(root)

    def num_classes(self, root: Path) -> int:
        """Number of classes in the training images."""
        return len(self.listings(root)[0].classes)

    def class_names(self, root: Path) -> list[str]:
        """Names of the classes in the order of their labels."""
        return self.listings(root)[0].classes

    def digest(self, root: Path) -> str:
        """SHA-256 of the images' paths, sizes, halves and classes (`Listing.digest`)."""
        halves = "".join(listing.digest(root) for listing in self.listings(root))
        return hashlib.sha256(halves.encode()).hexdigest()

    def num_skipped(self) -> int:
        """Number of missing and unreadable images in this process."""
        return self._unread + sum(len(store.skipped) for store in self._stores)

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """Return training and test images, in memory or read by workers, as ``reading`` says.

        Raises:
            ConfigurationError: no valid ``input_shape``, or random crops of images in memory.
            DataError: an image that cannot be read, unless ``on_error`` is ``skip``.
        """
        if reading.input_shape is None or len(reading.input_shape) != 3 or reading.input_shape[0] not in (1, 3):
            shape = None if reading.input_shape is None else list(reading.input_shape)
            raise ConfigurationError(
                f"data.input_shape={shape} must be [channels, height, width] with 1 or 3 channels: image files of any "
                "size are brought to it, [3, 64, 64] for example."
            )
        train, test = (self._existing(listing, reading.on_error) for listing in self.listings(root))
        in_memory = reading.in_memory
        if in_memory == "auto":
            size = prod(reading.input_shape) * (len(train.paths) + len(test.paths))
            in_memory = size <= _MOST_BYTES_IN_MEMORY and not reading.resized_crop
        if in_memory and reading.resized_crop:
            raise ConfigurationError(
                "data.augment=resized_crop takes its crops from the files; set data.in_memory=false with it, or use "
                "data.augment=crop_flip."
            )
        if in_memory:
            train_images, test_images = self._in_memory(train, reading), self._in_memory(test, reading)
            mean, std = train_images.mean, train_images.std
        else:
            train_images, test_images = self._by_workers(train, reading), self._by_workers(test, reading)
            mean, std = measure(train_images)
        return (
            Images.of(train_images.store, train_images.labels, mean=mean, std=std),
            Images.of(test_images.store, test_images.labels, mean=mean, std=std),
        )

    def _existing(self, listing: Listing, on_error: str) -> Listing:
        missing = [path for path, size in zip(listing.paths, listing.sizes, strict=True) if size is None]
        if not missing:
            return listing
        what = f"{len(missing)} image{'s are' if len(missing) > 1 else ' is'} missing, {missing[0]} first."
        if on_error == "raise":
            raise DataError(f"{what} Put it there, or leave missing images out with data.on_error=skip.")
        logger.warning("%s Missing images are skipped.", what)
        self._unread += len(missing)
        return listing.select(number for number, size in enumerate(listing.sizes) if size is not None)

    def _by_workers(self, listing: Listing, reading: Reading) -> Images:
        store = _store(listing, reading)
        self._stores.append(store)
        return Images.of(store, torch.tensor(listing.labels))

    def _in_memory(self, listing: Listing, reading: Reading) -> Images:
        store = _store(listing, reading)
        everything = torch.arange(len(listing.paths))
        batches = [everything[start : start + _IMAGES_AT_ONCE] for start in range(0, len(everything), _IMAGES_AT_ONCE)]
        pixels, kept = [], []
        for batch, positions in zip(
            store.batches(batches, seeds=None, device=torch.device("cpu")), batches, strict=True
        ):
            pixels.append(batch.pixels)
            kept.append(positions if batch.kept is None else positions[batch.kept])
        self._unread += len(store.skipped)
        return Images.in_memory(torch.cat(pixels), torch.tensor(listing.labels)[torch.cat(kept)])


def _store(listing: Listing, reading: Reading) -> Workers:
    assert reading.input_shape is not None
    files = ImageFiles(listing.paths, reading.input_shape, resized_crop=reading.resized_crop)
    workers = default_num_workers() if reading.num_workers is None else reading.num_workers
    return Workers(files, shape=reading.input_shape, num_workers=workers, on_error=reading.on_error)


class ImageFolder(_Files):
    """Tree with one folder per class and images at any depth in it, as in torchvision's ``ImageFolder``.

    A folder ``train`` and one named ``test`` or ``val`` are the halves, if the tree has them. Upper case and names such
    as ``training`` and ``test_set`` count as well. If there are both ``test`` and ``val``, ``test`` is taken, provided
    that it has one folder per class. Otherwise a share of the images (of ``train``, if there is only that) is held out
    for the test, the same at every start. Hidden files and folders are left out.

    Args:
        folder: folder of the tree, below ``data.root``, or an absolute path.
        test_share: share of the images held out for the test, if the tree has no halves.
    """

    def __init__(self, folder: str | Path = "", *, test_share: float = 0.2) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.test_share = _checked_share(test_share)

    def list_files(self, root: Path) -> tuple[Listing, Listing]:
        """List the tree. The listing is cached, and used again as long as no folder has changed."""
        folder = root / self.folder
        if not folder.is_dir():
            raise DataError(
                f"The folder {folder} does not exist; set data.root to one with one folder of images per class."
            )
        train_folder, test_folder = _halves_in(folder)
        if test_folder is None:
            whole = train_folder or folder
            return hold_out(list_tree(whole), self.test_share, whole)
        if train_folder is None:
            raise DataError(
                f"{folder} has the folder {test_folder.name}, but none named train; add it, or point data.root to "
                "the folders of the classes."
            )
        train, test = list_tree(train_folder), list_tree(test_folder)
        unknown = set(test.classes) - set(train.classes)
        if unknown:
            raise DataError(f"{test_folder} has the class {min(unknown)}, which {train_folder} has not.")
        labels = [train.classes.index(test.classes[label]) for label in test.labels]
        return apart(train, test._replace(classes=train.classes, labels=labels), folder)


def _halves_in(folder: Path) -> tuple[Path | None, Path | None]:
    """Return the folders of training and test images, None if absent; log folders that are not used."""
    names = folders_in(folder)
    halves = {name: half for name in names if (half := half_named(name))}
    classes = {name: set(folders_in(_inner(folder / name))) for name in halves}
    if list(halves.values()) == ["train"] and len(names) > 1 and not any(classes.values()):
        return None, None  # a class named train, among vehicles say
    trains = [name for name, half in halves.items() if half == "train"]
    train = min(trains, key=lambda name: (name != name.lower(), name), default=None)
    trained = set() if train is None else classes[train]

    def rank(name: str) -> tuple[object, ...]:
        """Sort key: folders with a trained class first, as `test` often has no labels; then `test` before `val`."""
        return not classes[name] & trained, halves[name] == "val", name != name.lower(), name

    test = min(halves.keys() - trains, key=rank, default=None)
    if test is not None and trained and not classes[test]:
        test = None
    unused = [name for name in names if halves and name not in (train, test)]
    if unused:
        taken = f"a share of {train}" if test is None else test
        logger.warning("%s: tests take the images of %s; %s is not used.", folder, taken, ", ".join(unused))
    return (None if train is None else _inner(folder / train)), (None if test is None else _inner(folder / test))


def _inner(half: Path) -> Path:
    """Return the only folder inside ``half`` if it has the same name, as archives make it; else ``half``."""
    names = folders_in(half)
    return half / names[0] if names == [half.name] else half


class ImageCSV(_Files):
    """Table with one image path and its label per line, under a header line.

    Labels are taken as written, without surrounding spaces: 1 and 01 are different classes. A column that says
    ``train`` or ``test`` (or ``val``) in each line makes the halves. If some lines say ``test``, those that say ``val``
    are left out. Without such a column, a share of the images is held out for the test, the same at every start.

    Args:
        file: the table, below ``data.root``; paths in it are relative to its folder.
        path_column: name of the column of paths.
        label_column: name of the column of labels.
        split_column: name of the column of halves; None to use none. The default, ``split``, may be absent.
        test_share: share of the images held out for the test, if the table has no such column.
    """

    def __init__(
        self,
        file: str | Path = "labels.csv",
        *,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str | None = "split",
        test_share: float = 0.2,
    ) -> None:
        super().__init__()
        self.file = Path(file)
        self.path_column = path_column
        self.label_column = label_column
        self.split_column = split_column
        self.test_share = _checked_share(test_share)

    def list_files(self, root: Path) -> tuple[Listing, Listing]:
        """Return the training and test images of the table. Raises `DataError`."""
        path = root / self.file
        table = read_table(
            path, path_column=self.path_column, label_column=self.label_column, split_column=self.split_column
        )
        if not table.has_halves:
            for name, cells in table.others.items():
                if self.split_column is not None and cells and all(map(half_named, cells)):
                    logger.warning(
                        "The column %s of %s names halves, but is not used; data.stream.source.split_column=%s would "
                        "take it.",
                        *(name, path, name),
                    )
            return hold_out(each_once(_listed(table.lines, path).ordered(), path), self.test_share, path)
        halves = [half_named(line.half) for line in table.lines]
        for line, half in zip(table.lines, halves, strict=True):
            if half is None:
                raise DataError(
                    f"The column {self.split_column} of {path} says {line.half!r} in line {line.number}; it may say "
                    "train or test, or val."
                )
        tested = "test" if "test" in halves else "val"
        unused = sum(half not in ("train", tested) for half in halves)
        if unused:
            logger.warning("Tests take the lines of %s that say test; %d that say val are not used.", path, unused)
        used = [(line, half) for line, half in zip(table.lines, halves, strict=True) if half in ("train", tested)]
        everything = _listed([line for line, _ in used], path)
        train = everything.select(number for number, (_, half) in enumerate(used) if half == "train")
        test = everything.select(number for number, (_, half) in enumerate(used) if half != "train")
        return apart(each_once(train, path), each_once(test, path), path)


def _listed(lines: list[Line], table: Path) -> Listing:
    """Return the images of these lines. Raises `DataError` if labels are numbers, but not integers."""
    names = {line.label for line in lines}
    if all(map(_is_number, names)) and (fractional := sorted(name for name in names if not float(name).is_integer())):
        raise DataError(f"The table {table} has the label {fractional[0]}; labels are words or integers.")
    classes = class_order(names)
    warn_of_alike(classes, table)
    number = {name: place for place, name in enumerate(classes)}
    paths = [located(table.parent, line.path) for line in lines]
    return Listing.of(classes, paths, [number[line.label] for line in lines])


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _checked_share(share: float) -> float:
    if not 0 < share < 1:
        raise ConfigurationError(f"test_share={share} of a folder of images must lie between 0 and 1.")
    return share
