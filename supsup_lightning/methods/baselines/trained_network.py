"""Base class of the baselines, which train the network's own weights."""

from math import prod

import torch
from torch import Tensor, nn

from supsup_lightning.bank.rows import TaskRows, check_names, check_tensor
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.layout import Layout
from supsup_lightning.methods.method import Method, Part


class TrainedNetworkMethod(Method):
    """Base class for your own methods: trains a vector of values and keeps one row per finished task.

    Training starts from the network's own parameters, whose weights are drawn from the seed. Normalisation layers keep
    their running statistics for each task. By default the values are the parameters of ``layout``, one row per task;
    override `live_parameters` to make parameters of them in another way.

    Args:
        network: any module, which stays as it is.
        layout: parameters that are trained; by default all.
        num_values: largest number of values in training.
        row_size: values kept per task.
        identified: as in `Method`.
        weights: at first: one of `WEIGHT_INITIALISERS`, drawn from the seed; ``keep``: the network's own.
        store_weights: put the network's weights into checkpoints and files, where tasks need them.
        seed: of the weights.

    Attributes:
        finished: rows ``(row_size,)`` of values, and of running statistics, by task.
    """

    shares_statistics = False  # all tasks have the running statistics of the last one

    def __init__(
        self,
        network: nn.Module,
        *,
        layout: Layout | None = None,
        num_values: int | None = None,
        row_size: int | None = None,
        identified: tuple[str, ...] = (),
        weights: str = "kaiming_uniform",
        store_weights: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            network,
            layout=layout,
            identified=identified,
            num_values=num_values,
            weights=weights,
            store_weights=store_weights,
            seed=seed,
        )
        self.finished = TaskRows(
            values=(self.live.values.shape[1] if row_size is None else row_size, torch.float32),
            statistics=(0 if self.shares_statistics else self.live.statistics.shape[1], torch.float32),
        )
        self.identity["method"] = type(self).__name__

    # A task's life.

    def begin_task(self, *tasks: int) -> None:
        """Start from the network's own parameters, as drawn from the seed."""
        for task in tasks:
            if task in self.finished:
                raise ConfigurationError(
                    f"Task {task} is finished. To train anew, make a new method; to go on, resume from a checkpoint."
                )
        self.live.begin(tasks, *self._start())

    def _start(self) -> tuple[list[Tensor] | None, Tensor | None]:
        """Initial values and statistics; None to continue from those of the last task."""
        return [self._initial(self.layout)], self.base.fresh_statistics()

    def finish_task(self, *tasks: int) -> None:
        """Store the trained values."""
        self._check_finished(tasks)
        values, statistics = self.live.row(*tasks)
        size = self.finished.get_buffer("statistics").shape[1]
        self.finished.append(self.live.task, values=self._row(values), statistics=statistics[:size])
        self.live.end()

    def live_parameters(self, values: Tensor) -> dict[str, Tensor]:
        """Parameters by name out of the values, ``(num_values,)``."""
        return self.layout.split(values)

    def finished_parameters(self, task: int) -> dict[str, Tensor]:
        """Parameters by name of a finished task, and running statistics. Raises `KeyError` if it is not finished."""
        row = self.finished.read(task, "values")
        statistics = self.live.statistics[0].clone() if self.shares_statistics else None
        kept = self.finished.read(task, "statistics") if statistics is None else statistics
        return {**self._of(task, row), **self.base.statistics_layout.split(kept)}

    def _of(self, task: int, row: Tensor) -> dict[str, Tensor]:
        """Parameters by name of a finished task, from its row."""
        return self.live_parameters(row)

    def _row(self, values: Tensor) -> Tensor:
        """Row to store for the values in training."""
        return values

    def _initial(self, layout: Layout) -> Tensor:
        """The network's own parameters of a layout, as one vector."""
        parameters = dict(self.network.named_parameters())
        return layout.flatten({name: parameters[name].detach() for name in layout.names})

    # What is kept.

    def parts(self) -> list[Part]:
        """Parameters and statistics in the network's order."""
        parts = []
        for name, tensor in self.network.state_dict().items():
            kept, task_bytes = "frozen", 0.0
            if name in self.base.statistics_layout.names:
                if not self.shares_statistics:
                    kept, task_bytes = "statistics", 4.0 * tensor.numel()
            elif name in self.layout.names:
                kept, task_bytes = self._kept_of(name, tuple(tensor.shape))
            parts.append(Part(name, tuple(tensor.shape), kept, None, task_bytes))
        return parts

    def _kept_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
        """How a task keeps this parameter (`Part.kept`), and in how many bytes."""
        return "own", 4.0 * prod(shape)

    def _is_needed(self, name: str) -> bool:
        return super()._is_needed(name) and name not in self.layout.names

    def _check_learned(self, tensors: dict[str, Tensor]) -> None:
        own, rows = self._learned(), self.finished.state_dict()
        check_names(tensors, {*own})
        self.finished.check_state(self._rows(tensors))
        for name, value in own.items():
            if name not in rows and check_tensor(tensors, name, value, "task").shape != value.shape:
                raise MismatchError(
                    f"{name} has shape {tuple(tensors[name].shape)}, {tuple(value.shape)} with this network."
                )
