"""What methods share that train a network's own weights, for one task or for all of them."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from supsup_lightning.bank import codec
from supsup_lightning.bank.rows import TaskRows, check_names, check_tensor
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.layout import Layout
from supsup_lightning.methods.method import Offer, Part
from supsup_lightning.methods.network_method import NetworkMethod


class TrainedNetworkMethod(NetworkMethod):
    """A vector of values in training, and a row of values for each finished task.

    Training starts from the network's own parameters, whose weights are drawn from the seed. Normalisation layers keep
    their running statistics for each task.

    Args:
        network: any module, which stays as it is.
        num_values: most values that are in training at once.
        row_size: values that are kept of a task.
        identified: as in `NetworkMethod`.
        weights: at first: one of `WEIGHT_INITIALISERS`, drawn from the seed; ``keep``: the network's own.
        store_weights: put the network's weights into checkpoints and files, where tasks need them.
        seed: of the weights.

    Attributes:
        values: ``(num_values,)``, in training.
        finished: rows ``(row_size,)`` of values, and of running statistics, by task.
    """

    offers = frozenset({Offer.EFFECTIVE})
    usual_inference = "inference=exhaustive, or scenario=gg"
    file_format = codec.TRAINED_NETWORK
    shares_statistics = False  # all tasks have the running statistics of the last one
    statistics: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        num_values: int | None = None,
        row_size: int | None = None,
        identified: tuple[str, ...] = (),
        weights: str = "kaiming_uniform",
        store_weights: bool = False,
        seed: int = 0,
    ) -> None:
        everything = Layout.choosing(network, lambda name, parameter: True)
        super().__init__(
            network,
            layout=everything,
            base=Layout.choosing(network, lambda name, parameter: parameter.ndim >= 2),
            identified=identified,
            weights=weights,
            store_weights=store_weights,
            seed=seed,
        )
        num_values = everything.num_weights if num_values is None else num_values
        self.values = nn.Parameter(torch.zeros(num_values, dtype=torch.float32))
        self.finished = TaskRows(
            values=(num_values if row_size is None else row_size, torch.float32),
            statistics=(0 if self.shares_statistics else self.statistics_layout.num_weights, torch.float32),
        )
        self.register_buffer("statistics", self._fresh_statistics())  # of the task in training
        self.identity["method"] = type(self).__name__

    # A task's life.

    def begin_task(self, task: int) -> None:
        """From the network's own parameters, as drawn from the seed."""
        if task in self.finished:
            raise ConfigurationError(
                f"Task {task} is finished. To train anew, make a new method; to go on, resume from a checkpoint."
            )
        with torch.no_grad():
            self._start(task)
        self.values.grad = None
        self.task_in_training = task

    def _start(self, task: int) -> None:
        """Fill in values and statistics that training starts from."""
        self._set_values(self._initial(self.layout))
        self.statistics.copy_(self._fresh_statistics())

    def finish_task(self, task: int) -> None:
        """Keep what was trained."""
        self._check_training(task)
        self._average_statistics(self.statistics)
        statistics = self.statistics[: self.finished.get_buffer("statistics").shape[1]]
        self.finished.append(task, values=self._row(), statistics=statistics)
        self.task_in_training = None

    def trainable(self) -> list[nn.Parameter]:
        """The values, ``(num_values,)``."""
        return [self.values]

    def effective(self, task: int) -> dict[str, Tensor]:
        """Differentiable in the values while the task is in training; afterwards from what is kept."""
        if task == self.task_in_training:
            return {**self._in_training(task), **self._statistics_in_training(self.statistics)}
        row = self.finished.read(task, "values")
        kept = self.statistics.clone() if self.shares_statistics else self.finished.read(task, "statistics")
        return {**self._of(task, row), **self.statistics_layout.split(kept)}

    def _in_training(self, task: int) -> dict[str, Tensor]:
        """Parameters by name out of `values`."""
        return self.layout.split(self.values)

    @abstractmethod
    def _of(self, task: int, row: Tensor) -> dict[str, Tensor]:
        """Parameters by name of a finished task, out of its row."""

    def _row(self) -> Tensor:
        """What is kept of the task in training."""
        return self.values

    def _set_values(self, values: Tensor) -> None:
        """Into the first places; the others are 0."""
        self.values.zero_()
        self.values[: len(values)] = values

    def _initial(self, layout: Layout) -> Tensor:
        """The network's own parameters of a layout, as one vector."""
        parameters = dict(self.network.named_parameters())
        return layout.flatten({name: parameters[name].detach() for name in layout.names})

    # What is kept.

    @property
    def tasks(self) -> Tensor:
        """The finished tasks, ``(k,)`` int64."""
        return self.finished.tasks

    def sparsity(self) -> Tensor:
        """Nothing is switched off: zeros, ``(k,)``."""
        return torch.zeros(len(self.finished), device=self.values.device)

    def task_bytes(self) -> int:
        """Of a row of values and of running statistics."""
        return self.finished.num_bytes()

    def parts(self) -> list[Part]:
        """Parameters and statistics in the network's order."""
        parts = []
        for name, tensor in self.network.state_dict().items():
            kept, task_bytes = "frozen", 0.0
            if name in self.statistics_layout.names:
                if not self.shares_statistics:
                    kept, task_bytes = "statistics", 4.0 * tensor.numel()
            elif name in self.layout.names:
                kept, task_bytes = self._kept_of(name, tuple(tensor.shape))
            parts.append(Part(name, tuple(tensor.shape), kept, None, task_bytes))
        return parts

    @abstractmethod
    def _kept_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
        """What a task keeps of a parameter, in a word of `Part.kept`, and in bytes."""

    def _is_needed(self, name: str) -> bool:
        return super()._is_needed(name) and name not in self.layout.names

    def _learned(self) -> dict[str, Tensor]:
        """The rows; tables of no columns are left out."""
        return {name: value for name, value in self.finished.state_dict().items() if value.ndim == 1 or value.shape[1]}

    def _check_learned(self, tensors: dict[str, Tensor]) -> None:
        own, rows = self._learned(), self.finished.state_dict()
        shared = {name: value for name, value in own.items() if name not in rows}
        check_names(tensors, {*own})
        self.finished.check_state(self._rows(tensors))
        for name, value in shared.items():
            if check_tensor(tensors, name, value, "task").shape != value.shape:
                raise MismatchError(
                    f"{name} has shape {tuple(tensors[name].shape)}, {tuple(value.shape)} with this network."
                )

    def _set_learned(self, tensors: dict[str, Tensor]) -> None:
        """The rows from a file."""
        self.finished.load_state_dict(self._rows(tensors))

    def _rows(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of `finished`; tables of no columns are in no file."""
        none = torch.empty(tensors["tasks"].numel(), 0)
        return {name: tensors.get(name, none) for name in self.finished.state_dict()}
