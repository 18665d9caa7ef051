"""Frozen feature maps: images to ``(batch, features)``, drawn from a seed, so that they cost no bytes.

hidden       inputs of the masked layers of the frozen, unmasked network, averaged over positions; without the images
projection   ReLU of a random projection of all pixels
convolution  random filters on whitened patches, ReLU, average pooling
pretrained   input of the last masked layer of a network with weights of its own
"""

from collections.abc import Callable, Iterable, Mapping
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supsup_lightning.bank.digests import digest
from supsup_lightning.bank.rows import check_tensor
from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.errors import ConfigurationError, DataError, check_choice
from supsup_lightning.seeding import generator

if TYPE_CHECKING:
    from supsup_lightning.methods import Method

KINDS = ("auto", "hidden", "projection", "convolution", "pretrained")
_USUAL = {"projection": 1024, "convolution": 2304}  # number of features, or three per value of the input if fewer
_SIZE = 5  # of a filter, in pixels
_CELLS = 3  # of the grid of averages, along each side
_SHRINKAGE = 0.3  # added to the patches' variances, in units of their mean
_THRESHOLD = 0.5  # of a response, in its standard deviations
_LARGE = 48  # images from here on are brought to 32 pixels
_IMAGES_AT_ONCE = 16  # the responses of so many stay in a processor's cache
_IMAGES_MEASURED = 2000


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


class PatchStatistics(nn.Module):
    """Mean and covariance of the patches of the first task's images, by which the filters are whitened; no image.

    Attributes:
        mean: ``(values,)`` float32, values being channels x height x width of a patch; empty until they are known.
        covariance: ``(values, values)`` float32.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("covariance", torch.empty(0, 0))

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Take them from images ``(batch, channels, height, width)``; the first few thousand are enough."""
        total: Any = 0.0
        products: Any = 0.0
        number = images = 0
        for batch in batches:
            for part in _sized(batch.float()).split(_IMAGES_AT_ONCE):
                patches = F.unfold(part, _SIZE, stride=2).transpose(1, 2).flatten(0, 1).double()
                total, products = total + patches.sum(0), products + patches.T @ patches
                number, images = number + len(patches), images + len(part)
            if images >= _IMAGES_MEASURED:
                break
        if number:
            mean = total / number
            self.mean, self.covariance = mean.float(), (products / number - mean.outer(mean)).float()

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Raise `DataError` for damaged statistics."""
        for name in ("mean", "covariance"):
            check_tensor(stored, name, self.get_buffer(name), "patch of the gate")
        if stored["covariance"].shape != (len(stored["mean"]),) * 2:
            raise DataError("What is stored of the gate is damaged: the covariance of its patches has another size.")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.check_state({name: state_dict.get(prefix + name) for name in ("mean", "covariance")})
        for name in ("mean", "covariance"):
            setattr(self, name, self.get_buffer(name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Convolution(nn.Module):
    """Square root of the average of ``ReLU(w' x - mean - threshold)`` over a grid of cells, for random filters ``w``.

    The filters are drawn for whitened patches, as natural images have most of their variance in few directions (Coates
    and Ng 2012), and scaled to responses of variance 1. Larger images are brought to 32 pixels first.

    Args:
        shape: of an image.
        features: number of features.
        draw: of the filters.
        patches: what the filters are whitened by.
        mirror: average over an image and its mirror image.

    >>> patches = PatchStatistics()
    >>> images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> patches.measure([images])
    >>> Convolution((3, 32, 32), features=90, draw=torch.Generator(), patches=patches, mirror=True)(images).shape
    torch.Size([8, 90])
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        features: int,
        draw: torch.Generator,
        patches: PatchStatistics,
        mirror: bool,
    ) -> None:
        super().__init__()
        self.num_features, self.mirror = features, mirror
        filters, inputs = ceil(features / _CELLS**2), shape[0] * _SIZE**2
        values, vectors = torch.linalg.eigh(patches.covariance.double().cpu())
        values = values.clamp(min=0)
        if not values.any():  # constant images
            values = torch.ones_like(values)
        shrunk = values + _SHRINKAGE * values.mean()
        whitening = (values / shrunk).sum().rsqrt() * (vectors * shrunk.rsqrt()) @ vectors.T
        weight = torch.randn(filters, inputs, generator=draw).double() @ whitening
        bias = -weight @ patches.mean.double().cpu() - _THRESHOLD
        self.register_buffer("weight", weight.float().view(filters, shape[0], _SIZE, _SIZE), persistent=False)
        self.register_buffer("bias", bias.float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to ``(batch, features)``."""
        found = torch.empty(len(images), self.num_features, device=images.device)
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            part = _sized(images[start : start + _IMAGES_AT_ONCE].float())
            pooled = self._pooled(part)
            if self.mirror:
                pooled = (pooled + self._pooled(part.flip(3))) / 2
            found[start : start + _IMAGES_AT_ONCE] = pooled
        return found

    def _pooled(self, images: Tensor) -> Tensor:
        responses = F.conv2d(images, self.weight, self.bias).relu_()
        return F.adaptive_avg_pool2d(responses, _CELLS).flatten(1)[:, : self.num_features].sqrt()


def _sized(images: Tensor) -> Tensor:
    """Images whose shorter side is at least a patch, and not much above 32 pixels."""
    side = min(images.shape[2:])
    if _SIZE <= side < _LARGE:
        return images
    scale = 32 / side if side >= _LARGE else _SIZE / side
    size = [max(_SIZE, round(scale * length)) for length in images.shape[2:]]
    return F.interpolate(images, size, mode="area" if side >= _LARGE else "nearest")


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
        seen = _inputs_of(self.layers, method, images)
        if missing := [name for name in self.layers if name not in seen]:
            raise ConfigurationError(
                f"inference.features: the network has not called its layer {missing[0]} for these images, as it did "
                "for the first one; use inference.features=projection, or a module of your own."
            )
        return torch.cat([_averaged(seen[name], len(images), name) for name in self.layers], 1)


def _inputs_of(layers: Iterable[str], method: "Method", images: Tensor) -> dict[str, Tensor]:
    """First input of each of these layers of the unmasked network; of those alone that it calls with one."""
    seen: dict[str, Tensor] = {}

    def watching(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                seen.setdefault(name, inputs[0])

        return watch

    hooks = [method.network.get_submodule(name).register_forward_pre_hook(watching(name)) for name in layers]
    try:
        with in_mode(method.network, training=False):
            method.call_network({}, method.base.laid_out(images))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def _called(method: "Method", layers: list[str], example: Tensor) -> list[str]:
    """Layers that the network calls, in its order of modules: one of attention may be used without a call."""
    seen = _inputs_of(layers, method, example)
    return [name for name in layers if name in seen]


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
        if method.weights == "keep" and len(_called(method, _layers(method), example)) > 1:
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
        layers = _called(method, _layers(method), example)[1:]
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
    drawn = {"kind": kind, "features": number, "shape": list(example.shape[1:]), "seed": method.seed}
    return drawn | ({"mirror": example.shape[1] == 3} if kind == "convolution" else {})


def make(description: Mapping[str, Any], patches: PatchStatistics) -> FeatureMap:
    """The feature map that `describe` has described, and the patches of the first task's images for a convolution."""
    kind = description["kind"]
    if kind in ("hidden", "pretrained"):
        return HiddenInputs(tuple(description["layers"]))
    shape, number = tuple(description["shape"]), description["features"]
    draw = generator(description["seed"], "features", kind)
    if kind == "projection":
        return Projection(shape, features=number, draw=draw)
    return Convolution(shape, features=number, draw=draw, patches=patches, mirror=description["mirror"])


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
