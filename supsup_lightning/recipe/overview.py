"""What a file of finished tasks says of itself, as plain values: the whole, each task, and whether it is sound."""

from pathlib import Path
from typing import Any

from torch import nn

from supsup_lightning.bank import codec
from supsup_lightning.bank.codec import Contents
from supsup_lightning.bank.selection import finished_tasks
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.module import ContinualModule
from supsup_lightning.recipe import contents as recipes
from supsup_lightning.recipe.changed_file import read, recipe_of
from supsup_lightning.recipe.loading import load
from supsup_lightning.recipe.recorded import LACKS, TARGET
from supsup_lightning.recipe.task_names import names_of, tasks_are_known


def info(path: str | Path, *, trust: bool = False, network: nn.Module | None = None) -> dict[str, Any]:
    """Describe a file.

    Bytes per task and by part, and the sparsity, are None where the network can only be made if it is trusted, or
    handed over; ``note`` then says why.

    Args:
        path: path of the file.
        trust: as for `load`.
        network: likewise.

    Raises:
        DataError: the file is missing or damaged, or says nothing of itself.
    """
    contents, module, note = _opened(path, trust=trust, network=network)
    with recipe_of(path):
        recipe = contents.recipe or {}
        rows = _rows(contents, module)
        counts = [len(row["classes"]) if row["classes"] else row["num_classes"] for row in rows]
        method = _described(recipe["method"])
        sparsity = [row["sparsity"] for row in rows]
        return {
            "file": str(path),
            "format": contents.file_format,
            "network": _described(recipe["network"]),
            "method": method,
            "scenario": recipe["scenario"].get("name"),
            "inference": _described(recipe["inference"]),
            "seed": int(contents.identity["seed"]) if "seed" in contents.identity else None,
            "num_tasks": len(rows),
            "num_classes": sum(counts),
            "classes_per_task": [min(counts, default=0), max(counts, default=0)],
            "bytes": {
                "file": Path(path).stat().st_size,
                "per_task": None if module is None else module.method.task_bytes(),
                "parts": None if module is None else module.method.kept_bytes(),
            },
            "sparsity": None if module is None else _average(sparsity),
            "accuracy": {name: _average([row[name] for row in rows]) for name in ("validation", "test")},
            "versions": recipe["versions"],
            "note": note,
        }


def tasks(path: str | Path, *, trust: bool = False, network: nn.Module | None = None) -> list[dict[str, Any]]:
    """Describe each task of a file: number, name, classes, accuracies at training time, sparsity.

    Args and Raises: as `info`.
    """
    contents, module, _ = _opened(path, trust=trust, network=network)
    with recipe_of(path):
        return _rows(contents, module)


def verify(path: str | Path, *, trust: bool = False, network: nn.Module | None = None) -> str:
    """Check all checksums of a file, its recipe, and the logits of the network made from it.

    Args:
        path: path of the file.
        trust: as for `load`.
        network: likewise.

    Returns:
        What was checked, in one line.

    Raises:
        DataError: it is damaged; the message names the part.
        MismatchError: the network does not compute what was trained.
        ConfigurationError: its checksums are right, and the network can only be made if it is trusted.
    """
    contents = read(path)
    try:
        module = load(path, trust=trust, network=network)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"The checksums and the recipe of {path} are right, and its network was not checked. {error}"
        ) from error
    with recipe_of(path):
        logits = sorted(map(int, (contents.recipe or {})["fingerprint"]))
    compared = f"the logits of task {' and '.join(map(str, logits))} are those of training"
    checked = "all checksums" if codec.has_digest(path) else "no checksum, as an earlier version wrote it"
    return (
        f"{path} is sound: {len(module.method.tasks)} tasks; {checked}, the recipe and the weights of "
        f"{type(module.method.network).__name__}; {compared if logits else 'it has no logits to compare with'}"
    )


def _opened(
    path: str | Path, *, trust: bool, network: nn.Module | None
) -> tuple[Contents, ContinualModule | None, str | None]:
    contents = read(path)
    try:
        return contents, load(path, trust=trust, network=network), None
    except (ConfigurationError, MismatchError) as error:
        return contents, None, f"The network was not made, and sparsity and bytes are not known: {error}"


def _rows(contents: Contents, module: ContinualModule | None) -> list[dict[str, Any]]:
    recipe = contents.recipe or {}
    numbers = finished_tasks(contents.tensors)
    names, known, by_number = names_of(recipe, numbers), recipes.tasks_of(recipe), tasks_are_known(recipe)
    sparsity = [None] * len(numbers) if module is None else module.method.sparsity().tolist()
    rows = []
    for task, share in zip(numbers, sparsity, strict=True):
        counts = recipe["num_classes"]
        row = {
            "task": task,
            "name": names[task],
            "classes": [*known[task].classes] if by_number and task < len(known) else [],
            "num_classes": counts[task] if by_number else max(counts),
            "sparsity": share,
        }
        for name in ("validation", "test"):
            row[name] = recipe["accuracy"].get(name, {}).get(str(task))
        rows.append(row)
    return sorted(rows, key=lambda row: row["task"])


def _described(description: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: value for name, value in description.items() if name not in (TARGET, LACKS)}
    return {"class": description[TARGET], "arguments": arguments}


def _average(values: list[float | None]) -> float | None:
    """Mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
