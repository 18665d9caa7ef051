"""Names of output directories: the same name for the same run, and different names for different runs."""

import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

# File systems allow 255 bytes in a name; the rest is for prefixes and suffixes.
_LONGEST_NAME = 200
# Options that do not make a different run: resuming, logging, display, and how jobs of a sweep are started.
_UNNAMED = ("resume", "logger", "launcher", "callbacks.progress", "callbacks.figures", "callbacks.task_log")
_FILES = ("ImageFolder", "ImageCSV")


def run_name(overrides: str) -> str:
    """Make a directory name of at most 200 bytes from a list of overrides; equal lists have equal names.

    >>> run_name("data=permuted_mnist,seed=1")
    'data=permuted_mnist,seed=1'
    >>> run_name("")
    'default'
    """
    name = re.sub(r"[^\w=.,+~-]", "_", overrides) or "default"
    if len(name.encode()) > _LONGEST_NAME or name != (overrides or "default"):
        digest = hashlib.sha256(os.fsencode(overrides)).hexdigest()[:8]
        name = f"{name.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
    return name


def sweep_name(mode: object, folder: str) -> str | None:
    """Return the name of the sweep that a job belongs to; None for a single run.

    Args:
        mode: Hydra's mode.
        folder: output directory of the job, which lies in the folder of its sweep.

    >>> sweep_name("RunMode.MULTIRUN", "/outputs/sweeps/seeds/seed=0"), sweep_name("RunMode.RUN", "/outputs/seed=0")
    ('seeds', None)
    """
    return os.path.basename(os.path.dirname(os.path.abspath(folder))) if str(mode).endswith("MULTIRUN") else None


def naming(overrides: ListConfig, data: DictConfig | None) -> str:
    """Return the overrides that name a run, sorted.

    Args:
        overrides: overrides of the command line.
        data: group ``data`` of the configuration. ``data.root`` is left out if the data do not depend on it.
    """
    unnamed = _UNNAMED if root_matters(data) else (*_UNNAMED, "data.root")
    kept = []
    for override in OmegaConf.to_container(overrides):  # type: ignore[union-attr]
        text = str(override)  # not resolved: a value may refer to another option
        key = text.lstrip("+~").partition("=")[0].partition("@")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in unnamed):
            kept.append(text)
    return ",".join(sorted(kept))


def root_matters(data: Any) -> bool:
    """Whether the data may depend on ``data.root``: image files, and data of a user's own classes."""
    return any(
        not target.startswith("supsup_lightning.") or target.rsplit(".", 1)[-1] in _FILES for target in targets(data)
    )


def targets(node: Any) -> Iterator[str]:
    """Yield the values of ``_target_`` in a part of the configuration, without following references."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node)  # not resolved
    if isinstance(node, dict) and "_target_" in node:
        yield str(node["_target_"])
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(child)
