"""Checkpoints that survive a kill, a full disk or a damaged byte.

A checkpoint is written to a temporary file, read back, and only then replaces the previous one, which is kept as
``<name>.backup.ckpt``. It holds a digest, and only tensors, numbers and text are ever read from it.
"""

import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from os import PathLike
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import Tensor

from supsup_lightning.bank.digests import digest
from supsup_lightning.errors import DataError, SaveError, SupSupError
from supsup_lightning.files import backup_of, check_writable, keep_backup, replacing

logger = logging.getLogger(__name__)

DIGEST = "supsup_lightning.sha256"  # key of a checkpoint that holds the digest of all other entries


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning checkpoint plug-in for local files; `ContinualModule` gives it to its Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self._written: set[Path] = set()  # files that this process has written and read back
        self._warned = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, read it back and move it to ``path``. Raises `SaveError`; the previous one is kept."""
        if not is_local(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            _remove_leftovers(path)
            with replacing(path) as temporary:
                _write({**checkpoint, DIGEST: digest(checkpoint)}, temporary)
                problem = damage(temporary)
                if problem is not None:
                    raise SaveError(f"read back, it is not what was written: {problem}")
                self._check_readable(temporary, path)
                if path in self._written or (path.exists() and damage(path) is None):
                    keep_backup(path)
        except OSError as error:
            before = f"The one before is kept in {path}" if path.exists() else "There is none from before"
            raise SaveError(
                f"The checkpoint {path} could not be written ({error}). {before}. Make room, or choose another folder; "
                "then resume=true (in Python, trainer.fit(ckpt_path=...)) goes on from what is kept."
            ) from error
        self._written.add(path)

    def _check_readable(self, temporary: Path, path: Path) -> None:
        """Warn once if resuming would refuse the file, because of objects in the state of a callback, for example."""
        try:
            torch.load(temporary, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            if not self._warned:
                logger.warning(
                    "The checkpoint %s cannot be resumed from: it holds %s, and nothing but tensors, numbers and text "
                    "is read from one. Keep that out of `state_dict` of callbacks and modules.",
                    path,
                    _refused(error),
                )
                self._warned = True

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors, numbers and text. Raises `DataError` if the file is damaged or holds anything else."""
        weights_only = True if weights_only is None else weights_only
        if not is_local(path) or not Path(path).is_file():
            return super().load_checkpoint(path, map_location, weights_only=weights_only)
        with reading(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only=weights_only)
            _check_sizes(checkpoint, Path(path).stat().st_size)
            check_digest(checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its backup."""
        super().remove_checkpoint(path)
        if is_local(path):
            backup_of(Path(path)).unlink(missing_ok=True)


def prepare(trainer: L.Trainer, stage: str) -> None:
    """Give a Trainer `WholeCheckpoints`, unless the user has set a plug-in, and check its folders before training.

    Raises:
        SaveError: the Trainer's checkpoint folder cannot be written to.
    """
    current = trainer.strategy.checkpoint_io
    if type(current) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    elif isinstance(current, _WrappingCheckpointIO) and type(current.checkpoint_io) is TorchCheckpointIO:
        current._checkpoint_io = WholeCheckpoints()  # the setter does not replace a plug-in
    if stage == "fit" and trainer.is_global_zero:
        for callback in trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if folder is not None and is_local(folder):
                check_writable(Path(folder), "checkpoints")


def whole(path: Path) -> Path | None:
    """Return ``path``, or its backup with a warning if it is missing or damaged; None if there is neither.

    A damaged file is renamed to ``<name>.damaged.ckpt``.

    Raises:
        DataError: all files are damaged.
    """
    backup = backup_of(path)
    problem = damage(path) if path.exists() else None
    if path.exists() and problem is None:
        return path
    if not backup.exists() and problem is None:
        return None
    if not backup.exists() or damage(backup) is not None:
        raise DataError(
            f"The checkpoint {path if path.exists() else backup} is damaged ({problem or damage(backup)}), and there "
            "is no whole one beside it; delete it and run without resume=true to start afresh."
        )
    if problem is None:
        logger.warning("The checkpoint %s is missing; going on from the one before it, %s.", path, backup)
        return backup
    aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
    path.replace(aside)  # so that it never takes the place of the backup
    logger.warning(
        "The checkpoint %s is damaged (%s), and now called %s; going on from the one before it, %s.",
        path,
        problem,
        aside.name,
        backup,
    )
    return backup


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's file; None if the CRC of every member is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            plain = all(each.compress_type == zipfile.ZIP_STORED for each in members)
            if not plain or sum(each.file_size for each in members) > path.stat().st_size:
                return "no archive as PyTorch writes it"  # compressed, so it could unpack to more than its own size
            broken = archive.testzip()
    except Exception as error:  # damaged bytes make zipfile raise many kinds of errors
        return str(error) or type(error).__name__
    return None if broken is None else f"{broken} is not what was written"


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Check a file before the block that reads it, and turn the block's errors into `DataError`."""
    problem = damage(Path(path))
    if problem is not None:
        raise DataError(f"The checkpoint {path} is damaged ({problem}).{_other(Path(path))}")
    try:
        yield
    except SupSupError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"The checkpoint {path} holds {_refused(error)}, which is no tensor, number or text: it is refused, as "
            "reading it could run any program. This package writes nothing of the kind; take a checkpoint that one of "
            "your own runs has written."
        ) from error
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, MemoryError) as error:
        raise DataError(f"The checkpoint {path} cannot be read ({error}).{_other(Path(path))}") from error


def _refused(error: pickle.UnpicklingError) -> str:
    """Return the name of the object that PyTorch refused to read."""
    named = re.search(r"GLOBAL (\S+)|(?:global|function|class|type) [`']?([\w.]+\.[\w.]+)", str(error))
    return next(filter(None, named.groups())) if named else "an object"


def check_digest(checkpoint: Any) -> None:
    """Remove the digest from a checkpoint. Raises `ValueError` if it does not match the other entries."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds {type(checkpoint).__name__} in place of a dict")
    expected = checkpoint.pop(DIGEST, None)  # older checkpoints have none
    if expected is not None and digest(checkpoint) != expected:
        raise ValueError("its tensors are not those that were written")


def _check_sizes(checkpoint: Any, file_size: int) -> None:
    """Raise `ValueError` for a tensor that is larger than its file, as one stored value can be expanded to any size."""
    left, seen = [checkpoint], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor) and value.nbytes > file_size:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} is larger than the file")
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, Mapping) else value)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint. Raises `OSError` if the file system refuses it."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise cause from error


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of killed processes; only one process writes to an output directory."""
    for leftover in path.parent.glob(f".{escape(path.stem)}.*{escape(path.suffix)}"):
        leftover.unlink(missing_ok=True)


def _other(path: Path) -> str:
    """Suggest the backup of a damaged checkpoint, if that is intact."""
    backup = backup_of(path)
    return f" The one before it is whole: ckpt_path={str(backup)!r}." if damage(backup) is None else ""


def is_local(path: Any) -> bool:
    """Whether a path is a local one."""
    return isinstance(path, str | PathLike) and "://" not in str(path)
