"""Tables of finished tasks, with one row per task."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from supsup_lightning.errors import DataError, MismatchError

_MOST_TASKS = 2**31  # a larger number is more likely a damaged bit than a task


class TaskRows(nn.Module):
    """Rows of one or more tables, by task id. `load_state_dict` accepts any number of rows.

    Args:
        columns: length and type of a row, by the name of the table.

    Attributes:
        tasks: ``(tasks,)`` int64, the task of each row, in the order in which they were added. The tables, each
            ``(tasks, length)``, are buffers under their names.

    >>> rows = TaskRows(values=(2, torch.float32))
    >>> rows.append(7, values=torch.tensor([1.0, 2.0]))
    >>> len(rows), 7 in rows, rows.read(7, "values").tolist()
    (1, True, [1.0, 2.0])
    """

    tasks: Tensor
    kind = "row"  # what a task has, for messages

    def __init__(self, **columns: tuple[int, torch.dtype]) -> None:
        super().__init__()
        self.columns = tuple(columns)
        for name, (length, dtype) in columns.items():
            self.register_buffer(name, torch.empty(0, length, dtype=dtype))
        self.register_buffer("tasks", torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.tasks)

    def __contains__(self, task: int) -> bool:
        return bool((self.tasks == task).any())

    def append(self, task: int, **rows: Tensor) -> None:
        """Store one row ``(length,)`` for each table. Raises `KeyError` if the task has rows already."""
        if task in self:
            raise KeyError(f"Task {task} has a {self.kind} already; replace or remove it.")
        for name in self.columns:
            table = self.get_buffer(name)
            row = rows[name].detach().to(table)
            if row.shape != table.shape[1:]:
                raise ValueError(f"A task here has {tuple(table.shape[1:])} {name}; got {tuple(row.shape)}.")
            setattr(self, name, torch.cat([table, row.unsqueeze(0)]))
        self.tasks = torch.cat([self.tasks, self.tasks.new_tensor([task])])

    def read(self, task: int, name: str) -> Tensor:
        """Return a copy of the row of ``task`` in one table, ``(length,)``. Raises `KeyError` if it has none."""
        return self.get_buffer(name)[self.row(task)].clone()

    def remove(self, task: int) -> None:
        """Remove the rows of ``task``. Raises `KeyError` if it has none."""
        kept = torch.arange(len(self), device=self.tasks.device) != self.row(task)
        for name in (*self.columns, "tasks"):
            setattr(self, name, self.get_buffer(name)[kept])

    def row(self, task: int) -> int:
        """Return the row number of ``task``. Raises `KeyError` if it has none."""
        rows = (self.tasks == task).nonzero()
        if not len(rows):
            raise KeyError(f"Task {task} has no {self.kind}; there are {len(self)} finished tasks here.")
        return int(rows[0])

    def num_bytes(self) -> int:
        """Bytes stored per task, without its number."""
        tables = [self.get_buffer(name) for name in self.columns]
        return sum(table.shape[1] * table.itemsize for table in tables)

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Check a state before any of it is loaded.

        Raises:
            MismatchError: rows of another length.
            DataError: a damaged state.
        """
        check_tasks(stored, self.kind)
        for name in self.columns:
            value, own = check_tensor(stored, name, self.get_buffer(name), self.kind), self.get_buffer(name)
            if value.shape[1:] != own.shape[1:]:
                raise MismatchError(
                    f"What is stored has {tuple(value.shape[1:])} {name} per task, this network "
                    f"{tuple(own.shape[1:])}: it was made with another network."
                )
            if len(value) != len(stored["tasks"]):
                raise DataError(f"What is stored is damaged: {len(value)} rows of {name} for {len(stored['tasks'])}.")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.check_state({name: state_dict.get(prefix + name) for name in (*self.columns, "tasks")})
        # Buffers grow, so loading takes on the stored number of rows first; the default would refuse the size.
        for name in (*self.columns, "tasks"):
            setattr(self, name, self.get_buffer(name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_tensor(stored: Mapping[str, Any], name: str, own: Tensor, kind: str) -> Tensor:
    """Return the tensor ``name``, checked to be finite and of the type and number of dimensions of ``own``.

    Raises:
        DataError: no tensor, or another kind of tensor. ``kind`` names in the message what is stored.
    """
    value = stored.get(name)
    if not isinstance(value, Tensor):
        raise DataError(f"What is stored of each {kind} is damaged: {name} is missing.")
    if not same_kind(value, own) or value.ndim != own.ndim:
        raise DataError(
            f"What is stored of each {kind} is damaged: {name} is {value.dtype} of shape {tuple(value.shape)}."
        )
    if value.is_floating_point() and not value.isfinite().all():
        raise DataError(f"What is stored of each {kind} is damaged: {name} has values that are NaN or infinite.")
    return value


def same_kind(value: Tensor, own: Tensor) -> bool:
    """Whether ``value`` is a dense tensor with data, of a type that can be copied to ``own``."""
    same_type = value.is_floating_point() if own.is_floating_point() else value.dtype == own.dtype
    return same_type and value.layout == torch.strided and not value.is_meta


def check_tasks(stored: Mapping[str, Any], kind: str, name: str = "tasks") -> None:
    """Raise `DataError` unless the tensor ``name`` holds distinct task numbers from 0."""
    tasks = check_tensor(stored, name, torch.empty(0, dtype=torch.int64), kind)
    if (tasks < 0).any() or (tasks >= _MOST_TASKS).any() or len(tasks.unique()) != len(tasks):
        raise DataError(f"What is stored of each {kind} is damaged: {name} are not numbers from 0 on, each once.")


def check_names(stored: Mapping[str, Any], needed: set[str], *, optional: AbstractSet[str] = frozenset()) -> None:
    """Raise `DataError` if a needed tensor is missing, or if one is neither needed nor optional."""
    missing, extra = sorted(needed - stored.keys()), sorted(stored.keys() - needed - optional)
    if missing or extra:
        raise DataError(f"{', '.join(missing) or 'nothing'} missing, {', '.join(extra) or 'nothing'} in excess.")
