"""A finished run as its directory describes it: results, configuration, and where its masks are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from supsup_lightning.errors import DataError, MismatchError
from supsup_lightning.runs import run_identity

# What results.json of any finished run has, and an evaluation needs.
_NEEDED = (
    *("num_tasks", "num_masks", "num_classes", "average_accuracy", "task_inference_accuracy", "sparsity"),
    *("train_seconds", "seconds_per_task"),
)
_SHOWN = 6  # most jobs of a sweep in a message


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        folder: its output directory.
        results: contents of results.json.
        record: contents of run.json.
        overrides: overrides of its command line.
        search_path: its own folders of configuration files, as URLs; empty without ``--config-dir``.
        started_in: the folder that relative paths in its configuration start from; None if it is gone.
    """

    folder: Path
    results: Mapping[str, Any]
    record: Mapping[str, Any]
    overrides: Sequence[str]
    search_path: Sequence[str]
    started_in: Path | None

    @property
    def bank_path(self) -> Path:
        """Path of its masks."""
        return self.folder / "mask_bank.safetensors"

    @property
    def checkpoint_path(self) -> Path:
        """Path of its last checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"


def read(folder: Path) -> FinishedRun:
    """Read the directory of a finished run; nothing in it is changed.

    Raises:
        DataError: there is no finished run in it, or a file is missing or damaged.
        MismatchError: its files are of different runs.
    """
    results = _results(folder)
    try:
        record = run_identity.read(folder)
    except DataError as error:
        raise DataError(f"{folder / run_identity.FILE} is damaged. {_again(folder)}") from error
    if record is None or not (folder / ".hydra" / "overrides.yaml").is_file():
        missing = run_identity.FILE if record is None else ".hydra/overrides.yaml"
        raise DataError(
            f"{folder} lacks {missing}, so the configuration of the run is not known (a run in Python has none; there, "
            f"call trainer.test with another inference). {_again(folder)}"
        )
    if record["digest"] != (results.get("identity") or {}).get("digest"):
        raise MismatchError(
            f"{folder / 'results.json'} and {folder / run_identity.FILE} are of different runs: their digests differ. "
            f"{_again(folder)}"
        )
    overrides, hydra = _hydra(folder)
    run = FinishedRun(
        folder=folder,
        results=results,
        record=record,
        overrides=overrides,
        search_path=[
            f"{source['schema']}://{source['path']}"
            for source in hydra.get("config_sources", [])
            if source["provider"] not in ("hydra", "main", "schema")
        ],
        started_in=Path(hydra["cwd"]) if Path(hydra.get("cwd", "")).is_dir() else None,
    )
    if not run.bank_path.is_file():
        raise DataError(f"{run.bank_path} is missing, and with it the masks. {_again(folder)}")
    return run


def _results(folder: Path) -> dict[str, Any]:
    """Contents of results.json, of a run and not of an evaluation."""
    path = folder / "results.json"
    if not folder.is_dir():
        raise DataError(f"{folder} is no directory; give the output directory of a finished run, outputs/demo say.")
    if not path.is_file():
        jobs = sorted(str(found.parent) for found in folder.glob("*/results.json"))
        if jobs:
            more = f" and {len(jobs) - _SHOWN} more" if len(jobs) > _SHOWN else ""
            raise DataError(
                f"{folder} holds several runs; evaluate one of them at a time: {', '.join(jobs[:_SHOWN])}{more}."
            )
        if (folder / run_identity.FILE).exists():
            raise DataError(
                f"The run in {folder} is not finished: it has no results.json. Run its command again with "
                f"hydra.run.dir={folder} resume=true to finish it."
            )
        raise DataError(f"{folder} holds no run: it has no results.json. Give the output directory of a finished run.")
    try:
        results = json.loads(path.read_text())
        lacking = [name for name in _NEEDED if name not in results]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). {_again(folder)}") from error
    if "evaluation" in results:
        raise DataError(f"{folder} is an evaluation; give the directory of its run, {folder.parent.parent}.")
    return results


def _hydra(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Overrides of the run, and what Hydra noted of where it ran."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        overrides = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
            raise ValueError("it is no list of overrides")
        path = folder / ".hydra" / "hydra.yaml"
        runtime = OmegaConf.to_container(OmegaConf.load(path).hydra.runtime)
        if not isinstance(runtime, dict):
            raise ValueError("it does not say where the run was started")
    except (OSError, ValueError, AttributeError, YAMLError) as error:
        raise DataError(f"{path} is damaged or missing ({error}). {_again(folder)}") from error
    return overrides, {str(name): value for name, value in runtime.items()}


def _again(folder: Path) -> str:
    """Remedy for an incomplete directory; `resume=true` writes both files anew if they are missing."""
    return (
        f"Delete results.json and {run_identity.FILE} there if they exist, and run the command of that run again with "
        f"hydra.run.dir={folder} resume=true: it goes on from its checkpoint and tests again."
    )
