"""Support for backward passes that run the network again (activation checkpointing).

`functional_call` puts the network's own parameters back as soon as the forward pass ends, so that what runs again in
the backward pass would compute with those. Here a task's parameters come back for as long as the backward pass lasts.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from supsup_lightning.methods.conventions import other_places

_RUN_ONCE = ("torch.nn.modules.", "supsup_lightning.networks.")  # packages whose layers recompute nothing

_in_place: WeakKeyDictionary[nn.Module, ExitStack] = WeakKeyDictionary()


def keep_for_backward(logits: Tensor, network: nn.Module, parameters: Callable[[], dict[str, Any]]) -> Tensor:
    """Logits whose backward pass sees the network with the parameters of the forward pass.

    Buffers are copies, so that layers that run twice update no statistics twice.

    Args:
        logits: of the network.
        network: which ran under other parameters than its own.
        parameters: gives these by name; asked when the backward pass begins.
    """
    functional = torch._C._functorch.is_functorch_wrapped_tensor(logits)
    if logits.requires_grad and not functional and _may_run_again(network):
        logits.register_hook(partial(_put_in_place, network, parameters))
    return logits


def _may_run_again(network: nn.Module) -> bool:
    """Whether a backward pass may run the network again; a hook costs a tenth of a small network's step."""
    return any(
        not type(layer).__module__.startswith(_RUN_ONCE)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in vars(layer)
        for layer in network.modules()
    )


def _put_in_place(network: nn.Module, parameters: Callable[[], dict[str, Any]], _: Tensor) -> None:
    take_out(network)
    stack = _in_place[network] = ExitStack()
    with torch.enable_grad():  # or casts among them would save less for the backward pass than the first time
        stack.enter_context(_reparametrize_module(network, parameters(), tie_weights=False))
    copies = {name: buffer.clone() for name, buffer in network.named_buffers()}
    tied = {place: copies[name] for place, name in other_places(network).items() if name in copies}
    stack.enter_context(_reparametrize_module(network, {**copies, **tied}, tie_weights=False))
    torch.autograd.Variable._execution_engine.queue_callback(partial(take_out, network))


def take_out(network: nn.Module) -> None:
    """Restore the network's own parameters, also after a failed backward pass."""
    if network in _in_place:
        _in_place.pop(network).close()
