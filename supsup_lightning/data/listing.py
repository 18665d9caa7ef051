"""Which image files there are, and of which class: listed once, and remembered until a folder changes."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from supsup_lightning.errors import DataError
from supsup_lightning.files import replacing
from supsup_lightning.seeding import generator

logger = logging.getLogger(__name__)


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
            size = os.stat(path).st_size if path.is_file() else None
            name = Path(os.path.relpath(path, folder)).as_posix()
            hashed.update(json.dumps([name, label, size]).encode())
        return hashed.hexdigest()


def hold_out(listing: Listing, share: float, place: Path) -> tuple[Listing, Listing]:
    """A share of each class is kept for the test; the same whatever the seed of a run."""
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
    return chosen(listing, train, place), chosen(listing, sorted(test), place)


def chosen(listing: Listing, numbers: Sequence[int], place: Path) -> Listing:
    """Some lines of a listing. Raises `DataError` if they are none."""
    if not numbers:
        raise DataError(f"{place} leaves no images for training or none for the test.")
    return Listing(listing.classes, [listing.paths[n] for n in numbers], [listing.labels[n] for n in numbers])


@dataclass
class _Tree:
    """A listing as it is cached: the directories seen with their times of change, and the files of each class."""

    times: dict[str, int] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)


def list_tree(folder: Path) -> Listing:
    """The images of a tree with a folder a class, from the cache if nothing has changed. Raises `DataError`."""
    tree = _cached_tree(folder)
    if not tree.files:
        raise DataError(f"{folder} has no folders; images are expected in a folder a class: {folder}/<class>/<image>.")
    for name, files in tree.files.items():
        if not files:
            raise DataError(
                f"The class folder {folder / name} has no images ({', '.join(IMG_EXTENSIONS)}); remove it or fill it."
            )
    classes = sorted(tree.files)
    paths = [folder / name for label in classes for name in tree.files[label]]
    return Listing(classes, paths, [number for number, label in enumerate(classes) for _ in tree.files[label]])


def _cached_tree(folder: Path) -> _Tree:
    """The tree from the cache, if no directory of it has changed since, or else listed and put there."""
    folder = folder.resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "supsup_lightning" / f"listing-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
    try:
        tree = _Tree(**json.loads(cache.read_text()))
        if tree.times and all(os.stat(directory).st_mtime_ns == time for directory, time in tree.times.items()):
            return tree
    except (OSError, ValueError, TypeError) as error:
        logger.debug("No listing of %s to use in %s: %s", folder, cache, error)
    tree = _walk(folder)
    try:
        with replacing(cache) as temporary:
            temporary.write_text(json.dumps(tree.__dict__))
    except OSError as error:
        logger.warning("The listing of %s cannot be kept for the next start: %s", folder, error)
    return tree


def _walk(folder: Path) -> _Tree:
    tree = _Tree(times={str(folder): folder.stat().st_mtime_ns})
    for label in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."):
        tree.files[label] = []
        for directory, _, names in sorted(os.walk(folder / label, followlinks=True)):
            tree.times[directory] = os.stat(directory).st_mtime_ns
            images = sorted(name for name in names if name.lower().endswith(IMG_EXTENSIONS))
            tree.files[label] += [os.path.relpath(os.path.join(directory, name), folder) for name in images]
    return tree
