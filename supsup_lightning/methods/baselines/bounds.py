"""Bounds: a separate network per task, and one network trained on all tasks in turn."""

from collections.abc import Callable
from inspect import signature
from math import ceil

import torch
from torch import Tensor, nn

from supsup_lightning.errors import ConfigurationError, check_whole
from supsup_lightning.layout import ByName, Layout
from supsup_lightning.methods.baselines.trained_network import TrainedNetworkMethod
from supsup_lightning.recipe.recorded import recorded


@recorded
class UpperBound(TrainedNetworkMethod):
    """A separate network per task, with all parameters trained and kept.

    Args:
        network: any module.
        weights: at first: one of `WEIGHT_INITIALISERS`, drawn from the seed, the same for each task; ``keep``: the
            network's own, pretrained ones for example.
        seed: of the weights.

    >>> method = UpperBound(nn.Linear(4, 2))
    >>> method.begin_task(0)
    >>> method.finish_task(0)
    >>> method.task_bytes()
    40
    """

    _needs_base = False

    depends_on_earlier = None

    def __init__(self, network: nn.Module, *, weights: str = "kaiming_uniform", seed: int = 0) -> None:
        super().__init__(network, weights=weights, seed=seed)


@recorded
class SmallNetworks(UpperBound):
    """A separate small network per task that takes no more bytes than one mask over the whole network.

    Is a mask worth more than the same bytes spent on a network that is simply small? (A question of the review.)

    Args:
        network: a function of ``width``, by which it multiplies the sizes of its layers, and for which 1 makes the
            whole network: ``functools.partial(LeNet, output_size=10)``.
        bytes_per_task: at most so many for each task; by default those of a mask over the weights of two or more
            dimensions, and of the running statistics, of the whole network.
        weights: as for `UpperBound`.
        seed: of the weights.

    Attributes:
        width: of the small networks.
        bytes_allowed: for each task.

    Raises:
        ConfigurationError: a network without a width, or bytes that not even the smallest one takes.

    >>> from functools import partial
    >>> from supsup_lightning.networks import LeNet
    >>> method = SmallNetworks(partial(LeNet, output_size=10))
    >>> method.bytes_allowed, method.task_bytes(), method.network[1].out_features
    (33275, 32160, 10)
    """

    def __init__(
        self,
        network: Callable[..., nn.Module],
        *,
        bytes_per_task: int | None = None,
        weights: str = "kaiming_uniform",
        seed: int = 0,
    ) -> None:
        if "width" not in signature(network).parameters:
            made = getattr(network, "func", network)
            raise ConfigurationError(
                "method=small_networks needs a network whose sizes grow with an argument `width`; lenet, fc1024, "
                f"gem_resnet18 and hop_net have it, {getattr(made, '__name__', made)} has not."
            )
        if bytes_per_task is not None:
            bytes_per_task = check_whole("method.bytes_per_task", bytes_per_task)
        whole = _of_width(network, 1.0)
        if bytes_per_task is None:
            statistics = 4 * Layout.of_running_statistics(whole).num_weights
            bytes_per_task = ceil(Layout.of(whole, ByName()).num_weights / 8) + statistics
        low, high = 0.0, 1.0  # of widths: one that fits (0 stands for the smallest), one that does not
        if _num_bytes(whole) <= bytes_per_task:
            low = 1.0
        elif _num_bytes(_of_width(network, low)) > bytes_per_task:
            raise ConfigurationError(
                f"method.bytes_per_task={bytes_per_task} is less than the {_num_bytes(_of_width(network, low))} bytes "
                f"of the smallest {type(whole).__name__}; allow more, or use another network."
            )
        while high - low > 1e-4:  # sizes are integers, so that a finer search finds no other network
            middle = (low + high) / 2
            low, high = (middle, high) if _num_bytes(_of_width(network, middle)) <= bytes_per_task else (low, middle)
        super().__init__(network(width=low), weights=weights, seed=seed)
        self.width = low
        self.bytes_allowed = self.bytes_per_task = bytes_per_task  # the latter under the option's name, for `recorded`
        self._whole_bytes = 4 * sum(parameter.numel() for parameter in whole.parameters())

    def dense_bytes(self) -> int:
        """Bytes of the full-size network."""
        return self._whole_bytes


def _of_width(network: Callable[..., nn.Module], width: float) -> nn.Module:
    """The network at this width on the meta device, for its sizes."""
    with torch.device("meta"):
        return network(width=width)


def _num_bytes(network: nn.Module) -> int:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return 4 * (parameters + Layout.of_running_statistics(network).num_weights)


@recorded
class LowerBound(TrainedNetworkMethod):
    """One network fine-tuned on all tasks in turn; each task overwrites earlier ones.

    There is one set of running statistics, too. A finished task has the network as it is now.

    Args:
        network: any module.
        weights: at first: one of `WEIGHT_INITIALISERS`, drawn from the seed; ``keep``: the network's own.
        seed: of the weights.

    >>> method = LowerBound(nn.Linear(4, 2))
    >>> for task in range(3):
    ...     method.begin_task(task)
    ...     method.finish_task(task)
    >>> method.task_bytes(), method.kept_bytes()
    (0, {'tasks': 24, 'weights': 40})
    """

    _needs_base = False
    shares_statistics = True
    begins_anew = False
    depends_on_earlier = "the method trains the same weights on all tasks in turn"

    def __init__(self, network: nn.Module, *, weights: str = "kaiming_uniform", seed: int = 0) -> None:
        super().__init__(network, row_size=0, weights=weights, seed=seed)

    def _start(self) -> tuple[list[Tensor] | None, Tensor | None]:
        return (None, None) if len(self.finished) else super()._start()

    def _of(self, task: int, row: Tensor) -> dict[str, Tensor]:
        return self.layout.split(self.live.values[0].detach())

    def _row(self, values: Tensor) -> Tensor:
        return values[:0]

    def _kept_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
        return "overwritten", 0.0

    def _learned(self) -> dict[str, Tensor]:
        """The network's values and the tasks that it was trained on."""
        shared = self.shares_statistics and self.live.statistics.numel()
        statistics = {"shared_statistics": self.live.statistics[0]} if shared else {}
        return {**super()._learned(), "weights": self.live.values[0], **statistics}

    def _set_learned(self, tensors: dict[str, Tensor]) -> None:
        super()._set_learned(tensors)
        self.live.values.data[0] = tensors["weights"]
        if "shared_statistics" in tensors:
            self.live.statistics[0] = tensors["shared_statistics"]
