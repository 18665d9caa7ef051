"""Frozen feature maps: images to ``(batch, features)``, drawn from a seed, so that they cost no bytes.

hidden       inputs of the masked layers of the frozen, unmasked network, averaged over positions; without the images
projection   ReLU of a random projection of all pixels
convolution  random filters, ReLU, average pooling; the filters have the spectrum of natural images taken out
pretrained   input of the last masked layer of a network with weights of its own
"""

from collections.abc import Callable, Mapping
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supsup_lightning.bank.digests import digest
from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.errors import ConfigurationError, check_choice
from supsup_lightning.seeding import generator

if TYPE_CHECKING:
    from supsup_lightning.methods import Method

KINDS = ("auto", "hidden", "projection", "convolution", "pretrained")
_USUAL = {"projection": 1024, "convolution": 2304}  # number of features, or three per value of the input if fewer
_IMAGES_AT_ONCE = 256  # so that the filters' responses stay small


class Projection(nn.Module):
    """``ReLU(P x)`` with a Gaussian matrix ``P`` ``(features, inputs)``.

    >>> Projection((1, 8, 8), features=16, draw=torch.Generator())(torch.ones(2, 1, 8, 8)).shape
    torch.Size([2, 16])
    """

    weight: Tensor

    def __init__(self, shape: tuple[int, ...], *, features: int, draw: torch.Generator) -> None:
        super().__init__()
        inputs = torch.Size(shape).numel()
        weight = torch.randn(features, inputs, generator=draw) / sqrt(inputs)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, *shape)`` to ``(batch, features)``."""
        return F.relu(images.float().flatten(1) @ self.weight.T)


class Convolution(nn.Module):
    """Random filters, ReLU, and averages over a grid of ``cells x cells``.

    >>> Convolution((3, 32, 32), features=90, draw=torch.Generator())(torch.ones(2, 3, 32, 32)).shape
    torch.Size([2, 90])
    """

    weight: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        features: int,
        draw: torch.Generator,
        cells: int = 3,
    ) -> None:
        super().__init__()
        channels, *sides = shape
        size, self.stride = max(3, round(min(sides) / 4)), max(1, min(sides) // 14)
        self.cells, self.num_features = cells, features
        filters = ceil(features / cells**2)
        weight = torch.randn(filters, channels, size, size, generator=draw) / sqrt(channels) / size
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to ``(batch, features)``."""
        parts = []
        for part in images.float().split(_IMAGES_AT_ONCE):
            responses = F.relu(F.conv2d(part, self.weight, stride=self.stride))
            pooled = F.adaptive_avg_pool2d(responses, self.cells).flatten(1)
            parts.append(pooled[:, : self.num_features])
        return torch.cat(parts)


class HiddenInputs:
    """Inputs of layers of the frozen, unmasked network, averaged over positions and joined.

    Args:
        layers: names of modules; each gets ``(batch, channels, *positions)`` or ``(batch, tokens, channels)``.
    """

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.layers = layers

    @torch.no_grad()
    def __call__(self, method: "Method", images: Tensor) -> Tensor:
        """``(batch, *shape)`` to ``(batch, features)``."""
        seen: dict[str, Tensor] = {}

        def watching(name: str) -> Callable[..., None]:
            def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen.setdefault(name, inputs[0])

            return watch

        hooks = [method.network.get_submodule(name).register_forward_pre_hook(watching(name)) for name in self.layers]
        try:
            with in_mode(method.network, training=False):
                method.call_network({}, method.base.laid_out(images))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([_averaged(seen[name], len(images), name) for name in self.layers], 1)


def _averaged(values: Tensor, batch: int, name: str) -> Tensor:
    if values.ndim < 2 or len(values) != batch or not values.is_floating_point():
        raise ConfigurationError(
            f"inference.features: the layer {name} gets an input of shape {tuple(values.shape)}, which is not one row "
            "per image; use inference.features=projection, or a module of your own."
        )
    if values.ndim == 3:
        return values.mean(1).float()
    return values.flatten(2).mean(2).float() if values.ndim > 3 else values.float()


FeatureMap = Projection | Convolution | HiddenInputs | nn.Module


def describe(
    kind: str, *, num_features: int | None, method: "Method", example: Tensor, keeps_neighbours: bool
) -> dict[str, Any]:
    """All that a feature map is made from, as text and numbers; `make` makes it.

    Args:
        kind: one of `KINDS`.
        num_features: of ``projection`` and ``convolution``; None for the usual number.
        method: its network is what ``hidden`` and ``pretrained`` compute with.
        example: network inputs, ``(batch, *shape)``.
        keeps_neighbours: whether neighbouring pixels are neighbours in the image, which permutations change.

    Raises:
        ConfigurationError: a kind of features that does not fit the inputs or the network.
    """
    picture = example.ndim == 4 and example.is_floating_point()
    if kind == "auto":
        if method.weights == "keep" and len(_layers(method)) > 1:
            kind = "pretrained"
        elif not picture:
            kind = "hidden"
        else:
            kind = "convolution" if keeps_neighbours else "projection"
    if kind in ("hidden", "pretrained"):
        if num_features is not None:
            raise ConfigurationError(
                f"inference.num_features={num_features} has no effect with inference.features={kind}, whose number is "
                "the network's; leave it out, or use projection or convolution."
            )
        layers = _layers(method)[1:]
        if not layers:
            raise ConfigurationError(
                f"inference.features={kind} needs a network of two or more layers with weights; use projection."
            )
        if kind == "pretrained" and method.weights != "keep":
            raise ConfigurationError(
                f"inference.features=pretrained needs trained weights, and method.weights={method.weights} draws "
                "random ones; use method.weights=keep, or inference.features=hidden."
            )
        return {"kind": kind, "layers": layers[-1:] if kind == "pretrained" else layers}
    if not example.is_floating_point():
        raise ConfigurationError(
            f"inference.features={kind} takes images, and the inputs here are {example.dtype}; use hidden."
        )
    if kind == "convolution" and not picture:
        raise ConfigurationError(
            f"inference.features=convolution takes images (channels, height, width), and the inputs here have shape "
            f"{list(example.shape[1:])}; use projection, or hidden."
        )
    usual = min(_USUAL[kind], 3 * example[0].numel())
    number = usual if num_features is None else num_features
    return {"kind": kind, "features": number, "shape": list(example.shape[1:]), "seed": method.seed}


def make(description: Mapping[str, Any]) -> FeatureMap:
    """The feature map that `describe` has described."""
    kind = description["kind"]
    if kind in ("hidden", "pretrained"):
        return HiddenInputs(tuple(description["layers"]))
    made = {"projection": Projection, "convolution": Convolution}[kind]
    draw = generator(description["seed"], "features", kind)
    return made(tuple(description["shape"]), features=description["features"], draw=draw)


def describe_own(module: nn.Module) -> dict[str, Any]:
    """A user's own feature map: its class, and a digest of its parameters and buffers."""
    return {"kind": f"{type(module).__module__}.{type(module).__qualname__}", "digest": digest(module.state_dict())}


def check_kind(kind: str) -> None:
    """Raise `ConfigurationError` for an unknown kind of features."""
    check_choice("inference.features", kind, KINDS)


def _layers(method: "Method") -> list[str]:
    """Names of the modules with weights of two or more dimensions, in the network's order."""
    parameters = dict(method.network.named_parameters())
    names = [name for name in method.layout.names if parameters[name].ndim >= 2]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
