"""Optimizers and schedules of a task: defaults, errors, and their state in checkpoints."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isclose
from typing import Any

from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from supsup_lightning.checks.meaning import differences, plain
from supsup_lightning.checks.trainer_checks import check_schedule
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import SetsLearningRate

_SAME_RESULT = ("fused", "foreach", "capturable", "differentiable")  # up to rounding
_NUM_RATES = 100

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer, int | None], LRScheduler]


def default_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """Default optimizer: the most accurate one measured whose masks one gradient can still distinguish.

    Source: docs/optimizers.md.
    """
    return Adam(parameters, lr=1e-3, betas=(0.9, 0.99), fused=True)


def default_coefficient_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """Default optimizer of combinations, whose few coefficients near 1 need larger steps than scores."""
    return Adam(parameters, lr=0.05)


def checked(make: Callable[..., Any], what: str = "optimizer") -> Callable[..., Any]:
    """Wrap a factory so that wrong options raise `ConfigurationError`."""

    def checked_make(*arguments: Any) -> Any:
        try:
            return make(*arguments)
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"The {what}'s options do not work: {error}.") from error

    return checked_make


def for_task(
    trainer: Any, method: Method, make_optimizer: MakeOptimizer, make_schedule: MakeSchedule
) -> dict[str, Any]:
    """Optimizer and schedule of one task, for `LightningModule.configure_optimizers`.

    Raises:
        ConfigurationError: options that do not work, or not with the trainer's.
    """
    data = trainer.datamodule
    optimizer = checked(make_optimizer)(method.trainable())
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if fused and trainer.gradient_clip_val and isinstance(trainer.precision_plugin, MixedPrecision):
        raise ConfigurationError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} in mixed precision ({trainer.precision}) does not "
            "go with a fused optimizer; add optimizer.fused=false (in Python, give ContinualModule an optimizer "
            "without it)."
        )
    if isinstance(method, SetsLearningRate) and method.learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = method.learning_rate
    # After the last epoch, a checkpoint is about to be restored.
    steps = data.optimizer_steps(min(trainer.current_epoch, data.num_epochs - 1))
    schedule = checked(make_schedule, "schedule")(optimizer, steps)
    check_schedule(schedule, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def advance(schedules: Iterable[Any], *, steps: int) -> None:
    """Step Lightning's ``schedules`` as often as their task was trained before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before `optimizer.step", category=UserWarning)
        for config in schedules:
            for _ in range(steps):
                config.scheduler.step()


class WarmUp:
    """Increases the learning rate of a returning task from 0, on top of its schedule.

    A fresh optimizer takes steps that are too large for a trained mask, which one gradient can then no longer
    distinguish from others (docs/discovery.md).

    Attributes:
        steps: number of steps since the task returned.
    """

    length = 100

    def __init__(self) -> None:
        self.steps = self.length

    def start(self, optimizers: Sequence[Optimizer], *, known: bool) -> None:
        """Begin with a task, which has been trained before if it is ``known``."""
        self.steps = 0 if known else self.length
        self.follow(optimizers)

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Scale the rates of these optimizers until the warm-up is over."""
        if self.steps < self.length:
            for optimizer in optimizers:
                optimizer.register_step_pre_hook(self._before_step)
                optimizer.register_step_post_hook(self._after_step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= self._factor()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] /= self._factor()
        self.steps += 1

    def _factor(self) -> float:
        return min(1.0, (self.steps + 1) / self.length)


def described(
    make_optimizer: MakeOptimizer, make_schedule: MakeSchedule, parameters: list[nn.Parameter], *, steps: int | None
) -> dict[str, Any]:
    """Options of optimizer and schedule that masks depend on, in a normal form.

    Args:
        make_optimizer: of the module.
        make_schedule: of the module.
        parameters: to be trained, ``(tasks, n)``. The optimizer gets vectors, as weights of several layers are no
            matrix: one that takes matrices alone (Muon) is refused.
        steps: of a task, None where they are not known.

    Returns:
        The optimizer's class and options, and the schedule's first rates, as shares of ``lr``.
    """
    optimizer = checked(make_optimizer)([nn.Parameter(parameter.detach()[0]) for parameter in parameters])
    group = optimizer.param_groups[0]
    options = {name: value for name, value in group.items() if name not in ("params", "initial_lr", *_SAME_RESULT)}
    schedule = checked(make_schedule, "schedule")(optimizer, steps)
    step, rates = checked(schedule.step, "schedule"), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before `optimizer.step", category=UserWarning)
        for _ in range(min(_NUM_RATES, steps or _NUM_RATES)):
            rates.append(float(group["lr"]) / float(group["initial_lr"]))
            step()
    return {"optimizer": plain({"kind": type(optimizer).__name__, **options}), "rates": rates}


def check_same(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `MismatchError` if `described` differs between a checkpoint and this run."""
    kinds = [{"kind": each["optimizer"]["kind"]} for each in (stored, here)]
    different = differences(*kinds, group="optimizer") or differences(
        stored["optimizer"], here["optimizer"], group="optimizer"
    )
    rates = zip(stored["rates"], here["rates"], strict=False)
    step = next((step for step, pair in enumerate(rates) if not isclose(*pair, rel_tol=1e-6, abs_tol=1e-9)), None)
    if step is not None:
        before, now = stored["rates"][step], here["rates"][step]
        different.append(f"schedule at step {step} {before:.4g} of the learning rate there, {now:.4g} here")
    if different:
        raise MismatchError(
            f"The checkpoint was made with other options: {'; '.join(different)}. Use the same, or start afresh."
        )


def add_task_dimension(checkpoint: dict[str, Any], parameter: nn.Parameter) -> None:
    """Give the optimizer state of a checkpoint before version 0.2 the dimension of tasks, ``(1, n)`` for ``(n,)``."""
    for optimizer in checkpoint.get("optimizer_states", ()):
        for state in optimizer["state"].values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape[1:]:
                    state[name] = value.unsqueeze(0)
