"""Conventions of a network's parameters: number types, embedding options, tied tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NARROW = (torch.float16, torch.bfloat16)


class Conventions:
    """Parameters that are not float32, and embeddings that change their weights when called.

    Attributes:
        types: of parameters and buffers that are floating point and not float32, by name.
        of_images: the type that floating point images are given in; None where it stays as it is, because parameters
            are float32, or of several types.
        embeddings: names of weights that a forward pass rescales in place (``max_norm``) or whose gradients are sparse.
        places: as by `other_places`.

    >>> Conventions(nn.Linear(2, 1).double()).of_images, Conventions(nn.Embedding(3, 2, max_norm=1.0)).embeddings
    (torch.float64, ('weight',))
    """

    def __init__(self, network: nn.Module) -> None:
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self.places = other_places(network)
        self.types = {
            name: tensor.dtype
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and tensor.dtype != torch.float32
        }
        of_parameters = {p.dtype for p in network.parameters() if p.is_floating_point()}
        self.of_images = of_parameters.pop() if len(of_parameters) == 1 else None
        if self.of_images == torch.float32:
            self.of_images = None
        special = {
            id(layer.weight)
            for layer in network.modules()
            if isinstance(layer, _EMBEDDINGS) and (layer.max_norm is not None or layer.sparse)
        }
        self.embeddings = tuple(name for name, p in network.named_parameters() if id(p) in special)

    def of(self, network: nn.Module, parameters: dict[str, Any]) -> dict[str, Any]:
        """Parameters converted to the network's types; None for absent buffers."""
        if not self.types and not self.embeddings and not self.places:
            return parameters
        given = {
            name: value if value is None or name not in self.types else value.to(self.types[name])
            for name, value in parameters.items()
        }
        own = dict(network.named_parameters()) if self.embeddings else {}
        given |= {name: _EmbeddingWeight.apply(given.get(name, own[name])) for name in self.embeddings}
        return {**given, **{place: given[name] for place, name in self.places.items() if name in given}}

    def images(self, images: Tensor) -> Tensor:
        """Images converted to the parameters' type, if that is the same for all."""
        return images if self.of_images is None or not images.is_floating_point() else images.to(self.of_images)


class _EmbeddingWeight(torch.autograd.Function):
    """An embedding's weight as a copy with a dense gradient, which may be rescaled in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to_dense() if gradient.layout == torch.sparse_coo else gradient


def other_places(network: nn.Module) -> dict[str, str]:
    """Other places of tied parameters and buffers than their first names; a layer that is used twice is one place.

    `functional_call` with ``tie_weights=True`` would fill a place once for each of its names, and leave what it put in
    first where the network's own belongs.

    >>> tied = nn.Linear(2, 2, bias=False)
    >>> other = nn.Linear(2, 2, bias=False)
    >>> other.weight = tied.weight
    >>> other_places(nn.Sequential(tied, tied, other))
    {'2.weight': '0.weight'}
    """
    first: dict[Tensor, str] = {}
    places = {}
    for layer, module in network.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            place = f"{layer}.{name}" if layer else name
            if tensor is not None and first.setdefault(tensor, place) != place:
                places[place] = first[tensor]
    return places


def wide(values: Tensor) -> Tensor:
    """Logits in at least float32, for losses and objectives."""
    return values.float() if values.dtype in _NARROW else values


def is_narrow(network: nn.Module) -> bool:
    """Whether the whole network computes in half precision."""
    types = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return bool(types) and types <= {*_NARROW}


def keep_padding(network: nn.Module, names: set[str]) -> None:
    """Set the rows of ``padding_idx`` to 0 in embeddings with these weights."""
    drawn = {id(p) for name, p in network.named_parameters() if name in names}
    for layer in network.modules():
        if isinstance(layer, _EMBEDDINGS) and layer.padding_idx is not None and id(layer.weight) in drawn:
            layer.weight.data[layer.padding_idx] = 0


@contextmanager
def normalised_by_images(network: nn.Module) -> Iterator[None]:
    """Let instance normalisation ignore running statistics, as in training; batch normalisation does so already."""
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    layers = [layer for layer in network.modules() if isinstance(layer, kinds) and not layer.training]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
