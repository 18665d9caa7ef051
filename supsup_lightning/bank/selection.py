"""Some tasks of a file, in any order and under other numbers, without the network: rows are moved, never computed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from supsup_lightning.bank.checksums import ROWS
from supsup_lightning.errors import ConfigurationError

_ALL = -1  # in place of a task's number: what all tasks share

# As `checksums.ROWS`, with the tables of a gate that are counted there among what all tasks share.
_TABLES = {
    **ROWS,
    "gate.mask_rows.tasks": tuple(f"gate.mask_rows.{name}" for name in ("objective", "scale", "found", "images")),
    "gate.relative_rows.tasks": ("gate.relative_rows.distances",),
}
_NUMBERS = (*_TABLES, "combinations.masks")


def finished_tasks(tensors: Mapping[str, Tensor]) -> list[int]:
    """Numbers of a file's tasks: masks, then combinations; a Hopfield memory has them in order."""
    if "tasks" not in tensors:
        return [*range(int(tensors["memory.num_patterns"]))]
    return [*tensors["tasks"].tolist(), *tensors.get("combinations.tasks", torch.empty(0, dtype=torch.int64)).tolist()]


def selected(tensors: Mapping[str, Tensor], tasks: Sequence[int]) -> dict[str, Tensor]:
    """Return a file's tensors with these tasks alone, in this order.

    Args:
        tensors: of a file, masks coded or not.
        tasks: numbers of tasks, each once.

    Raises:
        ConfigurationError: a task that is left out is part of a combination.

    >>> tensors = {"tasks": torch.tensor([4, 2, 7]), "packed": torch.tensor([[40], [20], [70]], dtype=torch.uint8)}
    >>> {name: value.tolist() for name, value in selected(tensors, [2, 4]).items()}
    {'tasks': [2, 4], 'packed': [[20], [40]]}
    """
    result = dict(tensors)
    for name, tables in _TABLES.items():
        if name not in tensors:
            continue
        numbers = tensors[name]
        rows = torch.cat([(numbers == task).nonzero().flatten() for task in (_ALL, *tasks)])
        result[name] = numbers[rows]
        for table in tables:
            if table in tensors and len(tensors[table]) == len(numbers):
                result[table] = tensors[table][rows]
        if name == "tasks" and "coded" in tensors:
            pieces = tensors["coded"].split(tensors["coded_lengths"].tolist())
            result["coded"] = torch.cat([tensors["coded"][:0], *(pieces[row] for row in rows.tolist())])
            result["coded_lengths"] = tensors["coded_lengths"][rows]
    if "combinations.masks" in tensors:
        _drop_masks(result, {*tasks})
    return result


def _drop_masks(tensors: dict[str, Tensor], tasks: set[int]) -> None:
    """Take the columns of masks that are left out from the combinations; in place."""
    masks, coefficients = tensors["combinations.masks"], tensors["combinations.coefficients"]
    kept = torch.tensor([task in tasks for task in masks.tolist()], dtype=torch.bool)
    if (used := masks[~kept & coefficients.any(0)].tolist()) and len(coefficients):
        combined = tensors["combinations.tasks"][coefficients[:, ~kept].any(1)].tolist()
        raise ConfigurationError(
            f"The masks of tasks {', '.join(map(str, used))} are part of the combinations of tasks "
            f"{', '.join(map(str, combined))}, which cannot do without them; remove these as well."
        )
    tensors["combinations.masks"], tensors["combinations.coefficients"] = masks[kept], coefficients[:, kept]
    if not len(tensors["combinations.tasks"]):
        for name in [name for name in tensors if name.startswith("combinations.")]:
            del tensors[name]


def renumbered(tensors: Mapping[str, Tensor], numbers: Mapping[int, int]) -> dict[str, Tensor]:
    """Return a file's tensors with other numbers for its tasks.

    Args:
        tensors: of a file.
        numbers: the new number of every task.
    """
    result = dict(tensors)
    for name in _NUMBERS:
        if name in tensors:
            new = [numbers.get(task, task) for task in tensors[name].tolist()]
            result[name] = tensors[name].new_tensor(new)
    return result


def images_of_removed_tasks(tensors: Mapping[str, Tensor]) -> int:
    """Number of images in the scatter matrix that all tasks share, of tasks that are there no more."""
    shared = tensors.get("gate.scatter_tasks", torch.empty(0, dtype=torch.int64)) == _ALL
    if not shared.any():
        return 0
    return int(tensors["gate.scatter_counts"][shared].sum() - tensors["gate.counts"].sum())
