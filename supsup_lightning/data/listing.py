"""Image files and their classes: the order of classes, the names of halves, and what keeps the halves apart."""

import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from supsup_lightning.errors import DataError
from supsup_lightning.seeding import generator

logger = logging.getLogger(__name__)

_MOST_BYTES_COMPARED = 2**30  # of training and test files of the same size, to find copies
_HALF = re.compile(r"(?:(train|training)|(test|testing)|(val|valid|validation))[ _-]?(?:set|images|imgs|data)?")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?")


class Listing(NamedTuple):
    """Image files and the place of each one's class in `classes`."""

    classes: list[str]
    paths: list[Path]
    labels: list[int]

    def digest(self, folder: Path) -> str:
        """SHA-256 of the class names, and of each file's path below ``folder``, its label and its size in bytes.

        The same wherever the folder lies; another if an image is added, removed, renamed, relabelled, or replaced by
        one of another size. A file that is missing has no size.
        """
        hashed = hashlib.sha256(json.dumps(self.classes).encode())
        for path, label in zip(self.paths, self.labels, strict=True):
            size = os.path.getsize(path) if os.path.isfile(path) else None
            name = Path(os.path.relpath(path, folder)).as_posix()
            hashed.update(json.dumps([name, label, size]).encode())
        return hashed.hexdigest()

    def select(self, numbers: Iterable[int]) -> "Listing":
        """Some lines of it."""
        numbers = list(numbers)
        return Listing(self.classes, [self.paths[n] for n in numbers], [self.labels[n] for n in numbers])


def half_named(name: str) -> str | None:
    """``train``, ``test`` or ``val`` for the name of a half in any case and of any length; None for other names.

    >>> [half_named(name) for name in ("Training", "TEST", "valid", "test_images", "train station")]
    ['train', 'test', 'val', 'test', None]
    """
    match = _HALF.fullmatch(name.strip().casefold())
    return match and ("train", "test", "val")[match.lastindex - 1]  # type: ignore[operator]


def class_order(names: Iterable[str]) -> list[str]:
    """The names once each: by value if all of them are whole numbers, otherwise in the order of their letters.

    >>> class_order(["10", "9", "9"]), class_order(["cat10", "cat9"])
    (['9', '10'], ['cat10', 'cat9'])
    """
    names = set(names)
    if all(map(_WHOLE_NUMBER.fullmatch, names)):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


def warn_of_alike(classes: Sequence[str], place: Path) -> None:
    """Say which names of classes differ in their writing alone, as ``1`` and ``01`` or ``Cat`` and ``cat`` do."""
    seen: dict[object, str] = {}
    for name in classes:
        word = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        meaning = float(name) if _WHOLE_NUMBER.fullmatch(name) else word
        other = seen.setdefault(meaning, name)
        if other != name:
            logger.warning("%s: %r and %r are taken for different classes.", place, other, name)


def hold_out(listing: Listing, share: float, place: Path) -> tuple[Listing, Listing]:
    """A share of each class is kept for the test.

    The same images whatever the seed of a run, and whatever the order in which they are listed. Copies of a held-out
    image are held out as well, as long as an image of their class is left for training.

    Raises:
        DataError: a class of one image.
    """
    names = [os.path.split(os.path.normpath(path)) for path in listing.paths]
    listing = listing.select(sorted(range(len(names)), key=lambda number: (listing.labels[number], names[number])))
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
    found = _copies(listing.select(train), listing.select(test))
    copies = [train[place] for place, other in found.items() if listing.labels[train[place]] == labels[test[other]]]
    left = {listing.labels[number] for number in set(train).difference(copies)}
    if moved := [number for number in copies if listing.labels[number] in left]:
        logger.warning(
            "%s: copies of images that are held out for the test are held out as well: %d, first %s.",
            *(place, len(moved), listing.paths[moved[0]]),
        )
        held.update(moved)
        train = [number for number in train if number not in held]
    return _both(listing.select(train), listing.select(sorted(held)), place)


def each_once(listing: Listing, place: Path) -> Listing:
    """The listing with each file in it once, by whatever links it is reached.

    Raises:
        DataError: a file of two classes.
    """
    first: dict[str, int] = {}
    repeated = []
    for number, file in enumerate(_real_paths(listing.paths)):
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
    """Both halves. Raises `DataError` if one has no image, or if a file is in both."""
    training = dict(zip(_real_paths(train.paths), train.paths, strict=True))
    for path, file in zip(test.paths, _real_paths(test.paths), strict=True):
        if file in training:
            raise DataError(
                f"{place}: the image {path} is for training and for the test{_as_well(training[file], path)}. "
                "Remove it from one of them."
            )
    return _both(train, test, place)


def _both(train: Listing, test: Listing, place: Path) -> tuple[Listing, Listing]:
    if not train.paths or not test.paths:
        raise DataError(f"{place} leaves no images for training or none for the test.")
    return train, test


def warn_of_copies(train: Listing, test: Listing) -> None:
    """Say how many training images are, byte by byte, the same as a test image."""
    if copies := _copies(train, test):
        place, other = next(iter(copies.items()))
        logger.warning(
            "Training images that are copies of test images, byte by byte: %d, first %s (%s).",
            *(len(copies), train.paths[place], test.paths[other]),
        )


def _copies(train: Listing, test: Listing) -> dict[int, int]:
    """Places of training images that are copies of test images, and the places of these."""
    sizes = [[os.path.getsize(path) if os.path.isfile(path) else 0 for path in half.paths] for half in (train, test)]
    shared = {*sizes[0]} & {*sizes[1]} - {0}
    candidates = [[place for place, size in enumerate(half) if size in shared] for half in sizes]
    total = sum(half[place] for half, places in zip(sizes, candidates, strict=True) for place in places)
    if total > _MOST_BYTES_COMPARED:
        logger.info("Training and test images are not searched for copies: %.1f GB are too much.", total / 2**30)
        return {}
    contents = {_content(test.paths[place]): place for place in candidates[1]}
    found = {place: contents.get(_content(train.paths[place])) for place in candidates[0]}
    return {place: other for place, other in found.items() if other is not None}


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:  # not to be read, as will be said when it is
        return os.fsencode(path)


def _as_well(one: Path, two: Path) -> str:
    return "" if one == two else f" ({one} is the same file)"


def _real_paths(paths: Iterable[Path]) -> Iterable[str]:
    """Each path without links; a folder is looked up once, as a data set has many files in few folders."""
    real_folder = cache(os.path.realpath)
    for path in map(str, paths):
        folder, name = os.path.split(path)
        yield os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(folder), name)
