"""Atomic writing of files, and backups."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from supsup_lightning.errors import SaveError, SupSupError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it replaces ``path`` when the block ends without an error.

    The content is flushed to disk before the file is renamed, so neither a kill nor a power failure leaves a partial
    file.

    Raises:
        SaveError: the file system refuses the file. ``path`` is unchanged.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "new" / "result.txt"
    >>> with replacing(path) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> path.read_text(), [p.name for p in path.parent.iterdir()]
    ('whole', ['result.txt'])
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _flush_names(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except SupSupError:
        raise
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error}.") from error


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Give the name of a temporary folder to make and fill; it replaces ``path`` when the block ends without an error.

    Raises:
        SaveError: the file system refuses the new name. ``path`` is unchanged.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results"
    >>> for number in (1, 2):
    ...     with replacing_folder(path) as temporary:
    ...         temporary.mkdir()
    ...         _ = (temporary / f"{number}.txt").write_text("whole")
    >>> [p.name for p in path.iterdir()], [p.name for p in path.parent.iterdir()]
    (['2.txt'], ['results'])
    """
    path = Path(path)
    temporary, before = (path.with_name(f".{path.name[:200]}.{os.getpid()}.{state}") for state in ("new", "old"))
    try:
        yield temporary
        try:
            if path.exists():
                path.replace(before)
            temporary.replace(path)
            _flush_names(path.parent)
        except OSError as error:
            if before.exists() and not path.exists():
                before.replace(path)
            raise SaveError(f"{path} cannot be written: {error}.") from error
    finally:
        for folder in (temporary, before):
            if folder.exists():
                shutil.rmtree(folder)


def check_writable(folder: Path, what: str) -> None:
    """Make the folder and a temporary file in it. Raises `SaveError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SaveError(
            f"{folder}, where {what} are to go, cannot be written to ({error}); choose another folder, or make it "
            "writable."
        ) from error


def backup_of(path: Path) -> Path:
    """Path of the backup that `keep_backup` makes of ``path``.

    >>> backup_of(Path("checkpoints/last.ckpt")).name
    'last.backup.ckpt'
    """
    return path.with_name(f"{path.stem}.backup{path.suffix}")


def keep_backup(path: Path) -> None:
    """Keep the file ``path`` under a second name, `backup_of(path)`; at any moment one of the names exists."""
    if not path.exists():
        return
    backup = backup_of(path)
    second = backup.with_name(f".{backup.stem}.{os.getpid()}{backup.suffix}")  # named as in `replacing`
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
        second.replace(backup)
    except OSError:  # a file system without hard links
        path.replace(backup)
    finally:
        second.unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Rename ``path``, if it exists, to ``<stem>.previous<suffix>``, so that new files are not mixed up with it.

    Its backup, which is older still, is deleted.
    """
    if path.exists():
        path.replace(path.with_name(f"{path.stem}.previous{path.suffix}"))
    backup_of(path).unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    """Flush the names of a folder's files to disk, if the system supports that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not support it
            raise
    finally:
        os.close(descriptor)
