"""Listings of image files and their classes, and their division into a training and a test half."""

import hashlib
import json
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from supsup_lightning.errors import DataError
from supsup_lightning.seeding import generator

logger = logging.getLogger(__name__)

# Limits of the search for copies, which reads at each start the files whose size occurs in both halves.
_MOST_COMPARED, _MOST_BYTES_COMPARED = 20_000, 2**29
_HALF = re.compile(r"(?:(train|training)|(test|testing)|(val|valid|validation))[ _-]?(?:set|images|imgs|data)?")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?")


class Listing(NamedTuple):
    """Image files and their classes. Made by `Listing.of`.

    Attributes:
        classes: names of the classes.
        paths: paths of the images.
        labels: index in ``classes`` for each path.
        files: file for each path, with links resolved.
        sizes: size of each file in bytes; None if it is missing.
    """

    classes: list[str]
    paths: list[Path]
    labels: list[int]
    files: list[str]
    sizes: list[int | None]

    @classmethod
    def of(cls, classes: list[str], paths: list[Path], labels: list[int]) -> "Listing":
        """Make a listing. Each path is looked up once: there may be a million of them, on a slow file system."""
        real_folder = cache(lambda folder: os.path.join(os.path.realpath(folder), ""))
        files: list[str] = []
        sizes: list[int | None] = []
        for path in map(str, paths):
            name = path.rfind(os.sep) + 1
            file = real_folder(path[:name]) + path[name:]
            try:
                status = os.lstat(path)
                if stat.S_ISLNK(status.st_mode):
                    file = os.path.realpath(path)
                    status = os.stat(path)
                size = status.st_size if stat.S_ISREG(status.st_mode) else None
            except OSError:
                size = None
            files.append(file)
            sizes.append(size)
        return cls(classes, paths, labels, files, sizes)

    def digest(self, folder: Path) -> str:
        """SHA-256 of the class names, and of each file's path below ``folder``, its label and its size in bytes.

        It does not depend on where the folder is. It changes if an image is added, removed, renamed, relabelled, or
        replaced by one of another size.
        """
        below = cache(lambda directory: Path(os.path.relpath(directory or ".", folder)).as_posix())
        hashed = hashlib.sha256(json.dumps(self.classes).encode())
        for path, label, size in zip(map(str, self.paths), self.labels, self.sizes, strict=True):
            directory, name = os.path.split(path)
            hashed.update(os.fsencode(f"{below(directory)}/{name}\0{label} {size}\0"))
        return hashed.hexdigest()

    def select(self, numbers: Iterable[int]) -> "Listing":
        """Return the images with these numbers."""
        numbers = list(numbers)
        chosen: Any = ([column[n] for n in numbers] for column in self[1:])
        return Listing(self.classes, *chosen)

    def ordered(self) -> "Listing":
        """Return the listing sorted by class, folder and name, as trees are listed."""
        names = [os.path.split(os.path.normpath(path)) for path in self.paths]
        return self.select(sorted(range(len(names)), key=lambda number: (self.labels[number], names[number])))


def half_named(name: str) -> str | None:
    """Return ``train``, ``test`` or ``val`` for the name of a half in any case or spelling; None for other names.

    >>> [half_named(name) for name in ("Training", "TEST", "valid", "test_images", "train station")]
    ['train', 'test', 'val', 'test', None]
    """
    match = _HALF.fullmatch(name.strip().casefold())
    return match and ("train", "test", "val")[match.lastindex - 1]  # type: ignore[operator]


def class_order(names: Iterable[str]) -> list[str]:
    """Return the distinct names, sorted by value if all are integers, otherwise alphabetically.

    >>> class_order(["10", "9", "9"]), class_order(["cat10", "cat9"])
    (['9', '10'], ['cat10', 'cat9'])
    """
    names = set(names)
    if all(map(_WHOLE_NUMBER.fullmatch, names)):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


def warn_of_alike(classes: Sequence[str], place: Path) -> None:
    """Log class names that differ in their spelling alone, such as ``1`` and ``01``, or ``Cat`` and ``cat``."""
    seen: dict[object, str] = {}
    for name in classes:
        word = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        meaning = float(name) if _WHOLE_NUMBER.fullmatch(name) else word
        other = seen.setdefault(meaning, name)
        if other != name:
            logger.warning("%s: %r and %r are taken for different classes.", place, other, name)


