"""The learner of a stream that announces no task: which mask each batch trains. No Trainer is needed."""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supsup_lightning.checks.compatibility import check_trains_on
from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.discovery.rules import (
    Discovery,
    above_chance,
    from_first_process,
    lowest_fit,
    mean_over_processes,
    num_processes,
)
from supsup_lightning.errors import DiscoveryStopped
from supsup_lightning.methods import Method

logger = logging.getLogger(__name__)

_RECENT_BATCHES = 10  # number of batches that one is compared with for the alarm
_LEAST_IMAGES = 64  # number of images that decide; of smaller batches, several count as one
_LOST = 0.05  # share of its accuracy on earlier images of its task: a mask that lost it has learned another task

# `state_dict` keeps these under their names, which checkpoints share.
_STATE = ("accuracy", "steps", "_next_task", "_confirmed_step", "_shares", "_alarmed")

Batch = tuple[Tensor, Tensor]


class Decision(NamedTuple):
    """A decision of the learner and its reason.

    Attributes:
        step: of the stream; the batch of this step is the first that is trained so.
        action: ``go on``, ``switch``, ``new mask``, ``reuse``, ``combine`` (a trial) or ``combined`` (which is kept).
        task: the task trained from here on, by the learner's own numbers.
        statistic: of the verdict; NaN if there was none.
        threshold: of the verdict; NaN if there was none.
    """

    step: int
    action: str
    task: int
    statistic: float = float("nan")
    threshold: float = float("nan")

    @property
    def fits(self) -> bool:
        """Whether a known task fits."""
        return self.statistic >= self.threshold


class Trial(NamedTuple):
    """A combination in training that is kept only if it is accurate.

    Attributes:
        ends: the step of the stream at which it is judged, unless the stream changes before.
        nearest: the known task that fitted best when it began.
    """

    ends: int
    nearest: int


