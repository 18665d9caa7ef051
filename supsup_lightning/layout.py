"""Layout of a network's masked weights in one flat vector: the parameters, and the place of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.recipe.recorded import recorded

_MOST_NAMES = 12  # in a message

MaskRule = Callable[[str, Tensor], bool]


@recorded
@dataclass(frozen=True)
class ByName:
    """Rule of which parameters are masked, by name and number of dimensions.

    By default the weights of linear, convolution, recurrent and attention layers, and neither biases nor gains.

    Attributes:
        include: patterns of names, as in a shell (``*`` stands for anything); one of them must match.
        exclude: patterns of names, none of which may match.
        min_dimensions: a parameter of fewer dimensions is not masked.
        max_dimensions: a parameter of more dimensions is not masked; None for any number.

    >>> is_masked = ByName(exclude=("head.*",))
    >>> is_masked("body.weight", torch.zeros(2, 2)), is_masked("body.bias", torch.zeros(2))
    (True, False)
    >>> is_masked("head.weight", torch.zeros(2, 2))
    False
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    min_dimensions: int = 2
    max_dimensions: int | None = None

    def __post_init__(self) -> None:
        for option in ("include", "exclude"):
            if isinstance(getattr(self, option), str):
                raise ConfigurationError(
                    f"mask.{option}={getattr(self, option)!r} must be a list of patterns, such as [layer1.*,*.weight]."
                )

    def __call__(self, name: str, parameter: Tensor) -> bool:
        """Whether this parameter is masked."""
        return (
            parameter.ndim >= self.min_dimensions
            and (self.max_dimensions is None or parameter.ndim <= self.max_dimensions)
            and any(fnmatchcase(name, pattern) for pattern in self.include)
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        )

    def check(self, names: Sequence[str]) -> None:
        """Raise `ConfigurationError` for a pattern that matches no name of a network, and is probably mistyped."""
        for option in ("include", "exclude"):
            for pattern in getattr(self, option):
                if not any(fnmatchcase(name, pattern) for name in names):
                    shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
                    raise ConfigurationError(
                        f"mask.{option}: the pattern {pattern!r} matches no parameter of the network; it has {shown} "
                        "(print_masked=true shows all)."
                    )


@recorded
@dataclass(frozen=True)
class Named:
    """Rule that masks the parameters of these names, as a file has it in place of a function of your own.

    Attributes:
        names: of the parameters.

    >>> Named(["0.weight"])("0.weight", torch.zeros(2))
    True
    """

    names: Sequence[str]

    def __call__(self, name: str, parameter: Tensor) -> bool:
        """Whether this parameter is masked."""
        return name in self.names


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the masked parameters, in the network's order.

    One flat vector keeps a task's scores one tensor, a mask one row of bits, and a training step a few large
    operations instead of a few per layer.

    >>> layout = Layout.of(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), ByName())
    >>> layout.names, layout.sizes, layout.num_weights
    (('0.weight', '2.weight'), (12, 6), 18)
    >>> {name: tuple(view.shape) for name, view in layout.split(torch.zeros(18)).items()}
    {'0.weight': (3, 4), '2.weight': (2, 3)}
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, network: nn.Module, is_masked: MaskRule) -> "Layout":
        """Make the layout of the parameters for which ``is_masked(name, parameter)`` holds; tied ones count once.

        Raises:
            ConfigurationError: no parameter is masked, or a pattern of the rule matches none.
        """
        _check_replaceable(network)
        if isinstance(is_masked, ByName):
            is_masked.check([name for name, _ in network.named_parameters()])
        layout = cls.choosing(network, is_masked)
        if not layout.names:
            every = ", ".join(f"{name} {tuple(p.shape)}" for name, p in network.named_parameters()) or "none"
            wanted = "parameter that the rule names"
            if isinstance(is_masked, ByName):
                least, most = is_masked.min_dimensions, is_masked.max_dimensions
                dimensions = (
                    f"{least} or more" if most is None else f"{least}" if most == least else f"{least} to {most}"
                )
                wanted = (
                    f"parameter of {dimensions} dimensions (mask.min_dimensions, mask.max_dimensions) that "
                    "mask.include names and mask.exclude does not"
                )
            raise ConfigurationError(
                f"No parameter of {type(network).__name__} is masked (its parameters: {every}). Masks need at least "
                f"one {wanted}."
            )
        return layout

    @classmethod
    def choosing(cls, network: nn.Module, is_chosen: MaskRule) -> "Layout":
        """Make the layout of the floating-point parameters for which ``is_chosen`` holds; it may be empty.

        Raises:
            ConfigurationError: a network whose parameters cannot be replaced, or a chosen one that is complex.
        """
        _check_replaceable(network)
        chosen = {}
        for name, parameter in network.named_parameters():
            if (parameter.is_floating_point() or parameter.is_complex()) and is_chosen(name, parameter):
                if parameter.is_complex():
                    raise ConfigurationError(
                        f"The parameter {name} is complex, and tasks are made of real ones. Keep it as two real "
                        "numbers (torch.view_as_real where it is made, torch.view_as_complex in forward), "
                        f"or, where tasks are masks, leave it out by mask.exclude=[{name}]."
                    )
                chosen[name] = tuple(parameter.shape)
        return cls(tuple(chosen), tuple(chosen.values()))

    @classmethod
    def of_running_statistics(cls, network: nn.Module) -> "Layout":
        """Make the layout of the buffers that normalisation layers change in training; empty if there are none."""
        buffers = {
            f"{layer}.{name}" if layer else name: tuple(buffer.shape)
            for layer, module in network.named_modules()
            if getattr(module, "running_mean", None) is not None
            for name, buffer in module.named_buffers(recurse=False)
        }
        return cls(tuple(buffers), tuple(buffers.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of weights in each masked parameter."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def num_weights(self) -> int:
        """Total number of masked weights."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a flat tensor ``(..., weights)`` into one view ``(..., *shape)`` per parameter."""
        batch = flat.shape[:-1]
        parts = flat.split(self.sizes, dim=-1) if self.names else ()
        return {
            name: part.view((*batch, *shape)) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor], *, batch_dims: int = 0) -> Tensor:
        """Join one tensor ``(*batch, *shape)`` per parameter, by name or in order, to ``(*batch, weights)``."""
        parts = [tensors[name] for name in self.names] if isinstance(tensors, Mapping) else list(tensors)
        # `reshape`, because `flatten` would merge the last batch dimension for scalar parameters.
        return torch.cat([part.reshape(*part.shape[:batch_dims], -1) for part in parts], dim=-1)


def _check_replaceable(network: nn.Module) -> None:
    """Raise `ConfigurationError` for a network whose parameters cannot be replaced during a call."""
    for name, layer in network.named_modules():
        where = f"{type(network).__name__}, in {name}," if name else "The network"
        if isinstance(layer, torch.jit.ScriptModule):
            raise ConfigurationError(
                f"{where} is scripted, so that no task can put its parameters in; give the module that it was made of."
            )
        if isinstance(layer, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ConfigurationError(
                f"{where} is wrapped in {type(layer).__name__}, which keeps parameters of its own; give the network "
                "inside (its .module), and trainer.strategy=ddp for several processes."
            )
        tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
        if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
            raise ConfigurationError(
                f"{where} has parameters whose shapes are not known yet (a lazy layer). Pass a batch through the "
                "network before it is given to a method: network(torch.zeros(2, *input_shape))."
            )
