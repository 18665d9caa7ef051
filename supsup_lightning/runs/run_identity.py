"""Identity of a run: the resolved configuration without options that change no result, and the files of the data.

A run writes it to run.json when its training starts, and its digest to results.json. ``resume=true`` compares it. The
code of a user's own classes is not compared, only their configuration.
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

# Results do not depend on the number of processes, up to rounding, unless a layer uses statistics of a batch.
_PROCESSES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
_WITHOUT_EFFECT_ON_NUMBERS = (
    *("resume", "print_masked", "optimized_metric", "logger"),
    "data.num_workers",
    *(
        f"callbacks.{name}"
        for name in ("progress", "figures", "task_log", "results", "checkpoint", "loss_guard", "inference_record")
    ),
    *(f"trainer.{name}" for name in ("default_root_dir", "log_every_n_steps", "enable_model_summary", "profiler")),
    "trainer.num_sanity_val_steps",
)
# Options that older versions did not have, whose null is what these did.
_ABSENT_IF_NULL = ("data.task_shard",)
_REFERENCE = re.compile(r"\$\{[^:{}$]+\}")  # reference to another option, which is compared itself
_SHOWN = 6  # most differences in a message
_KNOWN = ("supsup_lightning", "torch", "torchvision", "timm", "lightning", "hydra")


@dataclass(frozen=True)
class Identity:
    """Identity of a run.

    Attributes:
        options: the configuration, flattened to one value per key.
        references: keys of ``options`` that only refer to another option.
        processes: options of the number and place of processes; compared only if results depend on them.
        choices: names of the configuration's files by group, for messages.
    """

    options: Mapping[str, Any]
    references: frozenset[str]
    processes: Mapping[str, Any]
    choices: Mapping[str, str]

    @property
    def own_classes(self) -> list[str]:
        """Names of configured classes that belong neither to this package nor to the libraries it builds on."""
        names = {str(value) for key, value in self.options.items() if key.rsplit(".", 1)[-1] == "_target_"}
        return sorted(name for name in names if name.partition(".")[0] not in _KNOWN)

    @property
    def digest(self) -> str:
        """SHA-256 over the options."""
        text = json.dumps(dict(self.options), sort_keys=True)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def write(self, folder: Path, *, files: Mapping[str, Any] | None, depends_on_processes: bool) -> None:
        """Write the identity to run.json.

        Args:
            folder: output directory.
            files: files of the data, as described by `files_of`.
            depends_on_processes: whether results depend on the number of processes.
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

    def different(self, stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the options that differ from a run.json, each with its value there and here."""
        options = _renamed(stored["options"])
        here = dict(self.options)
        if stored["depends_on_processes"]:
            options |= stored["processes"]
            here |= self.processes
        values = {key: (_value(options, key), _value(here, key)) for key in sorted({*options, *here})}
        return {key: (there, now) for key, (there, now) in values.items() if there != now}

    def adds_tasks(self, stored: Mapping[str, Any]) -> bool:
        """Whether this run is that of a run.json with more tasks (data.num_tasks), and nothing else differs."""
        different = self.different(stored)
        if different.keys() != {"data.num_tasks"} or self.options.get("data.task_shard") is not None:
            return False
        there, here = different["data.num_tasks"]
        announced = self.options.get("datamodule._target_") == "supsup_lightning.data.announced"
        return announced and type(there) is int and (here is None or (type(here) is int and here > there))

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Return the differences from a run.json in words, without those of data files."""
        different = self.different(stored)
        said = [key for key in different if key not in self.references] or list(different)
        lines = {}
        for key in said:
            group = key.partition(".")[0]
            there_chosen, here_chosen = stored["choices"].get(group), self.choices.get(group)
            if there_chosen != here_chosen:  # one line for a whole group, if another of its files was chosen
                lines[group] = f"{group}={there_chosen} there, {here_chosen} here"
            else:
                there, now = different[key]
                lines[key] = f"{key}={shown(there)} there, {shown(now)} here"
        found = list(lines.values())
        return [*found[:_SHOWN], f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else found


def identity_of(config: DictConfig, *, choices: Mapping[str, Any], folder: Path) -> Identity:
    """Make the identity of a run from its configuration.

    Args:
        config: configuration of the run.
        choices: the chosen files, by group.
        folder: output directory; its path is not part of the identity.
    """
    # Files below data.root are compared by digest, wherever they are. For a user's own class they are not known.
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
    """Read run.json; None if there is none. Raises `DataError` if it is damaged."""
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
    """Return the part of run.json that results.json repeats; None if there is no run.json, as in a notebook."""
    stored = read(folder)
    return None if stored is None else {"digest": stored["digest"], "files": stored["files"]}


def files_of(root: Path, sources: Sequence[Any]) -> dict[str, Any] | None:
    """Describe the files of data sets by digests that do not depend on the folder.

    Args:
        root: the folder that holds the data sets.
        sources: data sets; those with a method ``digest`` are described.

    Returns:
        None if no source has files; the digest of a source is None if its files are missing.
    """
    found = [
        {"source": type(source).__name__, "digest": source.digest(root)}
        for source in sources
        if hasattr(source, "digest")
    ]
    return {"root": str(root), "sources": found} if found else None


def different_files(stored: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> list[str]:
    """Return the differences between data files in words; unknown digests do not count."""
    if stored is None or here is None:
        return []
    return [
        f"the files of {now['source']}, in data.root={stored['root']} there, {here['root']} here, differ in number, "
        "names, labels or sizes"
        for there, now in zip(stored["sources"], here["sources"], strict=False)
        if None not in (there["digest"], now["digest"]) and there["digest"] != now["digest"]
    ]


def _entries(config: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield each option that may change a result, its value, and whether it is a reference to another option."""
    keys = range(len(config)) if isinstance(config, ListConfig) else list(config)
    for place in keys:
        key = f"{prefix}{place}"
        if any(key == name or key.startswith(f"{name}.") for name in _WITHOUT_EFFECT_ON_NUMBERS):
            continue
        node: Any = config._get_node(place)
        raw = node._value() if node is not None else None
        refers = isinstance(raw, str) and _REFERENCE.fullmatch(raw) is not None
        value = raw if raw == "???" else config[place]
        if value is None and key in _ABSENT_IF_NULL:
            continue
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
    """Return the value without paths of output and data, in types that JSON keeps unchanged."""
    if isinstance(value, list):
        return [_without_places(part, places) for part in value]
    if isinstance(value, str):
        for place, name in places.items():
            if place and (value == place or value.startswith(f"{place}{os.sep}")):
                return name + value[len(place) :]
        return value
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Rename options of an older run.json: before 0.2, `method` repeated the options of `mask`."""
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
    """Return a comparable value: NaN as text, and classes of this package without their module."""
    value = options.get(key, _ABSENT)
    if key.endswith("_target_") and str(value).startswith("supsup_lightning."):
        return str(value).rpartition(".")[2]
    return "nan" if value != value else value


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def shown(value: Any) -> str:
    """Return a value as it is typed on the command line.

    >>> shown(None), shown(True), shown(0.5)
    ('null', 'true', '0.5')
    """
    return "null" if value is None else str(value) if not isinstance(value, bool) else str(value).lower()
