"""What makes two runs the same: the resolved configuration, less what changes no number, and the files of the data.

A run writes it to run.json when its training starts, and the digest to results.json. ``resume=true`` compares. What the
code of a user's own classes does is out of reach; only how they are configured is compared.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from supsup_lightning.cli.output_name import targets
from supsup_lightning.errors import DataError
from supsup_lightning.files import replacing

FILE = "run.json"

# Results are the same with any number of processes, up to rounding, unless a layer looks at its share of the batch.
_PROCESSES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
_WITHOUT_EFFECT_ON_NUMBERS = (
    *("resume", "print_masked", "optimized_metric", "logger"),
    "data.num_workers",
    *(f"callbacks.{name}" for name in ("progress", "figures", "results", "checkpoint", "loss_guard")),
    *(f"trainer.{name}" for name in ("default_root_dir", "log_every_n_steps", "enable_model_summary", "profiler")),
    "trainer.num_sanity_val_steps",
)
_REFERENCE = re.compile(r"\$\{[^:{}$]+\}")  # to another option, which is compared itself
_SHOWN = 6  # differences, in a message
_KNOWN = ("supsup_lightning", "torch", "torchvision", "timm", "lightning", "hydra")


@dataclass(frozen=True)
class Identity:
    """A run's.

    Attributes:
        options: the configuration, a key a value.
        references: those of ``options`` that only refer to another one.
        processes: how many there are and where; compared where that changes results.
        choices: names of the configuration's files, by group; for messages.
    """

    options: Mapping[str, Any]
    references: frozenset[str]
    processes: Mapping[str, Any]
    choices: Mapping[str, str]

    @property
    def own_classes(self) -> list[str]:
        """Targets that are no part of this package or the libraries it builds on."""
        names = {str(value) for key, value in self.options.items() if key.rsplit(".", 1)[-1] == "_target_"}
        return sorted(name for name in names if name.partition(".")[0] not in _KNOWN)

    @property
    def digest(self) -> str:
        """SHA-256 over the options."""
        text = json.dumps(dict(self.options), sort_keys=True)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def write(self, folder: Path, *, files: Mapping[str, Any] | None, depends_on_processes: bool) -> None:
        """To run.json.

        Args:
            folder: the output directory.
            files: of the data, as `files_of` describes them.
            depends_on_processes: whether results do.
        """
        values = {
            "digest": self.digest,
            "files": files,
            "depends_on_processes": depends_on_processes,
            "processes": self.processes,
            "choices": self.choices,
            "options": self.options,
        }
        with replacing(folder / FILE) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """What differs from a run.json, but for the files of the data; in words, the most telling first."""
        options = _renamed(stored["options"])
        here = dict(self.options)
        if stored["depends_on_processes"]:
            options |= stored["processes"]
            here |= self.processes
        different = [key for key in sorted({*options, *here}) if _value(options, key) != _value(here, key)]
        said = [key for key in different if key not in self.references] or different
        lines = {}
        for key in said:
            group = key.partition(".")[0]
            there_chosen, here_chosen = stored["choices"].get(group), self.choices.get(group)
            if there_chosen != here_chosen:  # one line for a group of which another file was chosen
                lines[group] = f"{group}={there_chosen} there, {here_chosen} here"
            else:
                lines[key] = f"{key}={_shown(_value(options, key))} there, {_shown(_value(here, key))} here"
        found = list(lines.values())
        return [*found[:_SHOWN], f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else found


def identity_of(config: DictConfig, *, choices: Mapping[str, Any], folder: Path) -> Identity:
    """Identity of a run, from its configuration.

    Args:
        config: of a run.
        choices: the files that were chosen, by group.
        folder: its output directory, whose place does not matter.
    """
    # Files below data.root are compared by themselves, wherever they lie; what a user's own class reads is not known.
    places = {str(folder): "<output directory>"}
    data = config.get("data")
    if isinstance(data, DictConfig) and all(target.startswith("supsup_lightning.") for target in targets(data)):
        places[str(data.get("root", ""))] = "<data.root>"
    options, processes, references = {}, {}, set()
    for key, value, refers in _entries(config):
        value = _without_places(value, places)
        if key in _PROCESSES:
            processes[key] = value
        else:
            options[key] = value
            if refers:
                references.add(key)
    named = {group: str(name) for group, name in choices.items() if "/" not in group}
    return Identity(options, frozenset(references), processes, named)


def read(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None if there is none. Raises `DataError` if it is damaged."""
    try:
        stored = json.loads((folder / FILE).read_text())
        if isinstance(stored["options"], dict) and isinstance(stored["choices"], dict):
            return {"processes": {}, "depends_on_processes": False, "files": None, "digest": "", **stored}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(_damaged(folder, error)) from error
    raise DataError(_damaged(folder, "no options"))


