"""Runs found in folders: options, results and state of each."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supsup_lightning.errors import DataError
from supsup_lightning.runs import job_record

# Groups whose choice, or options, change no result.
_WITHOUT_EFFECT = ("logger", "callbacks", "hparams_search", "launcher", "debug", "hydra")
# Folders that are searched for runs only if they are named themselves.
_INSIDE = ("checkpoints", "figures", "csv", "wandb", "tensorboard", ".hydra", "report", "evaluations")


@dataclass(frozen=True)
class Run:
    """A run in its output directory.

    Attributes:
        folder: the output directory.
        typed: names of the options that were given on the command line.
        options: value of each option by name (``mask.sparsity``), and the chosen file of each group (``network``).
        result: results.json; empty if the run is not finished.
        state: ``finished``, ``failed``, ``stopped``, ``not finished`` or ``without results``.
        error: the last line of its error, or what else is known of an unfinished run; for a finished run, the error of
            a later job in the same directory.
        is_recorded: whether there is a run.json, without which only typed options are known.
    """

    folder: Path
    typed: frozenset[str]
    options: Mapping[str, Any]
    result: Mapping[str, Any] = field(default_factory=dict)
    state: str = "finished"
    error: str = ""
    is_recorded: bool = True

    @property
    def finished(self) -> bool:
        """Whether there are results."""
        return bool(self.result)

    @property
    def seed(self) -> Any:
        """Seed of the run; None if unknown."""
        return self.options.get("seed", self.result.get("seed"))


def collect(folders: Sequence[Path]) -> list[Run]:
    """Find all runs at or below some folders; of two runs with the same identity, the newer one.

    Raises:
        DataError: a folder does not exist, or none of them holds a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; give the output directory of a run or a sweep.")
    try:
        found = {path.resolve(): None for folder in folders for path in _run_folders(folder)}
    except OSError as error:
        raise DataError(f"{error}: give folders that can be read.") from error
    runs = [read(path) for path in found]
    if not runs:
        named = ", ".join(map(str, folders))
        raise DataError(f"{named}: no run in there (none has a results.json or job.json). Runs write to outputs/.")
    return runs


def without_duplicates(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Split runs into those to count, and older repetitions of the same configuration, data and seed."""
    kept: dict[Any, Run] = {}
    repeated = []
    for run in sorted(runs, key=lambda run: _modified(run.folder), reverse=True):
        identity = run.result.get("identity") or {}
        key = json.dumps(identity, sort_keys=True) if identity.get("digest") else str(run.folder)
        if key in kept:
            repeated.append(run)
        else:
            kept[key] = run
    order = {run.folder: place for place, run in enumerate(runs)}
    return sorted(kept.values(), key=lambda run: order[run.folder]), repeated


def read(folder: Path) -> Run:
    """Read one run."""
    result, damage = _json(folder / "results.json")
    evaluation = result.get("evaluation") or {}  # a run tested again: it lies in the folder of the run
    trained_in = folder.parent.parent if evaluation else folder
    record = job_record.read(trained_in) or {}
    overrides = record.get("overrides") or _overrides(trained_in)
    tested_with = evaluation.get("overrides", [])
    stored, digest = _stored(trained_in)
    options = {**_typed(overrides), **stored, **{_name(each): _value(each) for each in tested_with}}
    typed = frozenset(_name(override) for override in [*overrides, *tested_with])
    said = (evaluation.get("run") or result.get("identity") or {}).get("digest")
    if said and digest and said != digest:
        result, damage = {}, "results.json and run.json are of different runs: their digests differ"
    if result and {"average_accuracy", "num_tasks"} <= result.keys():
        for name in ("scenario", "data", "network", "method", "seed"):
            if name in result:
                options[name] = result[name]
        if "task_shard" in result:
            options["data.task_shard"] = result["task_shard"]
        files = (result.get("identity") or {}).get("files")
        if files is not None:
            options |= {"data.root": files["root"], "data files": str(files["sources"])}
        elif not stored:  # run.json has the folder only if the data depend on it
            options.pop("data.root", None)
        later = record.get("status") in ("failed", "stopped") and not evaluation
        error = _last_line(record.get("error", "")) if later else ""
        return Run(folder, typed, options, result, error=error, is_recorded=bool(stored))
    state = record.get("status", "not finished")
    error = damage or _last_line(record.get("error", ""))
    if state == "finished":  # one that trains nothing, such as print_masked=true
        state, error = "without results", error or "its last job ended without training"
    if state == "running":
        state = "not finished"
        error = error or "still running, or killed; resume=true goes on from its last checkpoint"
    return Run(folder, typed, options, {}, state, error or _last_line(_text(folder / "train.log")))


def _run_folders(folder: Path) -> Iterator[Path]:
    if any((folder / name).exists() for name in ("results.json", job_record.FILE, "run.json")):
        yield folder
    for child in sorted(folder.iterdir()):
        is_above = child.is_symlink() and folder.resolve().is_relative_to(child.resolve())
        if child.is_dir() and child.name not in _INSIDE and not is_above:
            yield from _run_folders(child)


def _typed(overrides: Sequence[str]) -> dict[str, Any]:
    """Options of the command line that may change a result."""
    typed = {_name(override): _value(override) for override in overrides}
    return {name: value for name, value in typed.items() if name.partition(".")[0] not in _WITHOUT_EFFECT}


def _stored(folder: Path) -> tuple[dict[str, Any], str]:
    """Options and choices of run.json, which has no option that changes no result, and its digest; empty without it."""
    stored, _ = _json(folder / "run.json")
    options, choices = stored.get("options"), stored.get("choices") or {}
    if not isinstance(options, dict):
        return {}, ""
    chosen = {group: name for group, name in choices.items() if group not in _WITHOUT_EFFECT}
    return {**options, **chosen}, stored.get("digest", "")


def _overrides(folder: Path) -> list[str]:
    """Overrides that Hydra recorded, for runs of versions without job.json."""
    from omegaconf import OmegaConf

    path = folder / ".hydra" / "overrides.yaml"
    return [str(override) for override in OmegaConf.load(path)] if path.exists() else []


def _name(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _value(override: str) -> Any:
    return parsed(override.partition("=")[2])


def parsed(text: str) -> Any:
    """Value of an option as it is typed: a number, a list and so on, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(path: Path) -> tuple[dict[str, Any], str]:
    """Return a JSON file's object, and what is wrong with the file."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"{path.name} is damaged: {error}"
    return (values, "") if isinstance(values, dict) else ({}, f"{path.name} is damaged: no object in it")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _modified(folder: Path) -> float:
    path = folder / "results.json"
    return path.stat().st_mtime if path.exists() else 0.0
