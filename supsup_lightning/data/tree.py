"""Listing of a tree with one folder per class, cached until a folder changes."""

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from supsup_lightning.data.listing import Listing, class_order, each_once, half_named, warn_of_alike
from supsup_lightning.errors import DataError
from supsup_lightning.files import replacing

logger = logging.getLogger(__name__)

# Raise the number when the rules of listing change: listings cached under older rules are not used.
_RULES = ["2", *IMG_EXTENSIONS]
_CLOCK_TICK = 2 * 10**9  # ns; FAT has the coarsest times. A folder changed more recently may change again unnoticed.
_SERVICE_FOLDERS = (  # of archives, servers and desktops; besides those that begin with a dot
    *("__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found", "system volume information"),
)
_OTHER_IMAGES = (".gif", ".avif", ".heic", ".jfif", ".jpe", ".jp2", ".tga")
_MOST_NAMED = 10
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")  # words in seg_train, imagesTrain


@dataclass
class _Tree:
    """Listing of a tree, as cached.

    Attributes:
        stamps: device, inode, and times of the last changes of each folder.
        files: paths of each class's files, relative to the tree's folder.
        left_out: files and folders that were left out, with the reason.
    """

    stamps: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Whether a name begins with a dot, or belongs to a folder that systems create for themselves.

    >>> is_hidden(".ipynb_checkpoints"), is_hidden("__MACOSX"), is_hidden("cat")
    (True, True, False)
    """
    return name.startswith(".") or name.casefold() in _SERVICE_FOLDERS


def folders_in(folder: Path) -> list[str]:
    """Return the names of a folder's subfolders without hidden ones. Raises `DataError` if it cannot be listed."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not is_hidden(entry.name) and _is_folder(entry))
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be listed ({error}); check its permissions.") from error


