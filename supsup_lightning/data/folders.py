"""Data sets of image files: a tree with a folder a class, or a table of path and label."""

import csv
import hashlib
import logging
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from supsup_lightning.data.images import Images, measure
from supsup_lightning.data.listing import Listing, chosen, hold_out, list_tree
from supsup_lightning.data.sources import Reading
from supsup_lightning.data.workers import ImageFiles, Workers, default_num_workers
from supsup_lightning.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)

_MOST_BYTES_IN_MEMORY = 2**30  # of ``in_memory=auto``, training and test images together
_IMAGES_AT_ONCE = 100
_TRAIN_FOLDERS = ("train", "training")
_TEST_FOLDERS = ("val", "test", "valid", "validation", "testing")


class _Files:
    """What both kinds have in common: two listings, and how they become images."""

    test_share: float

    def __init__(self) -> None:
        self._listings: dict[Path, tuple[Listing, Listing]] = {}
        self._unread = 0
        self._stores: list[Workers] = []

    def listings(self, root: Path) -> tuple[Listing, Listing]:
        """Training and test files, listed once."""
        if root not in self._listings:
            self._listings[root] = self.list_files(root)
        return self._listings[root]

    def list_files(self, root: Path) -> tuple[Listing, Listing]:
        """Training and test files. Raises `DataError`."""
        raise NotImplementedError

    def prepare(self, root: Path) -> None:
        """Nothing to download; see that the files are there."""
        self.listings(root)

    def num_classes(self, root: Path) -> int:
        """Of the training images."""
        return len(self.listings(root)[0].classes)

    def class_names(self, root: Path) -> list[str]:
        """In the order of their numbers."""
        return self.listings(root)[0].classes

    def digest(self, root: Path) -> str:
        """SHA-256 of which images there are, in which half and of which class (`Listing.digest`)."""
        halves = "".join(listing.digest(root) for listing in self.listings(root))
        return hashlib.sha256(halves.encode()).hexdigest()

    def num_skipped(self) -> int:
        """Missing and unreadable ones, in this process."""
        return self._unread + sum(len(store.skipped) for store in self._stores)

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        """In memory or read by workers, as ``reading`` says.

        Raises:
            ConfigurationError: no size to bring images to, or random crops of images in memory.
            DataError: an image that cannot be read, unless it is to be skipped.
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
        missing = [path for path in listing.paths if not path.is_file()]
        if not missing:
            return listing
        what = f"{len(missing)} image{'s are' if len(missing) > 1 else ' is'} missing, {missing[0]} first."
        if on_error == "raise":
            raise DataError(f"{what} Put it there, or leave missing images out with data.on_error=skip.")
        logger.warning("%s Missing images are skipped.", what)
        self._unread += len(missing)
        absent = set(missing)
        kept = [(path, label) for path, label in zip(listing.paths, listing.labels, strict=True) if path not in absent]
        return Listing(listing.classes, [path for path, _ in kept], [label for _, label in kept])

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
    """A folder a class, with images at any depth in it, as torchvision's ``ImageFolder``.

    If the tree has a folder ``train`` and one named ``val`` or ``test``, these are the halves. Otherwise a share of the
    images (of ``train``, if there is only that), the same at every start, is kept for the test.

    Args:
        folder: of the tree, below ``data.root``; any other if it is an absolute path.
        test_share: of the images, where the tree has no halves of its own.
    """

    def __init__(self, folder: str | Path = "", *, test_share: float = 0.2) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.test_share = _checked_share(test_share)

    def list_files(self, root: Path) -> tuple[Listing, Listing]:
        """By the tree; what was listed once is remembered, and checked by the folders' times."""
        folder = root / self.folder
        if not folder.is_dir():
            raise DataError(
                f"The folder {folder} does not exist; set data.root to one with a folder of images a class."
            )
        train_folder = next((folder / name for name in _TRAIN_FOLDERS if (folder / name).is_dir()), None)
        test_folders = [folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()]
        if train_folder is None and test_folders:
            raise DataError(
                f"{folder} has the folder {test_folders[0].name}, but none named train; add it, or point data.root to "
                "the folders of the classes."
            )
        if train_folder is None or not test_folders:
            whole = train_folder or folder
            return hold_out(list_tree(whole), self.test_share, whole)
        test_folder, *others = test_folders
        if others:
            logger.warning("Tests take the images of %s; %s is not used.", test_folder, others[0])
        train, test = list_tree(train_folder), list_tree(test_folder)
        unknown = set(test.classes) - set(train.classes)
        if unknown:
            raise DataError(f"{test_folder} has the class {min(unknown)}, which {train_folder} has not.")
        labels = [train.classes.index(test.classes[label]) for label in test.labels]
        return train, Listing(train.classes, test.paths, labels)


