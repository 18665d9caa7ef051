"""Objectives of task inference: lower if the network is more confident.

All take logits ``(..., output_size)`` float32 and the number of classes, and return ``(...,)``. Outputs from
``num_classes`` on are superfluous: no label ever names them, so training pushes them down.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from supsup_lightning.errors import ConfigurationError, check_choice

Objective = Callable[[Tensor, int], Tensor]


def entropy(logits: Tensor, num_classes: int, *, temperature: float = 1.0) -> Tensor:
    """``H``: entropy in nats of the softmax over all outputs, after division of the logits by ``temperature``.

    >>> entropy(torch.zeros(1, 4), 2)
    tensor([1.3863])
    """
    log_probabilities = torch.log_softmax(logits / temperature, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def superfluous(logits: Tensor, num_classes: int) -> Tensor:
    """``G``: log-sum-exp of all logits, whose gradient flows only through the superfluous outputs.

    A term without gradient, the log-sum-exp of the classes' logits, is subtracted. It changes no gradient, and
    makes the value minus the logarithm of the probability that the answer is a class at all: a confidence that
    tasks can be compared by, as `Exhaustive` does.

    >>> logits = torch.tensor([[0.0, 0.0, 1.0]], requires_grad=True)
    >>> superfluous(logits, 2).sum().backward()
    >>> logits.grad  # 0 for the classes, the softmax for the others
    tensor([[0.0000, 0.0000, 0.5761]])
    """
    classes = logits[..., :num_classes].detach().logsumexp(-1)
    return softplus(logits[..., num_classes:].logsumexp(-1) - classes)


def max_probability(logits: Tensor, num_classes: int) -> Tensor:
    """``M``: minus the largest probability.

    >>> max_probability(torch.zeros(1, 4), 2)
    tensor([-0.2500])
    """
    return -torch.softmax(logits, dim=-1).amax(-1)


def check_superfluous(option: str, objective: str, *, output_size: int, num_classes: int) -> None:
    """Raise `ConfigurationError` if the objective of an option group needs superfluous outputs and there are none."""
    if objective == "superfluous" and output_size <= num_classes:
        raise ConfigurationError(
            f"{option}.objective=superfluous needs outputs beyond the classes, but network.output_size={output_size} "
            f"and the tasks have {num_classes} classes; raise network.output_size (10 x the classes works well), or "
            f"use {option}.objective=entropy."
        )


OBJECTIVES: dict[str, Objective] = {
    "entropy": entropy,
    "superfluous": superfluous,
    "max_probability": max_probability,
}


def make_objective(
    name: str, *, temperature: float = 1.0, option: str = "inference.objective", others: tuple[str, ...] = ()
) -> Objective:
    """Create the objective for ``inference.objective`` and ``inference.temperature``.

    ``others`` are names that the caller makes itself, for messages.

    Raises:
        ConfigurationError: an option that is unknown, out of its range or without effect.
    """
    check_choice(option, name, (*OBJECTIVES, *others))
    if temperature <= 0:
        raise ConfigurationError(f"inference.temperature={temperature} must be positive.")
    if temperature == 1 and name in OBJECTIVES:
        return OBJECTIVES[name]
    if name != "entropy":
        raise ConfigurationError(
            f"inference.temperature={temperature} has no effect with inference.objective={name}; use entropy."
        )
    return partial(entropy, temperature=temperature)
