"""Learning-rate schedules over one task; each task starts its own."""

from math import cos, pi, sqrt

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from supsup_lightning.errors import ConfigurationError


def cosine(optimizer: Optimizer, total_steps: int | None, *, warmup_steps: int = 0) -> LRScheduler:
    """Linear warm-up, then half a cosine down to 0 at ``total_steps``.

    Raises:
        ConfigurationError: the length of a task is not known.
    """
    if total_steps is None:
        raise ConfigurationError(
            "schedule=cosine has to know how long a task lasts, and scenario=nns does not tell; use inverse_sqrt."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return 0.5 * (1 + cos(pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)


def inverse_sqrt(optimizer: Optimizer, total_steps: int | None, *, decay_steps: int = 100) -> LRScheduler:
    """``1 / sqrt(1 + step / decay_steps)``, for tasks of unknown length."""
    return LambdaLR(optimizer, lambda step: 1 / sqrt(1 + step / decay_steps))


def constant(optimizer: Optimizer, total_steps: int | None) -> LRScheduler:
    """Constant learning rate."""
    return LambdaLR(optimizer, lambda step: 1.0)
