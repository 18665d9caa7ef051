"""The tasks in training: one object that holds them, whether it is one or several in the same step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from supsup_lightning.bank.rows import check_tensor
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError

Call = Callable[[dict[str, Tensor], Tensor], Tensor]


class LiveTasks(nn.Module):
    """Values and running statistics of the tasks in training, one row per task; part of `state_dict`.

    There is always a leading dimension of tasks. Only this class decides how the network is called: directly for a
    single task, and through `torch.func.vmap` for several.

    Args:
        num_values: trained values per task.
        statistics: ``(statistics,)`` float32, running statistics of normalisation layers that a task starts from.
        compile: call the network through `torch.compile`.

    Attributes:
        tasks: task of each row that is in use; empty between two tasks.
        values: ``(rows, num_values)`` float32.
        statistics: ``(rows, statistics)`` float32.

    >>> live = LiveTasks(2, torch.zeros(0))
    >>> live.begin((3,), [torch.ones(2)])
    >>> live.tasks, live.values.tolist()
    ((3,), [[1.0, 1.0]])
    """

    values: nn.Parameter
    statistics: Tensor

    def __init__(self, num_values: int, statistics: Tensor, *, compile: bool = False) -> None:
        super().__init__()
        self.tasks: tuple[int, ...] = ()
        self.values = nn.Parameter(torch.zeros(1, num_values, dtype=torch.float32))
        self.register_buffer("statistics", statistics.unsqueeze(0).clone())
        self.compile_network = compile
        self._compiled: dict[bool, Call] = {}

    @property
    def task(self) -> int:
        """The single task in training. Raises `ConfigurationError` if there is none, or several."""
        if len(self.tasks) != 1:
            raise ConfigurationError(
                "No task has begun: give the Trainer the callbacks of `model.task_callbacks(data)` "
                "(or supsup_lightning.callbacks.TaskBoundary, in scenario NNs TaskDiscovery)."
            )
        return self.tasks[0]

    @property
    def rows(self) -> int:
        """Number of tasks that can be trained in the same step."""
        return self.values.shape[0]  # `len` of a tensor takes five calls more, in every step

    def make_room(self, rows: int) -> None:
        """Allocate so many rows. Optimizers have to be made again if their number changes."""
        if rows != self.rows:
            self.values = nn.Parameter(self.values.new_zeros(rows, self.values.shape[1]))
            self.statistics = self.statistics.new_zeros(rows, self.statistics.shape[1])

    @torch.no_grad()
    def begin(
        self, tasks: Sequence[int], values: Iterable[Tensor] | None = None, statistics: Tensor | None = None
    ) -> None:
        """Start training tasks.

        Args:
            tasks: at most as many as there are rows.
            values: initial values of each task, ``(n,)`` with ``n <= num_values``; the remaining ones are 0. None keeps
                the present ones.
            statistics: initial running statistics, ``(statistics,)``; None keeps the present ones.
        """
        if len(tasks) > self.rows:
            raise ConfigurationError(
                f"{len(tasks)} tasks cannot be trained in the same step: there is room for {self.rows}. Call "
                "`model.plan_training(data)`, or make_room, first."
            )
        if values is not None:
            self.values.zero_()
            for row, initial in enumerate(values):
                self.values[row, : len(initial)] = initial
        if statistics is not None:
            self.statistics.copy_(statistics)
        self.values.grad = None
        self.tasks = tuple(tasks)

    def check(self, tasks: Sequence[int]) -> None:
        """Raise `KeyError` unless exactly these tasks are in training."""
        if tuple(tasks) != self.tasks:
            raise KeyError(f"Tasks {list(tasks)} are not in training (in training: {list(self.tasks) or 'none'}).")

    def end(self) -> None:
        """No task is in training any more; values and statistics stay as they are."""
        self.tasks = ()

    def row(self, task: int) -> tuple[Tensor, Tensor]:
        """Values ``(num_values,)`` and statistics ``(statistics,)`` of one task in training, as views."""
        row = self.tasks.index(task)
        return self.values[row], self.statistics[row]

    def current(self) -> tuple[Tensor, Tensor]:
        """Values ``(tasks, num_values)`` and statistics ``(tasks, statistics)`` of all tasks in training, as views.

        With room for a single task, there is no leading dimension, so that the network runs without `vmap`.
        """
        if self.rows == 1:
            return self.values.squeeze(0), self.statistics.squeeze(0)
        count = len(self.tasks)
        return (self.values, self.statistics) if count == self.rows else (self.values[:count], self.statistics[:count])

    def run(self, call: Call, parameters: dict[str, Tensor], images: Tensor, *, updated: Sequence[str]) -> Tensor:
        """Logits ``(tasks, batch, output_size)`` of all tasks in training.

        Args:
            call: from parameters by name and images ``(batch, *shape)`` to logits ``(batch, output_size)``.
            parameters: made from `current`.
            images: ``(tasks, batch, *shape)``.
            updated: names of the parameters that ``call`` changes in place (running statistics).
        """
        if self.rows == 1:
            return self._maybe_compiled(call, several=False)(parameters, images.squeeze(0)).unsqueeze(0)
        # Under vmap, layers update statistics in place only where these are contiguous.
        copies = {name: parameters[name].clone(memory_format=torch.contiguous_format) for name in updated}
        logits = self._maybe_compiled(call, several=True)({**parameters, **copies}, images)
        for name, copy in copies.items():
            parameters[name].copy_(copy)
        return logits

    def _maybe_compiled(self, call: Call, *, several: bool) -> Call:
        if not self.compile_network:
            return vmap(call) if several else call
        if several not in self._compiled:
            self._compiled[several] = torch.compile(vmap(call) if several else call)
        return self._compiled[several]

    def average_statistics(self) -> None:
        """Average the statistics over processes in place, as each process has seen its share of every batch."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.statistics)
            self.statistics /= torch.distributed.get_world_size()

    # State: loadable at any number of rows.

    def check_state(self, stored: dict[str, Any]) -> None:
        """Raise `DataError` or `MismatchError` for a state that is damaged or belongs to another network."""
        for name in ("values", "statistics"):
            own = getattr(self, name)
            value = check_tensor(stored, name, own, "task in training")
            if value.shape[1] != own.shape[1]:
                raise MismatchError(
                    f"The stored state belongs to another network: {name} has {value.shape[1]} columns, not "
                    f"{own.shape[1]}."
                )
        tasks = stored["_extra_state"].get("tasks") if isinstance(stored.get("_extra_state"), dict) else None
        rows = len(stored["values"])
        if not isinstance(tasks, list | tuple) or not len(tasks) <= rows == len(stored["statistics"]):
            raise DataError(
                f"The stored state of the tasks in training is damaged: tasks {tasks}, {rows} rows of values and "
                f"{len(stored['statistics'])} of statistics."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}values" in state_dict:
            self.make_room(len(state_dict[f"{prefix}values"]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_extra_state(self) -> dict[str, Any]:
        """The tasks, into `state_dict`."""
        return {"tasks": self.tasks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The tasks, from `state_dict`."""
        self.tasks = tuple(state["tasks"])

    def __getstate__(self) -> dict[str, Any]:
        """State without compiled functions, which belong to this object."""
        return {**self.__dict__, "_compiled": {}}
