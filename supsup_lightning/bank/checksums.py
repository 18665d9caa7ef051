"""Short digests of what a file holds of each task: they name the task whose part is damaged.

A file has one table of them, ``digests`` ``(2 + tasks, 8)`` uint8: of the lists that say which row is whose, of what
all tasks share, and of each task by ascending number. The SHA-256 in the header covers all of the file, this table too.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TABLE = "digests"
_BYTES = 8
_LISTS, _SHARED = -2, -1  # in place of a task's number

# Per list of tasks, the tables that have a row for each of its entries; -1 in a list stands for all tasks.
ROWS = {
    "tasks": ("packed", "ones", "standardisation", "statistics", "values"),
    "combinations.tasks": ("combinations.coefficients", "combinations.statistics"),
    "gate.tasks": ("gate.labels", "gate.counts", "gate.means"),
    "gate.scatter_tasks": ("gate.scales", "gate.factors", "gate.scatter_counts"),
    "gate.rows.tasks": ("gate.rows.accuracies", "gate.rows.distances"),
}


def table_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Digests of these tensors, ``(2 + tasks, 8)`` uint8.

    >>> table_of({"tasks": torch.tensor([4, 2]), "packed": torch.zeros(2, 3, dtype=torch.uint8)}).shape
    torch.Size([4, 8])
    """
    digests = _digests(tensors)
    return torch.tensor([list(digests[key]) for key in sorted(digests)], dtype=torch.uint8).view(-1, _BYTES)


def damaged(tensors: Mapping[str, Tensor], table: Tensor) -> str | None:
    """Name what does not have the digest that it was written with; None if all of it has.

    Args:
        tensors: contents of a file, without the table itself. They may be damaged in any way.
        table: the table of the file.
    """
    digests = _digests(tensors)
    if table.dtype != torch.uint8 or tuple(table.shape) != (len(digests), _BYTES):
        return "its table of digests, or its list of tasks"
    rows = [bytes(row) for row in table.tolist()]
    wrong = [key for key, row in zip(sorted(digests), rows, strict=True) if digests[key] != row]
    if _LISTS in wrong:
        return "its list of tasks"
    tasks = [key for key in wrong if key >= 0]
    if not tasks:
        return "what all tasks share" if wrong else None
    kind = "mask" if {"packed", "coded"} & tensors.keys() else "part"
    shown = ", ".join(map(str, tasks[:10])) + (f" and {len(tasks) - 10} more" if len(tasks) > 10 else "")
    return f"the {kind} of task {shown}" if len(tasks) == 1 else f"the {kind}s of tasks {shown}"


def _digests(tensors: Mapping[str, Tensor]) -> dict[int, bytes]:
    """Digest by task, and of lists and of what is shared. What does not look like rows of tasks counts as shared."""
    hashed: dict[int, Any] = {_LISTS: hashlib.sha256(), _SHARED: hashlib.sha256()}
    rest = {name: value for name, value in sorted(tensors.items()) if name != TABLE}
    for name, tables in ROWS.items():
        numbers = _numbers(rest.get(name))
        if numbers is None:
            continue
        for task in numbers:
            hashed.setdefault(task, hashlib.sha256())
        _add(hashed[_LISTS], name, rest.pop(name))
        if name == "tasks" and (pieces := _coded(rest, len(numbers))) is not None:
            _add(hashed[_LISTS], "coded_lengths", rest.pop("coded_lengths"))
            for task, piece in zip(numbers, pieces, strict=True):
                _add(hashed[task], "coded", piece)
            del rest["coded"]
        for table in tables:
            value = rest.get(table)
            if value is not None and value.ndim and len(value) == len(numbers):
                for task, row in zip(numbers, rest.pop(table), strict=True):
                    _add(hashed[task], table, row)
    for name, value in rest.items():
        _add(hashed[_SHARED], name, value)
    return {key: each.digest()[:_BYTES] for key, each in hashed.items()}


def _numbers(tasks: Tensor | None) -> list[int] | None:
    if tasks is None or tasks.ndim != 1 or tasks.dtype not in (torch.int32, torch.int64):
        return None
    numbers = tasks.tolist()
    return numbers if all(number >= _SHARED for number in numbers) else None


def _coded(tensors: Mapping[str, Tensor], number: int) -> Iterator[Tensor] | None:
    """The coded masks, ``(bytes,)`` each; None if there are none, or if their lengths do not add up."""
    coded, lengths = tensors.get("coded"), tensors.get("coded_lengths")
    if coded is None or lengths is None or lengths.dtype != torch.int64 or lengths.shape != (number,):
        return None
    sizes = lengths.tolist()
    if coded.ndim != 1 or any(size < 0 for size in sizes) or sum(sizes) != len(coded):
        return None
    return iter(coded.split(sizes)) if sizes else iter(())


def _add(hashed: Any, name: str, value: Tensor) -> None:
    hashed.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
    if value.numel():
        hashed.update(value.contiguous().flatten().view(torch.uint8).numpy())
