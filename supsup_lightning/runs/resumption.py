"""Check for ``resume=true``: what an output directory holds, and whether it belongs to the same run."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from supsup_lightning.errors import DataError, MismatchError
from supsup_lightning.files import backup_of
from supsup_lightning.runs import run_identity
from supsup_lightning.runs.job import is_first_process
from supsup_lightning.runs.run_identity import Identity, different_files

logger = logging.getLogger(__name__)

_REMEDY = "Use the same, or another directory (hydra.run.dir), or leave out resume=true to start afresh."

Files = Callable[[], Mapping[str, Any] | None]


def find(folder: Path, identity: Identity, config: DictConfig) -> dict[str, Any] | None:
    """Return the results of the run, or None if it is not finished. See `finished` and `check_begun`."""

    def files() -> Mapping[str, Any] | None:
        return instantiate(config.datamodule).files()

    result = finished(folder, identity, files=files, num_tasks=config.data.get("num_tasks"))
    if result is None:
        check_begun(folder, identity, files=files)
    return result


def finished(folder: Path, identity: Identity, *, files: Files, num_tasks: int | None) -> dict[str, Any] | None:
    """Return the results of this run, or None if it is not finished.

    Args:
        folder: output directory.
        identity: identity of the run that is wanted.
        files: function that describes the data files; called only if there is something to compare with.
        num_tasks: number of tasks that are wanted; None if not given.

    Raises:
        DataError: the results are damaged, and there is no checkpoint to make them again.
        MismatchError: the results belong to another run.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        if not {"average_accuracy", "num_tasks"} <= set(result):
            raise ValueError("it is not whole")
        stored = result.get("identity")
        if stored is not None and not (isinstance(stored, dict) and {"digest", "files"} <= set(stored)):
            raise ValueError("its identity is not whole")
    except (OSError, ValueError, TypeError) as error:
        if not _has_checkpoint(folder):
            raise DataError(
                f"{path} is damaged ({error}), and there is no checkpoint beside it to make it from again; leave out "
                "resume=true to start afresh."
            ) from error
        logger.warning("%s is damaged (%s): it is made again from the checkpoint beside it.", path, error)
        return None
    if stored is None:
        _compare_older(path, result, identity, num_tasks)
    else:
        record = run_identity.read(folder)
        if record is not None and record["digest"] == stored["digest"]:
            if identity.adds_tasks(record):
                _check_tasks_can_be_added(path, record, result, files)
                return None
            _compare(f"{path} is of another run", record, identity, files)
        elif stored["digest"] != identity.digest:
            raise MismatchError(
                f"{path} is of another configuration, and there is no {run_identity.FILE} of it to say which. {_REMEDY}"
            )
        else:
            _compare_files(f"{path} is of another run", stored["files"], files)
    own = identity.own_classes
    logger.info(
        "%s exists: nothing left to do.%s",
        path,
        f" (Compared by configuration and files, not by the code of {', '.join(own)}.)" if own else "",
    )
    return result


def check_begun(folder: Path, identity: Identity, *, files: Files) -> None:
    """Check the checkpoint of an unfinished run, or log that there is nothing to resume.

    Raises:
        MismatchError: the checkpoint belongs to another run.
        DataError: there are checkpoints, but no last.ckpt.
    """
    if not _has_checkpoint(folder):
        checkpoints = folder / "checkpoints"
        others = sorted(path.name for path in checkpoints.glob("*.ckpt") if not path.name.startswith("."))
        if others:
            raise DataError(
                f"{checkpoints} has {', '.join(others)} but no last.ckpt, which resume=true goes on from; rename the "
                "one to go on from, or leave out resume=true to start afresh."
            )
        if is_first_process():
            logger.info("Nothing to resume in %s: training starts from the beginning.", folder)
        return
    record = run_identity.read(folder)
    if record is None:
        logger.warning(
            "%s was begun by a version that kept no %s: only what the checkpoint itself holds is compared.",
            folder,
            run_identity.FILE,
        )
        return
    what = f"{folder} holds a run of another kind, begun and not finished"
    if identity.adds_tasks(record):  # those that are finished stay as they are
        _compare_files(what, record["files"], files)
    else:
        _compare(what, record, identity, files)


def _check_tasks_can_be_added(path: Path, record: Mapping[str, Any], result: Mapping[str, Any], files: Files) -> None:
    """Check that a finished run can go on with further tasks.

    Raises:
        DataError: there is no checkpoint to go on from.
        MismatchError: the files of the data are others.
    """
    if not _has_checkpoint(path.parent):
        raise DataError(
            f"{path.parent} has no checkpoints/last.ckpt, from which further tasks could be added to its "
            f"{result['num_tasks']}; leave out resume=true to train all of them."
        )
    _compare_files(f"{path} is of another run", record["files"], files)
    logger.info("%s: %d tasks are finished; training goes on with those after them.", path.parent, result["num_tasks"])


def _has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to resume from, or its backup."""
    last = folder / "checkpoints" / "last.ckpt"
    return last.exists() or backup_of(last).exists()


def _compare(what: str, record: Mapping[str, Any], identity: Identity, files: Files) -> None:
    """Raise `MismatchError` with the differences if ``record`` belongs to another run."""
    if different := identity.differences(record):
        raise MismatchError(f"{what}: {'; '.join(different)}. {_REMEDY}")
    _compare_files(what, record["files"], files)


def _compare_files(what: str, stored: Mapping[str, Any] | None, files: Files) -> None:
    if stored is not None and (different := different_files(stored, files())):
        raise MismatchError(f"{what}: {'; '.join(different)}. {_REMEDY}")


def _compare_older(path: Path, result: Mapping[str, Any], identity: Identity, num_tasks: int | None) -> None:
    """Compare a run with results of earlier versions, which hold less about their run. Raises `MismatchError`."""
    here: dict[str, Any] = {name: identity.choices.get(name) for name in ("scenario", "data", "network", "method")}
    here |= {"seed": identity.options.get("seed"), "data.num_tasks": num_tasks}
    there = {**result, "data.num_tasks": result["num_tasks"]}
    different = [
        f"{name}={there[name]} there, {value} here"
        for name, value in here.items()
        if value is not None and name in there and there[name] != value
    ]
    if different:
        raise MismatchError(f"{path} is of another run: {'; '.join(different)}. {_REMEDY}")
    logger.warning(
        "%s is of a version that kept no digest of its configuration: compared by scenario, data, network, method, "
        "seed and number of tasks alone.",
        path,
    )
