"""Where a stream says nothing about tasks: which mask the next batches train."""

import warnings
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer

from supsup_lightning.callbacks.task_boundary import check_trainer
from supsup_lightning.data import Unannounced
from supsup_lightning.errors import DiscoveryStopped
from supsup_lightning.inference.discovery import (
    AccuracyDiscovery,
    Discovery,
    Verdict,
    above_chance,
    mean_over_processes,
)
from supsup_lightning.module import ContinualModule, in_mode
from supsup_lightning.seeding import derive_seed

_RECENT_BATCHES = 10  # that one is compared with for the alarm
_LOST = 0.05  # of its accuracy on earlier images of its task: then a mask has learned of another task meanwhile
# An optimizer that starts anew takes steps that are too large for a trained mask, which one gradient then no longer
# tells from the others (docs/discovery.md): its learning rate begins at 0.
_WARM_UP_STEPS = 100

Batch = tuple[Tensor, Tensor]


class Decision(NamedTuple):
    """What was decided, and why.

    Attributes:
        step: of the stream; the batch of this step is the first that is trained so.
        task: that is trained from here on, by the learner's own numbers.
        action: ``go on``, ``switch``, ``new mask``, ``combine`` (a trial begins), ``combined`` (the trial succeeded) or
            ``reuse``.
        statistic: of the verdict; at the end of a trial, the combination's accuracy. NaN at the first step.
        threshold: of the same.
    """

    step: int
    task: int
    action: str
    statistic: float = float("nan")
    threshold: float = float("nan")