def _damaged(folder: Path, error: object) -> str:
    return (
        f"{folder / FILE}, which says what run this directory is of, is damaged ({error}); delete it to go on without "
        "comparing, or leave out resume=true to start afresh."
    )


def summary(folder: Path) -> dict[str, Any] | None:
    """What results.json says of the run.json beside it; None if there is none, as in a notebook."""
    stored = read(folder)
    return None if stored is None else {"digest": stored["digest"], "files": stored["files"]}


def files_of(root: Path, sources: Sequence[Any]) -> dict[str, Any] | None:
    """The files that data sets are read from, wherever they lie.

    Args:
        root: the folder that holds the data sets.
        sources: those that have ``digest`` are asked for it.

    Returns:
        None if no source has any; the digest of one is None while its files are not there.
    """
    found = [
        {"source": type(source).__name__, "digest": source.digest(root)}
        for source in sources
        if hasattr(source, "digest")
    ]
    return {"root": str(root), "sources": found} if found else None


def different_files(stored: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> list[str]:
    """Where the files of the data differ, in words; what was or is not known does not count."""
    if stored is None or here is None:
        return []
    return [
        f"the files of {now['source']}, in data.root={stored['root']} there, {here['root']} here, differ in number, "
        "names, labels or sizes"
        for there, now in zip(stored["sources"], here["sources"], strict=False)
        if None not in (there["digest"], now["digest"]) and there["digest"] != now["digest"]
    ]


def _entries(config: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Each option that may change a number, its value, and whether it is a reference to another."""
    keys = range(len(config)) if isinstance(config, ListConfig) else list(config)
    for place in keys:
        key = f"{prefix}{place}"
        if any(key == name or key.startswith(f"{name}.") for name in _WITHOUT_EFFECT_ON_NUMBERS):
            continue
        node: Any = config._get_node(place)
        raw = node._value() if node is not None else None
        refers = isinstance(raw, str) and _REFERENCE.fullmatch(raw) is not None
        value = raw if raw == "???" else config[place]
        if isinstance(value, DictConfig) and refers:
            continue
        nested = isinstance(value, DictConfig) or (
            isinstance(value, ListConfig) and any(isinstance(part, DictConfig | ListConfig) for part in value)
        )
        if nested and len(value):
            yield from _entries(value, f"{key}.")
        else:
            yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, refers


def _without_places(value: Any, places: Mapping[str, str]) -> Any:
    """The value, independent of where output and data lie; in a form that JSON gives back unchanged."""
    if isinstance(value, list):
        return [_without_places(part, places) for part in value]
    if isinstance(value, str):
        for place, name in places.items():
            if place and (value == place or value.startswith(f"{place}{os.sep}")):
                return name + value[len(place) :]
        return value
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run.json as this version names them: before 0.2, `method` repeated those of `mask`."""
    if "mask._target_" in options or "mask.rule" not in options:
        return dict(options)
    stream = {name.replace("unannounced.", "datamodule."): value for name, value in options.items()}
    options = {"datamodule._target_": "supsup_lightning.data.announced", **stream}
    options.pop("unannounced", None)
    repeated = re.compile(
        r"method\.(rule|sparsity|allocation|budget|init|search_candidates|search_tolerance|is_masked\..*)"
    )
    kept = {name: value for name, value in options.items() if not repeated.fullmatch(name)}
    return {**kept, "mask._target_": "supsup_lightning.MaskOptions.of_config"}


def _value(options: Mapping[str, Any], key: str) -> Any:
    """JSON knows no NaN that is equal to itself, and our classes keep their names if they move to another module."""
    value = options.get(key, _ABSENT)
    if key.endswith("_target_") and str(value).startswith("supsup_lightning."):
        return str(value).rpartition(".")[2]
    return "nan" if value != value else value


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _shown(value: Any) -> str:
    return "null" if value is None else str(value) if not isinstance(value, bool) else str(value).lower()