class ImageCSV(_Files):
    """A table with the path of an image and its label in each line, under a line with the columns' names.

    Labels may be words or whole numbers. If there is a column that says ``train`` or ``test`` (or ``val``), it makes
    the halves. Otherwise a share of the images, the same at every start, is kept for the test.

    Args:
        file: the table, below ``data.root``; paths in it are relative to its folder.
        path_column: name of the column of paths.
        label_column: name of the column of labels.
        split_column: name of the column of halves; it may be absent.
        test_share: of the images, where the table has no such column.
    """

    def __init__(
        self,
        file: str | Path = "labels.csv",
        *,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str = "split",
        test_share: float = 0.2,
    ) -> None:
        super().__init__()
        self.file = Path(file)
        self.path_column = path_column
        self.label_column = label_column
        self.split_column = split_column
        self.test_share = _checked_share(test_share)

    def list_files(self, root: Path) -> tuple[Listing, Listing]:
        """Line by line."""
        table = root / self.file
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                columns, lines = list(reader.fieldnames or ()), list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"The table {table} cannot be read ({error}); check data.root and its name.") from error
        for column in (self.path_column, self.label_column):
            if column not in columns:
                raise DataError(f"The table {table} has no column {column!r}; it has {', '.join(columns) or 'none'}.")
        for number, line in enumerate(lines, start=2):
            for column in (self.path_column, self.label_column):
                if not line[column]:
                    raise DataError(f"Line {number} of {table} has no {column}.")
        labels = [line[self.label_column].strip() for line in lines]
        names, place = _classes_of(labels, table)
        paths = [table.parent / line[self.path_column] for line in lines]
        everything = Listing(names, paths, [place[label] for label in labels])
        if self.split_column not in columns:
            return hold_out(everything, self.test_share, table)
        halves = [line[self.split_column] for line in lines]
        unknown = next((half for half in halves if half not in ("train", *_TEST_FOLDERS)), None)
        if unknown is not None:
            raise DataError(f"The column {self.split_column} of {table} says {unknown!r}; it may say train or test.")
        train = [number for number, half in enumerate(halves) if half == "train"]
        test = [number for number, half in enumerate(halves) if half != "train"]
        return chosen(everything, train, table), chosen(everything, test, table)


def _checked_share(share: float) -> float:
    if not 0 < share < 1:
        raise ConfigurationError(f"test_share={share} of a folder of images must lie between 0 and 1.")
    return share


def _classes_of(labels: Sequence[str], table: Path) -> tuple[list[str], dict[str, int]]:
    """Names of the classes, and the number of the class that each label means; 1 and 01 mean the same.

    Raises:
        DataError: labels that are numbers, but not whole.
    """
    try:
        values = {label: float(label) for label in labels}
    except ValueError:  # words
        names = sorted(set(labels))
        return names, {name: number for number, name in enumerate(names)}
    fractional = next((label for label, value in values.items() if not value.is_integer()), None)
    if fractional is not None:
        raise DataError(f"The table {table} has the label {fractional}; labels are words or whole numbers.")
    order = sorted({int(value) for value in values.values()})
    return [str(value) for value in order], {label: order.index(int(value)) for label, value in values.items()}