class TaskDiscovery(L.Callback):
    """Begins tasks, goes on with them and comes back to them as a `Discovery` finds (scenario NNs).

    Every so many batches, and as soon as accuracy on training batches drops (`Discovery`'s alarm):

    1. What the task in training has learned since is committed, unless it has lost accuracy on the batch of the last
       decision: then the stream has changed meanwhile, and what it learned of another task is dropped.
    2. The verdict on the next batch: a task fits (go on, or switch to it), or none does.
    3. If none does, a new mask begins, or a trial of a combination, as the discovery says.

    Nothing here looks at an epoch or at a true task, so masks depend on the batches alone.

    Attributes:
        decisions: all of them so far.
        accuracy: of each task on its own training batches, as last measured.
        steps: for which each task has been trained; its schedule goes on from there when it comes again.
    """

    def __init__(self, discovery: Discovery | None = None) -> None:
        self.discovery = AccuracyDiscovery() if discovery is None else discovery
        self.decisions: list[Decision] = []
        self.accuracy: dict[int, float] = {}
        self.steps: dict[int, int] = {}
        self._confirmed: Batch | None = None  # the last one that a decision was taken on: of the task in training
        self._confirmed_step = 0
        self._trial_ends: int | None = None  # the step at which the combination in training is judged
        self._nearest = 0  # the known task that fitted best when the trial began
        self._warm_steps = _WARM_UP_STEPS  # since a known task came again
        self._shares: list[float] = []  # accuracy of each batch since the last decision
        self._alarmed = False

    # Lightning's hooks.

    def setup(self, trainer: L.Trainer, pl_module: ContinualModule, stage: str) -> None:
        """Raise `ConfigurationError` where trainer or method cannot do this."""
        if stage == "fit":
            check_trainer(trainer, Unannounced, "data that announce no task; wrap the others: Unannounced(data)")
            pl_module.method.keep_scores(self.discovery.scores)

    def on_train_start(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """Where a run resumes, go on with the task in training."""
        pl_module.current_task = pl_module.method.task_in_training
        if pl_module.current_task is not None:
            step = self._confirmed_step
            self._confirmed = next(trainer.datamodule.batches(step, step + 1))
            self._warm_up(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: ContinualModule, batch: Batch, batch_idx: int
    ) -> None:
        """Decide, where it is time; seed what layers draw (dropout, say) by the step."""
        data = trainer.datamodule
        step, decided = data.step(trainer.current_epoch, batch_idx), True
        if step == 0:
            self._begin(trainer, pl_module, Decision(0, 0, "new mask"))
        elif step == self._trial_ends:
            self._end_trial(trainer, pl_module, batch, step)
        elif self._trial_ends is None and (self._alarmed or step % self.discovery.every == 0):
            self._decide(trainer, pl_module, batch, step)
        else:
            decided = False
        if decided:
            self._confirmed, self._confirmed_step = batch, step
        torch.manual_seed(derive_seed(data.seed, "layers", step, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: ContinualModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure accuracy on training batches, each before it is learned from."""
        task = pl_module.task_in_training
        self.steps[task] = self.steps.get(task, 0) + 1
        share = _accuracy(pl_module, outputs["logits"], outputs["labels"])
        if self._trial_ends is None and self._drops(share, chance=1 / max(pl_module.num_classes)):
            self._alarmed = True
        else:
            self._shares.append(share)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """At the end of the stream, commit what is in training, before the last checkpoint is written."""
        if trainer.current_epoch + 1 < trainer.datamodule.num_epochs:
            return
        if self._trial_ends is not None:  # cut short: there is no later half to judge it by
            self._trial_ends = None
            pl_module.method.commit_task(pl_module.task_in_training)
        else:
            self._commit(pl_module)
        pl_module.method.task_in_training = pl_module.current_task = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "decisions": [tuple(decision) for decision in self.decisions],
            "accuracy": self.accuracy,
            "steps": self.steps,
            "confirmed_step": self._confirmed_step,
            "warm_steps": self._warm_steps,
            "alarmed": self._alarmed,
            "trial_ends": self._trial_ends,
            "nearest": self._nearest,
            "shares": self._shares,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.decisions = [Decision(*decision) for decision in state_dict["decisions"]]
        self.accuracy = state_dict["accuracy"]
        self.steps = state_dict["steps"]
        self._confirmed_step = state_dict["confirmed_step"]
        self._warm_steps = state_dict["warm_steps"]
        self._alarmed = state_dict["alarmed"]
        self._trial_ends = state_dict["trial_ends"]
        self._nearest = state_dict["nearest"]
        self._shares = state_dict["shares"]

    # Decisions.

    def _decide(self, trainer: L.Trainer, module: ContinualModule, batch: Batch, step: int) -> None:
        up_to_date = self._commit(module)
        verdict = trainer.strategy.broadcast(self._judge(module, batch))
        decision = Decision(step, verdict.task, "go on", verdict.statistic, verdict.threshold)
        if not verdict.fits:
            self._begin_unknown(trainer, module, decision)
        elif verdict.task != module.current_task:
            self._reopen(trainer, module, decision._replace(action="switch"))
        elif not up_to_date:  # the stream was elsewhere for a while
            self._reopen(trainer, module, decision)
        else:
            self._note(trainer, decision)

    def _judge(self, module: ContinualModule, batch: Batch) -> Verdict:
        images, labels = batch
        with in_mode(module, training=False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.discovery.judge(
                module.method,
                images.float() if images.is_floating_point() else images,
                labels,
                num_classes=max(module.num_classes),
                current=module.task_in_training,
                accuracy=self.accuracy,
            )

    def _commit(self, module: ContinualModule) -> bool:
        """Commit what is in training unless it has become worse at its task; whether it was committed."""
        method, task = module.method, module.task_in_training
        if task in method.tasks.tolist():
            before = self._accuracy_on_confirmed(module, live=False)
            now = self._accuracy_on_confirmed(module, live=True)
            if now < (1 - _LOST) * before:
                return False
        method.commit_task(task)
        if self._shares:
            self.accuracy[task] = self._measured_accuracy()
        return True

    @torch.no_grad()
    def _accuracy_on_confirmed(self, module: ContinualModule, *, live: bool) -> float:
        """Of the task in training, as it is now or as it was last committed."""
        assert self._confirmed is not None
        images, labels = self._confirmed
        with in_mode(module.method, training=live):
            effective = module.method.effective(module.task_in_training)
        with in_mode(module.method, training=False):
            logits = functional_call(module.method.network, effective, (images,))
        return _accuracy(module, logits, labels)

    def _begin_unknown(self, trainer: L.Trainer, module: ContinualModule, decision: Decision) -> None:
        discovery, method = self.discovery, module.method
        new = len(method.tasks)
        if discovery.on_unknown != "new_mask" and method.num_masks >= discovery.combine_from:
            self._trial_ends = decision.step + discovery.trial_steps
            self._nearest = decision.task
            self.steps[new] = 0
            method.begin_combination(new)
            self._start(trainer, module, decision._replace(task=new, action="combine"))
        else:
            self._begin_mask(trainer, module, decision)

    def _begin_mask(self, trainer: L.Trainer, module: ContinualModule, decision: Decision) -> None:
        discovery, method = self.discovery, module.method
        if discovery.max_masks is None or method.num_masks < discovery.max_masks:
            self._begin(trainer, module, decision._replace(task=len(method.tasks), action="new mask"))
        elif discovery.at_max_masks == "stop":
            raise DiscoveryStopped(
                f"No task fits the batch at step {decision.step} of the stream, and there are discovery.max_masks="
                f"{discovery.max_masks} masks already. Raise it, or use discovery.at_max_masks=reuse."
            )
        else:
            self._reopen(trainer, module, decision._replace(action="reuse"))

    def _end_trial(self, trainer: L.Trainer, module: ContinualModule, batch: Batch, step: int) -> None:
        self._trial_ends = None
        task, accuracy = module.task_in_training, self._measured_accuracy()
        known = sum(self.accuracy.values()) / len(self.accuracy)
        decision = Decision(step, task, "combined", accuracy, known - self.discovery.tolerance)
        if self.discovery.on_unknown == "combine" or accuracy >= decision.threshold:
            module.method.commit_task(task)
            self.accuracy[task] = accuracy
            self._note(trainer, decision)
        else:
            # Meanwhile the stream may have come to a task that is known.
            module.current_task = self._nearest
            verdict = trainer.strategy.broadcast(self._judge(module, batch))
            decision = Decision(step, verdict.task, "switch", verdict.statistic, verdict.threshold)
            if verdict.fits:
                self._reopen(trainer, module, decision)
            else:
                self._begin_mask(trainer, module, decision)

    def _begin(self, trainer: L.Trainer, module: ContinualModule, decision: Decision) -> None:
        self.steps[decision.task] = 0
        module.method.begin_task(decision.task)
        self._start(trainer, module, decision)

    def _reopen(self, trainer: L.Trainer, module: ContinualModule, decision: Decision) -> None:
        module.method.reopen_task(decision.task)
        self._start(trainer, module, decision)

    def _start(self, trainer: L.Trainer, module: ContinualModule, decision: Decision) -> None:
        module.current_task = decision.task
        trainer.strategy.setup_optimizers(trainer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*before `optimizer.step", category=UserWarning)
            for config in trainer.lr_scheduler_configs:
                schedule: Any = config.scheduler
                for _ in range(self.steps.get(decision.task, 0)):
                    schedule.step()
        self._warm_steps = 0 if self.steps.get(decision.task) else _WARM_UP_STEPS
        self._warm_up(trainer)
        self._note(trainer, decision)

    def _note(self, trainer: L.Trainer, decision: Decision) -> None:
        self._shares.clear()
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
        """Of the task in training, on the later half of the batches since the last decision."""
        later = self._shares[len(self._shares) // 2 :]
        return sum(later) / len(later)

    def _drops(self, share: float, *, chance: float) -> bool:
        """Whether a batch's accuracy is far below that of the batches just before."""
        alarm, recent = self.discovery.alarm, self._shares[-_RECENT_BATCHES:]
        if alarm is None or not recent:
            return False
        return above_chance(share, chance) < alarm * above_chance(sum(recent) / len(recent), chance)


def _accuracy(module: ContinualModule, logits: Tensor, labels: Tensor) -> float:
    """Share of a batch, over all processes, whose class is right."""
    predicted = logits[:, : max(module.num_classes)].argmax(1)
    return mean_over_processes((predicted == labels).float().mean()).item()


def discovery_of(trainer: L.Trainer) -> TaskDiscovery | None:
    """The trainer's `TaskDiscovery`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, TaskDiscovery)), None)