def hold_out(listing: Listing, share: float, place: Path) -> tuple[Listing, Listing]:
    """Hold out a share of each class for the test; return the training and the test half.

    The held-out images do not depend on the seed of a run. Copies of a held-out image are held out as well, as long as
    an image of their class is left for training.

    Raises:
        DataError: a class of one image.
    """
    test: list[int] = []
    labels = torch.tensor(listing.labels)
    for label in range(len(listing.classes)):
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(
                f"{place}: the class {listing.classes[label]} has one image, too few for training and test. "
                "Add some, or leave the class out."
            )
        order = torch.randperm(len(members), generator=generator(0, "test", label))
        test += members[order[: max(1, round(len(members) * share))]].tolist()
    held = set(test)
    train = [number for number in range(len(labels)) if number not in held]
    copies = {train[one]: test[other] for one, other in _copies(listing.select(train), listing.select(test)).items()}
    alike = [number for number, other in copies.items() if listing.labels[number] == listing.labels[other]]
    left = {listing.labels[number] for number in set(train).difference(alike)}
    moved = [number for number in alike if listing.labels[number] in left]
    if moved:
        logger.warning(
            "%s: copies of images that are held out for the test are held out as well: %d, first %s.",
            *(place, len(moved), listing.paths[moved[0]]),
        )
        held.update(moved)
    _warn_of_copies([(listing.paths[n], listing.paths[other]) for n, other in copies.items() if n not in held])
    train = [number for number in train if number not in held]
    return _both(listing.select(train), listing.select(sorted(held)), place)


def each_once(listing: Listing, place: Path) -> Listing:
    """Return the listing with each file once, however many links lead to it.

    Raises:
        DataError: a file with two classes.
    """
    first: dict[str, int] = {}
    repeated = []
    for number, file in enumerate(listing.files):
        other = first.setdefault(file, number)
        if other == number:
            continue
        if listing.labels[other] != listing.labels[number]:
            one, two = (listing.classes[listing.labels[n]] for n in (other, number))
            raise DataError(
                f"{place}: the image {listing.paths[number]} is listed twice, as {one} and as {two}"
                + _as_well(listing.paths[other], listing.paths[number])
                + ". Remove it from one of them."
            )
        repeated.append(number)
    if not repeated:
        return listing
    logger.warning(
        "%s lists images more than once; repetitions left out: %d, first %s.",
        *(place, len(repeated), listing.paths[repeated[0]]),
    )
    return listing.select(first.values())


def apart(train: Listing, test: Listing, place: Path) -> tuple[Listing, Listing]:
    """Check that the halves are disjoint, and warn of copies.

    Raises:
        DataError: a half without images, or a file in both halves.
    """
    training = dict(zip(train.files, train.paths, strict=True))
    for path, file in zip(test.paths, test.files, strict=True):
        if file in training:
            raise DataError(
                f"{place}: the image {path} is for training and for the test{_as_well(training[file], path)}. "
                "Remove it from one of them."
            )
    _warn_of_copies([(train.paths[one], test.paths[other]) for one, other in _copies(train, test).items()])
    return _both(train, test, place)


def _both(train: Listing, test: Listing, place: Path) -> tuple[Listing, Listing]:
    if not train.paths or not test.paths:
        raise DataError(f"{place} leaves no images for training or none for the test.")
    return train, test


def _warn_of_copies(copies: list[tuple[Path, Path]]) -> None:
    if copies:
        logger.warning(
            "Training images that are copies of test images, byte by byte: %d, first %s (%s).",
            *(len(copies), *copies[0]),
        )


def _copies(train: Listing, test: Listing) -> dict[int, int]:
    """Map training images that are copies of test images to those, by index; empty for large data sets."""
    halves = train, test
    shared = {*train.sizes} & {*test.sizes} - {0, None}
    candidates = [[place for place, size in enumerate(half.sizes) if size in shared] for half in halves]
    number = sum(map(len, candidates))
    total = sum(half.sizes[place] or 0 for half, places in zip(halves, candidates, strict=True) for place in places)
    if number > _MOST_COMPARED or total > _MOST_BYTES_COMPARED:
        logger.info(
            "Copies of test images among those of training are not looked for: %d files (%.1f GB) would be read.",
            *(number, total / 2**30),
        )
        return {}
    contents = {_content(test.paths[place]): place for place in candidates[1]}
    found = {place: contents.get(_content(train.paths[place])) for place in candidates[0]}
    return {place: other for place, other in found.items() if other is not None}


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:  # unreadable; loading the image reports it
        return os.fsencode(path)


def _as_well(one: Path, two: Path) -> str:
    return "" if one == two else f" ({one} is the same file)"