class Learner:
    """Begins, continues and resumes tasks as a `Discovery` finds them.

    Every so many batches, and as soon as accuracy on training batches drops (`Discovery`'s alarm):

    1. What the task in training has learned since is committed, unless it has lost accuracy on the batch of the last
       decision: then the stream has changed meanwhile, and what it learned of another task is left out.
    2. The verdict on the next batch: a task fits (continue it, or switch to it), or none does.
    3. If none does, a new mask begins, or a trial of a combination, as the discovery says.

    Of small batches, the last few count as one. Nothing here looks at an epoch or at a true task, so masks depend on
    the batches alone.

    Args:
        discovery: the rule.

    Attributes:
        decisions: all of them so far.
        accuracy: of each task on its own training batches, as last measured.
        steps: number of batches that each task has been trained on; its schedule continues from there.

    Example:
        >>> learner = Learner(AccuracyDiscovery())  # doctest: +SKIP
        >>> learner.connect(method, num_classes=10)  # doctest: +SKIP
        >>> for step, (images, labels) in enumerate(stream):  # doctest: +SKIP
        ...     if learner.decide(step, (images, labels)):
        ...         optimizer = Adam(method.trainable())  # a task begins or comes back
        ...     logits = method.forward_live(images.unsqueeze(0))[0]
        ...     ...  # one training step
        ...     learner.measure(logits, labels)
        >>> learner.end()  # doctest: +SKIP
    """

    method: Any  # one that trains finished tasks on
    num_classes: int

    def __init__(self, discovery: Discovery) -> None:
        self.discovery = discovery
        self.decisions: list[Decision] = []
        self.accuracy: dict[int, float] = {}
        self.steps: dict[int, int] = {}
        self._next_task = 0  # no number is used twice, not even that of a combination that was given up
        self._trial: Trial | None = None
        self._window: list[Batch] = []  # the last batches
        self._confirmed: Batch | None = None  # the images of the last decision: of the task in training
        self._confirmed_step = 0
        self._shares: list[float] = []  # accuracy of each batch since the task in training began or came again
        self._alarmed = False

    def connect(self, method: Method, *, num_classes: int) -> None:
        """Attach the method whose tasks are trained.

        Args:
            method: has to offer `TrainsOn`.
            num_classes: of the task with most of them.

        Raises:
            ConfigurationError: a method that cannot train a finished task on.
        """
        check_trains_on(method)
        self.method, self.num_classes = method, num_classes

    # The stream.

    def decide(self, step: int, batch: Batch) -> bool:
        """Decide which task a batch trains, before it is trained on.

        Args:
            step: of the stream, from 0.
            batch: images ``(batch, *shape)`` and labels ``(batch,)``.

        Returns:
            Whether a task began or came back, which needs a fresh optimizer; see `steps`.

        Raises:
            DiscoveryStopped: no task fits, and the discovery allows no more masks.
        """
        self._window = [*self._window, batch][-num_batches(batch) :]
        started = False
        if step == 0:
            started = self._begin(Decision(0, "new mask", 0))
        elif self._trial is not None and (self._alarmed or step == self._trial.ends or self._is_hopeless(step)):
            started = self._end_trial(self._trial, step)
        elif self._trial is None and (self._alarmed or step % self.discovery.every == 0):
            started = self._decide(step)
        if self.decisions[-1].step == step:
            self._confirmed, self._confirmed_step = _joined(self._window), step
        if self.method.gate is not None:
            self.method.gate.gather(self.method, self.method.live.task, *batch, num_classes=self.num_classes)
        return started

    def measure(self, logits: Tensor, labels: Tensor) -> None:
        """Record the accuracy on a batch, from its logits before the step.

        Args:
            logits: ``(batch, output_size)``, of the training step.
            labels: ``(batch,)``.
        """
        task = self.method.live.task
        self.steps[task] = self.steps.get(task, 0) + 1
        self._shares.append(self._share(logits, labels))
        window = len(self._window)
        if self._drops(window, num_images=window * len(labels) * num_processes()):
            del self._shares[-window:]
            self._alarmed = True
        del self._shares[: -max(self.discovery.every, self.discovery.trial_steps, 2 * _RECENT_BATCHES * window)]

    def end(self) -> None:
        """Store the task in training at the end of the stream."""
        if self._trial is None:
            self._commit()
        elif self._is_accurate():
            self.method.commit_task(self.method.live.task)
        else:
            logger.warning(
                "The stream ended within a trial of a combination (discovery.trial_steps=%d) that was not accurate "
                "yet; its task is not kept.",
                self.discovery.trial_steps,
            )
        self._trial = None
        self._settle_gate(self.method.live.task)
        self.method.live.end()

    @property
    def confirmed_step(self) -> int:
        """Step of the last decision, whose batches a resumed run needs again."""
        return self._confirmed_step

    def resume(self, *, confirmed: list[Batch], window: list[Batch]) -> None:
        """Continue from a loaded state.

        Args:
            confirmed: the batches up to `confirmed_step`, as many as decide (`num_batches`).
            window: the last batches of the stream, as many.
        """
        self._confirmed, self._window = _joined(confirmed), window

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run continues from."""
        return {
            "decisions": [tuple(decision) for decision in self.decisions],
            "trial": None if self._trial is None else tuple(self._trial),
            **{name: getattr(self, name) for name in _STATE},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From `state_dict`; see `resume`."""
        self.decisions = [Decision(*decision) for decision in state_dict["decisions"]]
        self._trial = None if state_dict["trial"] is None else Trial(*state_dict["trial"])
        for name in _STATE:
            setattr(self, name, state_dict[name])

    # Decisions: each returns whether a task began or came back.

    def _decide(self, step: int) -> bool:
        self._commit()
        decision = self._judge(step, current=self.method.live.task)
        if not decision.fits:
            return self._begin_unknown(decision)
        if decision.task != self.method.live.task:
            return self._reopen(decision._replace(action="switch"))
        return self._note(decision)

    def _judge(self, step: int, *, current: int) -> Decision:
        images, labels = _joined(self._window)
        with in_mode(self.method, training=False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            verdict = self.discovery.judge(
                self.method,
                images.float() if images.is_floating_point() else images,
                labels,
                num_classes=self.num_classes,
                current=current,
                accuracy=self.accuracy,
            )
        return Decision(step, "go on", *from_first_process(tuple(verdict)))

    def _commit(self) -> None:
        """Store the task in training, unless it has become less accurate."""
        task = self.method.live.task
        if task in self.method.tasks.tolist():
            before = self._accuracy_on_confirmed(live=False)
            now = self._accuracy_on_confirmed(live=True)
            assert self._confirmed is not None
            num_images = len(self._confirmed[1]) * num_processes()
            noise = (2 * before * (1 - before) / num_images) ** 0.5  # standard error of the difference, at most
            if now < before - max(_LOST * before, 2 * noise):
                return
        self.method.commit_task(task)
        if self._shares:
            self.accuracy[task] = self._measured_accuracy()

    @torch.no_grad()
    def _accuracy_on_confirmed(self, *, live: bool) -> float:
        """Accuracy of the task in training, as it is now or as it was last committed."""
        assert self._confirmed is not None
        images, labels = self._confirmed
        with in_mode(self.method, training=live):
            effective = self.method.effective(self.method.live.task)
        with in_mode(self.method, training=False):
            logits = self.method.call_network(effective, images)
        return self._share(logits, labels)

    def _begin_unknown(self, decision: Decision) -> bool:
        if self.discovery.on_unknown == "new_mask" or self.method.num_masks < self.discovery.combine_from:
            return self._begin_mask(decision)
        self._trial = Trial(decision.step + self.discovery.trial_steps, nearest=decision.task)
        self.method.begin_combination(self._next_task)
        return self._start(decision._replace(task=self._next_task, action="combine"))

    def _begin_mask(self, decision: Decision) -> bool:
        discovery = self.discovery
        if discovery.max_masks is None or self.method.num_masks < discovery.max_masks:
            return self._begin(decision._replace(task=self._next_task, action="new mask"))
        if discovery.at_max_masks == "stop":
            raise DiscoveryStopped(
                f"No task fits the batch at step {decision.step} of the stream, and there are discovery.max_masks="
                f"{discovery.max_masks} masks already. Raise it, or use discovery.at_max_masks=reuse."
            )
        return self._reopen(decision._replace(action="reuse"))

    def _end_trial(self, trial: Trial, step: int) -> bool:
        """End the trial: keep the combination, or train a known or a new task instead."""
        self._trial = None
        changed = self._alarmed  # the stream, before the trial was over
        if self._is_accurate() or (self.discovery.on_unknown == "combine" and not changed):
            task = self.method.live.task
            self.method.commit_task(task)
            self.accuracy[task] = self._measured_accuracy()
            self._note(Decision(step, "combined", task))
            return changed and self._decide(step)
        decision = self._judge(step, current=trial.nearest)
        if decision.fits:
            return self._reopen(decision._replace(action="switch"))
        if changed and self.discovery.on_unknown == "combine":
            return self._begin_unknown(decision)
        return self._begin_mask(decision)

    def _begin(self, decision: Decision) -> bool:
        self.method.begin_task(decision.task)
        return self._start(decision)

    def _reopen(self, decision: Decision) -> bool:
        self.method.reopen_task(decision.task)
        return self._start(decision)

    def _start(self, decision: Decision) -> bool:
        self._next_task = max(self._next_task, decision.task + 1)
        self._shares.clear()
        self._note(decision)
        return True

    def _note(self, decision: Decision) -> bool:
        self._alarmed = False
        self.decisions.append(decision)
        self._settle_gate(decision.task)
        return False

    def _settle_gate(self, task: int) -> None:
        """Let the gate learn what came since the last decision, if that was of ``task`` as the stream now is."""
        if self.method.gate is not None:
            self.method.gate.settle(task, finished={*self.method.tasks.tolist()})

    # Accuracy.

    def _share(self, logits: Tensor, labels: Tensor) -> float:
        """Accuracy on a batch over all processes."""
        predicted = logits[:, : self.num_classes].argmax(1)
        return mean_over_processes((predicted == labels).float().mean()).item()

    def _measured_accuracy(self) -> float:
        """Accuracy of the task in training on the second half of the batches since the last decision."""
        last = self._shares[-self.discovery.every :]
        later = last[len(last) // 2 :]
        return sum(later) / len(later)

    def _known_accuracy(self) -> float:
        """Mean accuracy of the known tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def _is_accurate(self) -> bool:
        """Whether the combination in training is as accurate as the known tasks."""
        return bool(self._shares) and self._measured_accuracy() >= self._known_accuracy() - self.discovery.tolerance

    def _is_hopeless(self, step: int) -> bool:
        """Whether an optional combination has less than half the accuracy after half of its trial."""
        assert self._trial is not None
        if self.discovery.on_unknown != "auto" or step != self._trial.ends - self.discovery.trial_steps // 2:
            return False
        return self._measured_accuracy() < self._known_accuracy() / 2

    def _drops(self, window: int, *, num_images: int) -> bool:
        """Whether accuracy on the last batches is far below that on the batches before."""
        last, before = self._shares[-window:], self._shares[:-window][-_RECENT_BATCHES * window :]
        if self.discovery.alarm is None or not before:
            return False
        recent, chance = sum(before) / len(before), 1 / self.num_classes
        share = above_chance(sum(last) / len(last), chance) / above_chance(recent, chance)
        return share < lowest_fit(self.discovery.alarm, recent, chance, num_images)


def num_batches(batch: Batch) -> int:
    """Number of batches of this size that hold enough images for a decision."""
    return -(-_LEAST_IMAGES // (len(batch[1]) * num_processes()))


def _joined(batches: list[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return (torch.cat(images), torch.cat(labels)) if len(batches) > 1 else batches[0]
