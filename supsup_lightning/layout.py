"""All masked weights of a network as one flat vector: where each parameter lies in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from supsup_lightning.errors import ConfigurationError

MaskRule = Callable[[str, Tensor], bool]


def at_least_two_dimensions(name: str, parameter: Tensor) -> bool:
    """The default rule for what is masked: weights of linear, convolution and attention layers, not biases or gains."""
    return parameter.ndim >= 2


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the masked parameters, in the network's order.

    One flat vector keeps a task's scores one tensor, a mask one row of bits, and a training step a few large
    operations instead of a few per layer.

    >>> layout = Layout.of(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> layout.names, layout.sizes, layout.num_weights
    (('0.weight', '2.weight'), (12, 6), 18)
    >>> {name: tuple(view.shape) for name, view in layout.split(torch.zeros(18)).items()}
    {'0.weight': (3, 4), '2.weight': (2, 3)}
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, network: nn.Module, is_masked: MaskRule = at_least_two_dimensions) -> "Layout":
        """The layout of the parameters for which ``is_masked(name, parameter)`` holds.

        Raises:
            ConfigurationError: no parameter is masked.
        """
        masked = {name: tuple(p.shape) for name, p in network.named_parameters() if is_masked(name, p)}
        if not masked:
            every = ", ".join(f"{name} {tuple(p.shape)}" for name, p in network.named_parameters()) or "none"
            raise ConfigurationError(
                f"No parameter of {type(network).__name__} is masked (its parameters: {every}). "
                "Masks need at least one weight with two or more dimensions, or another rule for what is masked."
            )
        return cls(tuple(masked), tuple(masked.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of weights in each masked parameter."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def num_weights(self) -> int:
        """Number of masked weights in all."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """``(..., weights)`` to one view ``(..., *shape)`` a parameter."""
        batch = flat.shape[:-1]
        parts = flat.split(self.sizes, dim=-1)
        return {
            name: part.view(*batch, *shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor], *, batch_dims: int = 0) -> Tensor:
        """One tensor ``(*batch, *shape)`` a parameter, by name or in order, to ``(*batch, weights)``."""
        parts = [tensors[name] for name in self.names] if isinstance(tensors, Mapping) else list(tensors)
        return torch.cat([part.flatten(batch_dims) for part in parts], dim=-1)