def list_tree(folder: Path) -> Listing:
    """Return the images of a tree with one folder per class, from the cache if nothing changed.

    Raises:
        DataError: a folder that cannot be listed, no folders, a class without images, or halves taken for classes.
    """
    tree = _cached_tree(folder)
    if not tree.files:
        raise DataError(f"{folder} has no folders; images must be in one folder per class: {folder}/<class>/<image>.")
    for name, files in tree.files.items():
        if not files:
            raise DataError(
                f"The class folder {folder / name} has no images ({', '.join(IMG_EXTENSIONS)}); remove it or fill it."
            )
    if tree.left_out:
        more = len(tree.left_out) - _MOST_NAMED
        named = ", ".join(tree.left_out[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        logger.warning("Not taken from %s: %s.", folder, named)
    classes = class_order(tree.files)
    warn_of_alike(classes, folder)
    _check_layout(tree, folder)
    paths = [folder / name for label in classes for name in tree.files[label]]
    labels = [number for number, label in enumerate(classes) for _ in tree.files[label]]
    return each_once(Listing.of(classes, paths, labels), folder)


def _check_layout(tree: _Tree, folder: Path) -> None:
    """Raise `DataError` if halves would be taken for classes or mixed in them; warn of unclear layouts."""
    below = {label: [name.split(os.sep)[1:-1] for name in files] for label, files in tree.files.items()}
    deep = [label for label, folders in below.items() if all(folders)]
    words = {label: {half_named(word) for word in _WORD.findall(label)} - {None} for label in deep}
    halves = [label for label in deep if words[label]]
    if len(halves) > 1 and {"train"} < set().union(*words.values()):
        raise DataError(
            f"The folders {' and '.join(halves)} of {folder} would be taken for classes; if they are halves, name them "
            "train and test, each with one folder per class directly in it."
        )
    (first, *others) = {frozenset(folders[0] for folders in files if folders) for files in below.values()}
    if others or len(first) < 2:
        return
    if {"train"} < {half_named(name) for name in first} - {None}:
        raise DataError(
            f"The folders of the classes of {folder} have halves in them ({', '.join(sorted(first))}); expected are "
            f"{folder}/train/<class>/<image> and {folder}/test/<class>/<image>."
        )
    if len(below) > 1:
        logger.warning(
            "The classes of %s are its folders %s; each of them has the folders %s, whose images count to it.",
            *(folder, ", ".join(sorted(below)[:_MOST_NAMED]), ", ".join(sorted(first)[:_MOST_NAMED])),
        )


def _cached_tree(folder: Path) -> _Tree:
    """Return the tree from the cache if no folder of it changed; otherwise list the tree and cache it."""
    folder = folder.resolve()
    cache = _cache_of(folder)
    try:
        return _remembered(folder, cache)
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.debug("No listing of %s to use in %s: %s", folder, cache, error)
    listed_at = time.time_ns()
    try:
        tree = _walk(str(folder))
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be listed ({error}); check its permissions.") from error
    text = json.dumps({"rules": _RULES, "folder": str(folder), "listed_at": listed_at, "tree": asdict(tree)})
    try:
        with replacing(cache) as temporary:
            temporary.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    except OSError as error:
        logger.warning("The listing of %s cannot be kept for the next start: %s", folder, error)
    return tree


def _cache_of(folder: Path) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(home) / "supsup_lightning" / f"listing-{name}.json"


def _remembered(folder: Path, cache: Path) -> _Tree:
    """Return the cached tree, if it is intact, made by the same rules, and its folders have not changed.

    Raises:
        OSError, ValueError, TypeError, KeyError: no usable cache.
    """
    checksum, _, text = cache.read_text().partition("\n")
    if checksum != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError("its checksum is wrong")
    kept = json.loads(text)
    if (kept["rules"], kept["folder"]) != (_RULES, str(folder)):
        raise ValueError("it is another folder's, or was listed by older rules")
    tree = _Tree(**kept["tree"])
    for directory, stamp in tree.stamps.items():
        if _stamp(directory) != stamp or max(stamp[2:]) > kept["listed_at"] - _CLOCK_TICK:
            raise ValueError(f"{directory} has changed since")
    return tree


def _stamp(directory: str) -> list[int]:
    status = os.stat(directory)  # ctime as well, because copying tools can set mtime
    return [status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _walk(folder: str) -> _Tree:
    tree = _Tree(stamps={folder: _stamp(folder)})
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            tree.left_out.append(f"{entry.name} (hidden)")
        elif not _is_folder(entry):
            if entry.name.lower().endswith(IMG_EXTENSIONS):
                tree.left_out.append(f"{entry.name} (in no folder of a class)")
            _note_broken_link(entry, entry.name, tree)
        elif _holds(os.path.realpath(entry.path), folder):
            tree.left_out.append(f"{entry.name} (a link back)")
        else:
            tree.files[entry.name] = _images_below(entry.path, folder, tree)
    return tree


def _images_below(top: str, folder: str, tree: _Tree) -> list[str]:
    """Return the images of a class at any depth; links to folders are followed after all other folders."""
    root = os.path.join(folder, "")
    found: list[tuple[str, list[str]]] = []
    folders, seen = [top], set()
    links: list[str] = []
    while folders or links:
        directory = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(directory)
        if real in seen:
            tree.left_out.append(f"{os.path.relpath(directory, folder)} (a link to a folder seen before)")
            continue
        seen.add(real)
        tree.stamps[directory] = _stamp(directory)
        names = []
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            name = entry.path[len(root) :]
            if is_hidden(entry.name):
                tree.left_out.append(f"{name} (hidden)")
            elif not _is_folder(entry):
                if entry.name.lower().endswith(IMG_EXTENSIONS):
                    names.append(name)
                elif entry.name.lower().endswith(_OTHER_IMAGES):
                    tree.left_out.append(f"{name} (another format)")
                else:
                    _note_broken_link(entry, name, tree)
            elif not entry.is_symlink():
                folders.append(entry.path)
            elif _holds(target := os.path.realpath(entry.path), real) or _holds(target, folder):
                tree.left_out.append(f"{name} (a link back)")
            else:
                links.append(entry.path)
        found.append((directory, names))
    return [name for _, names in sorted(found) for name in names]


def _note_broken_link(entry: os.DirEntry[str], name: str, tree: _Tree) -> None:
    """Note a broken link to what may be a folder; the listing is not reused, as its target may come back."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        tree.left_out.append(f"{name} (a link to nothing)")
        tree.stamps[entry.path] = []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; if it is named as an image, loading reports it as missing
        return False


def _holds(outer: str, inner: str) -> bool:
    """Whether ``outer`` is ``inner`` or above it; both paths without links."""
    return Path(inner).is_relative_to(outer)
