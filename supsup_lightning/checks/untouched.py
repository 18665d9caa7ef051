"""Context managers that try out a network and restore its state."""

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_MODULES = frozenset(vars(nn.Module()))
_PLAIN = (int, float, complex, str, bytes, type(None))


class Untouched:
    """Context manager that restores a network and all random states at its end.

    Parameters, buffers and submodules are the same objects with the same values, and plain attributes are equal.

    Args:
        network: network that may be called in the block. Training and evaluation mode is left to `in_mode`.
        device: device of the images, whose random state is restored besides the CPU's.

    >>> layer = nn.BatchNorm1d(2)
    >>> with Untouched(layer, torch.device("cpu")):
    ...     _ = layer(torch.randn(4, 2))
    >>> layer.running_mean.tolist()
    [0.0, 0.0]
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network
        self.device = device
        self._stack = ExitStack()

    def __enter__(self) -> "Untouched":
        self._modules = dict(self.network.named_modules())
        self._registered = [
            (registry, dict(registry))
            for module in self._modules.values()
            for registry in (module._parameters, module._buffers, module._modules)
        ]
        self._parameters = {name: (p, p.detach().clone()) for name, p in self.network.named_parameters()}
        self._buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        self._attributes = {name: _copied(_plain(module)) for name, module in self._modules.items()}
        self._stack.enter_context(_same_random_numbers(self.device))
        return self

    def changed(self) -> list[str]:
        """Names of the plain attributes that have changed since the start of the block."""
        return [name for name, _, _ in self._changes()]

    def changed_parameters(self) -> list[str]:
        """Names of the parameters whose values have changed since the start of the block."""
        return [name for name, (p, value) in self._parameters.items() if not _same(p.detach(), value)]

    def _changes(self) -> Iterator[tuple[str, nn.Module, str]]:
        for layer, module in self._modules.items():
            before, now = self._attributes[layer], _plain(module)
            for name in {**before, **now}:
                if name not in now or name not in before or not _same(before[name], now[name]):
                    yield (f"{layer}.{name}" if layer else name), module, name

    def __exit__(self, *raised: object) -> None:
        self._stack.close()
        for registry, before in self._registered:
            registry.clear()
            registry.update(before)
        for tensor, value in (*self._parameters.values(), *self._buffers):
            if not _same(tensor.detach(), value):
                tensor.data = value
        layers = {id(module): layer for layer, module in self._modules.items()}
        for _, module, name in [*self._changes()]:
            before = self._attributes[layers[id(module)]]
            if name in before:
                module.__dict__[name] = before[name]
            else:
                del module.__dict__[name]


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode for the block; each submodule gets its own mode back."""
    modes = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what networks use)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module besides parameters, buffers and submodules."""
    return {name: value for name, value in vars(module).items() if name not in _OF_MODULES}


def _copied(value: Any) -> Any:
    """Copy tensors, arrays and collections; return any other value unchanged."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) is tuple:
        return tuple(map(_copied, value))
    if not isinstance(value, (list, dict, set)):
        return value
    other = copy.copy(value)
    if isinstance(other, list):
        other[:] = map(_copied, other)
    elif isinstance(other, dict):
        other.update({key: _copied(part) for key, part in other.items()})
    return other


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or (isinstance(one, (*_PLAIN, set)) and one == other)
