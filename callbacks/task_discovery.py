"""Where a stream says nothing about tasks: which mask the next batches train."""

import logging
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from supsup_lightning.callbacks.task_boundary import TaskBoundary, stop_between_epochs
from supsup_lightning.checks.compatibility import check_trains_on
from supsup_lightning.checks.trainer_checks import check_fit
from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.data import Unannounced
from supsup_lightning.errors import ConfigurationError, DiscoveryStopped
from supsup_lightning.inference.discovery import (
    AccuracyDiscovery,
    Discovery,
    above_chance,
    lowest_fit,
    mean_over_processes,
    num_processes,
)
from supsup_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

logger = logging.getLogger(__name__)

_RECENT_BATCHES = 10  # that one is compared with for the alarm
_LEAST_IMAGES = 64  # that decide; of smaller batches, several count as one
_LOST = 0.05  # of its accuracy on earlier images of its task: then a mask has learned of another task meanwhile
# An optimizer that starts anew takes steps that are too large for a trained mask, which one gradient then no longer
# tells from the others (docs/discovery.md): its learning rate begins at 0.
_WARM_UP_STEPS = 100

_STATE = ("accuracy", "steps", "_next_task", "_warm_steps", "_confirmed_step", "_shares", "_alarmed")

Batch = tuple[Tensor, Tensor]


class Decision(NamedTuple):
    """What was decided, and why.

    Attributes:
        step: of the stream; the batch of this step is the first that is trained so.
        action: ``go on``, ``switch``, ``new mask``, ``reuse``, ``combine`` (a trial) or ``combined`` (which is kept).
        task: that is trained from here on, by the learner's own numbers.
        statistic: of the verdict; NaN where none was asked for.
        threshold: likewise.
    """

    step: int
    action: str
    task: int
    statistic: float = float("nan")
    threshold: float = float("nan")

    @property
    def fits(self) -> bool:
        """Whether a known task fitted."""
        return self.statistic >= self.threshold


class Trial(NamedTuple):
    """A combination that is trained to see whether it is accurate.

    Attributes:
        ends: the step of the stream at which it is judged, unless the stream changes before.
        nearest: the known task that fitted best when it began.
    """

    ends: int
    nearest: int


