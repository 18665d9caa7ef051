"""Connects the learner of unannounced streams to the Trainer."""

import logging
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from supsup_lightning.callbacks.task_boundary import TaskBoundary, stop_between_epochs
from supsup_lightning.checks.trainer_checks import check_fit
from supsup_lightning.discovery import AccuracyDiscovery, Decision, Discovery, Learner, Unannounced
from supsup_lightning.discovery.learner import Batch, num_batches
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.optimization import WarmUp, advance
from supsup_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

logger = logging.getLogger(__name__)


class TaskDiscovery(L.Callback):
    """Trains what a `Learner` decides (scenario NNs), with an optimizer and a schedule for each task.

    Args:
        discovery: the learner's rule; by default `AccuracyDiscovery`.

    Attributes:
        learner: decides which task a batch trains.
    """

    begins_tasks = True

    def __init__(self, discovery: Discovery | None = None) -> None:
        self.learner = Learner(AccuracyDiscovery() if discovery is None else discovery)
        self.warm_up = WarmUp()
        self._batches: dict[int, dict[int, int]] = {}  # of each of the learner's tasks, by true task

    @property
    def decisions(self) -> list[Decision]:
        """Decisions of the learner so far."""
        return self.learner.decisions

    def setup(self, trainer: L.Trainer, pl_module: "ContinualModule", stage: str) -> None:
        """Raise `ConfigurationError` if the trainer, the method or the network cannot do this."""
        if stage != "fit":
            return
        check_fit(trainer, Unannounced, "data that announce no task; wrap the others: Unannounced(data)")
        if trainer.accumulate_grad_batches != 1:
            raise ConfigurationError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} would mix the gradients of two "
                "tasks where the stream changes; use 1 in scenario=nns."
            )
        method, discovery = pl_module.method, self.learner.discovery
        if discovery.needs_gate and method.gate is None:
            raise ConfigurationError(
                f"{type(discovery).__name__} compares batches with the sums of inference=discriminant, and the "
                f"inference here is {type(pl_module.inference).__name__}; use inference=discriminant, or "
                "discovery=accuracy."
            )
        if method.gate is not None and trainer.world_size > 1:
            raise ConfigurationError(
                "inference=discriminant learns a stream that announces no task in one process; use trainer.devices=1, "
                "or another inference."
            )
        self.learner.connect(method, num_classes=max(trainer.datamodule.num_classes))
        self.learner.method.keep_scores(discovery.scores)

    def on_fit_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Raise `ConfigurationError` if discovery and network do not fit."""
        discovery = self.learner.discovery
        discovery.check(output_size=pl_module.output_size, num_classes=self.learner.num_classes)
        if discovery.on_unknown != "new_mask" and pl_module.inference.superimposes:
            logger.warning(
                "%s finds the masks that a combination (discovery.on_unknown=%s) is made of, not the combination; "
                "inference=exhaustive finds both.",
                type(pl_module.inference).__name__,
                discovery.on_unknown,
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """If a run resumes, continue the task in training."""
        self._count_batches(trainer.datamodule, pl_module)
        if not pl_module.method.live.tasks:
            return
        if trainer.fit_loop.restarted_mid_epoch:
            raise ConfigurationError(
                "The checkpoint was written within an epoch, from where a stream cannot go on; resume from one of an "
                "epoch's end."
            )
        data, step = trainer.datamodule, self.learner.confirmed_step
        size = num_batches(next(data.batches(step, step + 1)))
        next_step = data.step(trainer.current_epoch, 0)
        self.learner.resume(
            confirmed=list(data.batches(max(0, step + 1 - size), step + 1)),
            window=list(data.batches(max(0, next_step - size), next_step)),
        )
        self.warm_up.follow(trainer.optimizers)

    def on_test_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """If a run resumes after its training, tell the module whose images each task has learned."""
        self._count_batches(trainer.datamodule, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Let requests to stop wait for the end of the epoch, from where the stream can continue."""
        stop_between_epochs(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: "ContinualModule", batch: Batch, batch_idx: int
    ) -> None:
        """Decide which task the batch trains; seed the random numbers of layers (dropout) by the step."""
        data, before = trainer.datamodule, len(self.decisions)
        step = data.step(trainer.current_epoch, batch_idx)
        if self.learner.decide(step, batch):
            self._start_optimizer(trainer, trained=self.learner.steps.get(pl_module.method.live.task, 0))
        for decision in self.decisions[before:]:
            values = {"task": decision.task, "statistic": decision.statistic, "threshold": decision.threshold}
            for listener in trainer.loggers:
                listener.log_metrics({f"discovery/{name}": value for name, value in values.items()}, step=decision.step)
        torch.manual_seed(derive_seed(data.seed, "layers", step, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "ContinualModule", outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure accuracy on the batch, from its logits before the step."""
        self.learner.measure(outputs["logits"][0], outputs["labels"][0])
        data, task = trainer.datamodule, pl_module.method.live.task
        true = data.true_task(data.step(trainer.current_epoch, batch_idx))
        counts = self._batches.setdefault(task, {})
        counts[true] = counts.get(true, 0) + 1
        pl_module.true_tasks[task] = _most_frequent(counts)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Store the task in training at the end of the stream, before the last checkpoint is written."""
        if trainer.current_epoch + 1 >= trainer.datamodule.num_epochs:
            self.learner.end()

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run continues from."""
        return {**self.learner.state_dict(), "_warm_steps": self.warm_up.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.learner.load_state_dict(state_dict)
        self.warm_up.steps = state_dict["_warm_steps"]

    def _start_optimizer(self, trainer: L.Trainer, *, trained: int) -> None:
        """Set up a fresh optimizer, and the schedule as it is after the ``trained`` steps of this task."""
        trainer.strategy.setup_optimizers(trainer)
        advance(trainer.lr_scheduler_configs, steps=trained)
        self.warm_up.start(trainer.optimizers, known=trained > 0)

    def _count_batches(self, data: Unannounced, module: "ContinualModule") -> None:
        """Give the module, not the learner, the true task that each task has learned so far."""
        if self.decisions:
            self._batches = data.learned(self.decisions, before=sum(self.learner.steps.values()))
            module.true_tasks = {task: _most_frequent(counts) for task, counts in self._batches.items()}


def _most_frequent(counts: dict[int, int]) -> int:
    return max(counts, key=counts.__getitem__)


def discovery_of(trainer: L.Trainer) -> TaskDiscovery | None:
    """The trainer's `TaskDiscovery`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, TaskDiscovery)), None)


def boundary_or_discovery(discovery: Discovery | None) -> L.Callback:
    """`TaskDiscovery` where tasks have to be discovered, `TaskBoundary` where they are announced."""
    return TaskBoundary() if discovery is None else TaskDiscovery(discovery)
