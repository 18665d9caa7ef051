"""Separate heads: tasks share a trunk; each has its own last layer."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor, nn

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.layout import Layout
from supsup_lightning.methods.baselines.trunk import TrunkMethod
from supsup_lightning.recipe.recorded import recorded


@recorded
class SeparateHeads(TrunkMethod):
    """One trunk, trained on the first task or left random; a task is a last layer.

    Args:
        network: any module.
        trunk: ``trained`` on the first task, together with its head, and frozen from then on; or ``random``.
        head: patterns of the head's parameters; by default all of the layer with the last weight of two or more
            dimensions.
        learning_rate: of heads alone, in place of the optimizer's, which is for a trunk; None for the optimizer's.
        weights: at first: one of `WEIGHT_INITIALISERS`, drawn from the seed; ``keep``: the network's own.
        store_weights: with a random trunk, put it into checkpoints and files.
        seed: of the weights.

    Raises:
        ConfigurationError: an option that is unknown, or a head that is all of the network.

    >>> method = SeparateHeads(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
    >>> method.head.names, method.task_bytes()
    (('2.weight', '2.bias'), 40)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        trunk: str = "trained",
        head: Sequence[str] | None = None,
        learning_rate: float | None = 0.01,
        weights: str = "kaiming_uniform",
        store_weights: bool = False,
        seed: int = 0,
    ) -> None:
        names = _last_layer(network) if head is None else _named(network, head)
        own = Layout.choosing(network, lambda name, parameter: name in names)
        shared = Layout.choosing(network, lambda name, parameter: name not in names)
        if not shared.names:
            raise ConfigurationError(
                f"method.head={names} is all of {type(network).__name__}, which leaves no trunk to share; name fewer "
                "parameters (print_masked=true shows them), or use method=upper_bound."
            )
        super().__init__(
            network,
            trunk=trunk,
            shared=shared,
            row_size=own.num_weights,
            learning_rate=learning_rate,
            weights=weights,
            store_weights=store_weights,
            seed=seed,
        )
        self.head = own

    def _initial_row(self) -> Tensor:
        """The network's own last layer."""
        return self._initial(self.head)

    def _combined(self, row: Tensor, trunk: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**trunk, **self.head.split(row)}

    def _kept_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
        return ("own", 4.0 * prod(shape)) if name in self.head.names else self._kept_of_trunk()


def _named(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of parameters that match one of these patterns, each of which has to match some."""
    if isinstance(patterns, str):
        raise ConfigurationError(f"method.head={patterns!r} must be a list of patterns, such as [fc.*].")
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(
                f"method.head: the pattern {pattern!r} matches no parameter of the network (print_masked=true shows "
                "them)."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _last_layer(network: nn.Module) -> list[str]:
    """Names of the parameters beside the last weight."""
    weights = Layout.choosing(network, lambda name, parameter: parameter.ndim >= 2).names
    if not weights:
        raise ConfigurationError(f"{type(network).__name__} has no weight, and so no head; name one in method.head.")
    layer = weights[-1].rpartition(".")[0]
    return [name for name, _ in network.named_parameters() if name.rpartition(".")[0] == layer]