class TaskDiscovery(L.Callback):
    """Begins tasks, goes on with them and comes back to them as a `Discovery` finds (scenario NNs).

    Every so many batches, and as soon as accuracy on training batches drops (`Discovery`'s alarm):

    1. What the task in training has learned since is committed, unless it has lost accuracy on the batch of the last
       decision: then the stream has changed meanwhile, and what it learned of another task is left out.
    2. The verdict on the next batch: a task fits (go on, or switch to it), or none does.
    3. If none does, a new mask begins, or a trial of a combination, as the discovery says.

    Of small batches, the last few count as one. Nothing here looks at an epoch or at a true task, so masks depend on
    the batches alone.

    Attributes:
        decisions: all of them so far.
        accuracy: of each task on its own training batches, as last measured.
        steps: for which each task has been trained; its schedule goes on from there when it comes again.
    """

    begins_tasks = True

    def __init__(self, discovery: Discovery | None = None) -> None:
        self.discovery = AccuracyDiscovery() if discovery is None else discovery
        self.decisions: list[Decision] = []
        self.accuracy: dict[int, float] = {}
        self.steps: dict[int, int] = {}
        self._next_task = 0  # no number is used twice, not even that of a combination that was given up
        self._trial: Trial | None = None
        self._warm_steps = _WARM_UP_STEPS  # since a known task came again
        self._window: list[Batch] = []  # the last batches
        self._confirmed: Batch | None = None  # the images of the last decision: of the task in training
        self._confirmed_step = 0
        self._shares: list[float] = []  # accuracy of each batch since the task in training began or came again
        self._alarmed = False

    # Lightning's hooks.

    def setup(self, trainer: L.Trainer, pl_module: "ContinualModule", stage: str) -> None:
        """Raise `ConfigurationError` where trainer or method cannot do this."""
        if stage != "fit":
            return
        check_fit(trainer, Unannounced, "data that announce no task; wrap the others: Unannounced(data)")
        if trainer.accumulate_grad_batches != 1:
            raise ConfigurationError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} would mix the gradients of two "
                "tasks where the stream changes; use 1 in scenario=nns."
            )
        check_trains_on(pl_module.method)
        _method(pl_module).keep_scores(self.discovery.scores)

    def on_fit_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Raise `ConfigurationError` where discovery and network do not fit."""
        self.discovery.check(output_size=pl_module.output_size, num_classes=max(pl_module.num_classes))
        if self.discovery.on_unknown != "new_mask" and pl_module.inference.superimposes:
            logger.warning(
                "%s finds the masks that a combination (discovery.on_unknown=%s) is made of, not the combination; "
                "inference=exhaustive finds both.",
                type(pl_module.inference).__name__,
                self.discovery.on_unknown,
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Where a run resumes, go on with the task in training."""
        if not pl_module.method.live.tasks:
            return
        if trainer.fit_loop.restarted_mid_epoch:
            raise ConfigurationError(
                "The checkpoint was written within an epoch, from where a stream cannot go on; resume from one of an "
                "epoch's end."
            )
        data, step = trainer.datamodule, self._confirmed_step
        size = _num_batches(next(data.batches(step, step + 1)))
        self._confirmed = _joined(list(data.batches(max(0, step + 1 - size), step + 1)))
        next_step = data.step(trainer.current_epoch, 0)
        self._window = list(data.batches(max(0, next_step - size), next_step))
        self._warm_up(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Whoever asks to stop waits for the end of the epoch, where the stream can go on."""
        stop_between_epochs(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: "ContinualModule", batch: Batch, batch_idx: int
    ) -> None:
        """Decide, where it is time; seed what layers draw (dropout, say) by the step."""
        data = trainer.datamodule
        step = data.step(trainer.current_epoch, batch_idx)
        self._window = [*self._window, batch][-_num_batches(batch) :]
        if step == 0:
            self._begin(trainer, pl_module, Decision(0, "new mask", 0))
        elif self._trial is not None and (self._alarmed or step == self._trial.ends or self._is_hopeless(step)):
            self._end_trial(trainer, pl_module, self._trial, step)
        elif self._trial is None and (self._alarmed or step % self.discovery.every == 0):
            self._decide(trainer, pl_module, step)
        if self.decisions[-1].step == step:
            self._confirmed, self._confirmed_step = _joined(self._window), step
        torch.manual_seed(derive_seed(data.seed, "layers", step, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "ContinualModule", outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure accuracy on training batches, each before it is learned from."""
        task = pl_module.method.live.task
        self.steps[task] = self.steps.get(task, 0) + 1
        self._shares.append(_accuracy(pl_module, outputs["logits"][0], outputs["labels"][0]))
        num_batches = len(self._window)
        if self._drops(num_batches, num_images=num_batches * len(batch[1]) * num_processes(), module=pl_module):
            del self._shares[-num_batches:]
            self._alarmed = True
        del self._shares[: -max(self.discovery.every, self.discovery.trial_steps, 2 * _RECENT_BATCHES * num_batches)]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """At the end of the stream, commit what is in training, before the last checkpoint is written."""
        if trainer.current_epoch + 1 < trainer.datamodule.num_epochs:
            return
        if self._trial is None:
            self._commit(pl_module)
        elif self._is_accurate():
            _method(pl_module).commit_task(pl_module.method.live.task)
        else:
            logger.warning(
                "The stream ended within a trial of a combination (discovery.trial_steps=%d) that was not accurate "
                "yet; its task is not kept.",
                self.discovery.trial_steps,
            )
        self._trial = None
        pl_module.method.live.end()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "decisions": [tuple(decision) for decision in self.decisions],
            "trial": None if self._trial is None else tuple(self._trial),
            **{name: getattr(self, name) for name in _STATE},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.decisions = [Decision(*decision) for decision in state_dict["decisions"]]
        self._trial = None if state_dict["trial"] is None else Trial(*state_dict["trial"])
        for name in _STATE:
            setattr(self, name, state_dict[name])

    # Decisions.

    def _decide(self, trainer: L.Trainer, module: "ContinualModule", step: int) -> None:
        self._commit(module)
        decision = self._judge(trainer, module, step, current=module.method.live.task)
        if not decision.fits:
            self._begin_unknown(trainer, module, decision)
        elif (decision.task,) != module.method.live.tasks:
            self._reopen(trainer, module, decision._replace(action="switch"))
        else:
            self._note(trainer, decision)

    def _judge(self, trainer: L.Trainer, module: "ContinualModule", step: int, *, current: int) -> Decision:
        images, labels = _joined(self._window)
        with in_mode(module, training=False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            verdict = self.discovery.judge(
                module.method,
                images.float() if images.is_floating_point() else images,
                labels,
                num_classes=max(module.num_classes),
                current=current,
                accuracy=self.accuracy,
            )
        return Decision(step, "go on", *trainer.strategy.broadcast(verdict))

    def _commit(self, module: "ContinualModule") -> None:
        """Commit what is in training, unless it has become worse at its task."""
        method, task = _method(module), module.method.live.task
        if task in method.tasks.tolist():
            before = self._accuracy_on_confirmed(module, live=False)
            now = self._accuracy_on_confirmed(module, live=True)
            assert self._confirmed is not None
            num_images = len(self._confirmed[1]) * num_processes()
            noise = (2 * before * (1 - before) / num_images) ** 0.5  # standard error of the difference, at most
            if now < before - max(_LOST * before, 2 * noise):
                return
        method.commit_task(task)
        if self._shares:
            self.accuracy[task] = self._measured_accuracy()

    @torch.no_grad()
    def _accuracy_on_confirmed(self, module: "ContinualModule", *, live: bool) -> float:
        """Of the task in training, as it is now or as it was last committed."""
        assert self._confirmed is not None
        images, labels = self._confirmed
        with in_mode(module.method, training=live):
            effective = module.method.effective(module.method.live.task)
        with in_mode(module.method, training=False):
            logits = module.method.call_network(effective, images)
        return _accuracy(module, logits, labels)

    def _begin_unknown(self, trainer: L.Trainer, module: "ContinualModule", decision: Decision) -> None:
        discovery, method = self.discovery, _method(module)
        if discovery.on_unknown != "new_mask" and method.num_masks >= discovery.combine_from:
            self._trial = Trial(decision.step + discovery.trial_steps, nearest=decision.task)
            method.begin_combination(self._next_task)
            self._start(trainer, module, decision._replace(task=self._next_task, action="combine"))
        else:
            self._begin_mask(trainer, module, decision)

    def _begin_mask(self, trainer: L.Trainer, module: "ContinualModule", decision: Decision) -> None:
        discovery, method = self.discovery, _method(module)
        if discovery.max_masks is None or method.num_masks < discovery.max_masks:
            self._begin(trainer, module, decision._replace(task=self._next_task, action="new mask"))
        elif discovery.at_max_masks == "stop":
            raise DiscoveryStopped(
                f"No task fits the batch at step {decision.step} of the stream, and there are discovery.max_masks="
                f"{discovery.max_masks} masks already. Raise it, or use discovery.at_max_masks=reuse."
            )
        else:
            self._reopen(trainer, module, decision._replace(action="reuse"))

    def _end_trial(self, trainer: L.Trainer, module: "ContinualModule", trial: Trial, step: int) -> None:
        """Keep the combination, or give it up for a known task, or for a new one."""
        self._trial = None
        changed = self._alarmed  # the stream, before the trial was over
        if self._is_accurate() or (self.discovery.on_unknown == "combine" and not changed):
            task = module.method.live.task
            _method(module).commit_task(task)
            self.accuracy[task] = self._measured_accuracy()
            self._note(trainer, Decision(step, "combined", task))
            if changed:
                self._decide(trainer, module, step)
            return
        decision = self._judge(trainer, module, step, current=trial.nearest)
        if decision.fits:
            self._reopen(trainer, module, decision._replace(action="switch"))
        elif changed and self.discovery.on_unknown == "combine":
            self._begin_unknown(trainer, module, decision)
        else:
            self._begin_mask(trainer, module, decision)

    def _is_accurate(self) -> bool:
        """Whether the combination in training is as accurate as the known tasks."""
        return bool(self._shares) and self._measured_accuracy() >= self._known_accuracy() - self.discovery.tolerance

    def _is_hopeless(self, step: int) -> bool:
        """Whether half the trial of a combination that need not be is over, and it is not half as accurate."""
        assert self._trial is not None
        if self.discovery.on_unknown != "auto" or step != self._trial.ends - self.discovery.trial_steps // 2:
            return False
        return self._measured_accuracy() < self._known_accuracy() / 2

    def _known_accuracy(self) -> float:
        """Mean over the known tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def _begin(self, trainer: L.Trainer, module: "ContinualModule", decision: Decision) -> None:
        module.method.begin_task(decision.task)
        self._start(trainer, module, decision)

    def _reopen(self, trainer: L.Trainer, module: "ContinualModule", decision: Decision) -> None:
        _method(module).reopen_task(decision.task)
        self._start(trainer, module, decision)

    def _start(self, trainer: L.Trainer, module: "ContinualModule", decision: Decision) -> None:
        self._next_task = max(self._next_task, decision.task + 1)
        trainer.strategy.setup_optimizers(trainer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*before `optimizer.step", category=UserWarning)
            for config in trainer.lr_scheduler_configs:
                schedule: Any = config.scheduler
                for _ in range(self.steps.get(decision.task, 0)):
                    schedule.step()
        self._warm_steps = 0 if self.steps.get(decision.task) else _WARM_UP_STEPS
        self._warm_up(trainer)
        self._shares.clear()
        self._note(trainer, decision)

    def _note(self, trainer: L.Trainer, decision: Decision) -> None:
        self._alarmed = False
        self.decisions.append(decision)
        values = {"task": decision.task, "statistic": decision.statistic, "threshold": decision.threshold}
        for listener in trainer.loggers:
            listener.log_metrics({f"discovery/{name}": value for name, value in values.items()}, step=decision.step)

    def _warm_up(self, trainer: L.Trainer) -> None:
        """Let the learning rate of a task that came again rise from 0, whatever its schedule."""

        def factor() -> float:
            return min(1.0, (self._warm_steps + 1) / _WARM_UP_STEPS)

        def before(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= factor()

        def after(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] /= factor()
            self._warm_steps += 1

        if self._warm_steps < _WARM_UP_STEPS:
            for optimizer in trainer.optimizers:
                optimizer.register_step_pre_hook(before)
                optimizer.register_step_post_hook(after)

    def _measured_accuracy(self) -> float:
        """Of the task in training, on the later half of its last batches: so many as lie between two decisions."""
        last = self._shares[-self.discovery.every :]
        later = last[len(last) // 2 :]
        return sum(later) / len(later)

    def _drops(self, num_batches: int, *, num_images: int, module: "ContinualModule") -> bool:
        """Whether accuracy on the last batches is far below that on those just before."""
        last, before = self._shares[-num_batches:], self._shares[:-num_batches][-_RECENT_BATCHES * num_batches :]
        if self.discovery.alarm is None or not before:
            return False
        recent, chance = sum(before) / len(before), 1 / max(module.num_classes)
        share = above_chance(sum(last) / len(last), chance) / above_chance(recent, chance)
        return share < lowest_fit(self.discovery.alarm, recent, chance, num_images)


def _num_batches(batch: Batch) -> int:
    """How many of them hold enough images to decide on."""
    return -(-_LEAST_IMAGES // (len(batch[1]) * num_processes()))


def _joined(batches: list[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return (torch.cat(images), torch.cat(labels)) if len(batches) > 1 else batches[0]


def _accuracy(module: "ContinualModule", logits: Tensor, labels: Tensor) -> float:
    """Share of a batch, over all processes, whose class is right."""
    predicted = logits[:, : max(module.num_classes)].argmax(1)
    return mean_over_processes((predicted == labels).float().mean()).item()


def discovery_of(trainer: L.Trainer) -> TaskDiscovery | None:
    """The trainer's `TaskDiscovery`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, TaskDiscovery)), None)


def boundary_or_discovery(discovery: Discovery | None) -> L.Callback:
    """`TaskDiscovery` where tasks have to be discovered, `TaskBoundary` where they are announced."""
    return TaskBoundary() if discovery is None else TaskDiscovery(discovery)


def _method(module: "ContinualModule") -> Any:
    """The method, which `check_trains_on` has looked at."""
    return module.method
