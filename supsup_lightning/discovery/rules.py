"""Rules that decide whether a batch belongs to a known task or to a new one (scenario NNs)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supsup_lightning.errors import ConfigurationError, check_choice, check_whole
from supsup_lightning.inference.objectives import OBJECTIVES, Objective, check_superfluous
from supsup_lightning.inference.one_shot import confidence_gain
from supsup_lightning.methods.kept_scores import PLACES

_NOTHING_LEARNED = 0.05


def above_chance(accuracy: float, chance: float) -> float:
    """Accuracy above chance, plus a small constant, so that a task that has learned nothing yet fits every batch.

    >>> above_chance(0.1, 0.1) / above_chance(0.1, 0.1), round(above_chance(0.1, 0.1) / above_chance(0.9, 0.1), 2)
    (1.0, 0.06)
    """
    return max(accuracy - chance, 0) + _NOTHING_LEARNED


def lowest_fit(threshold: float, accuracy: float, chance: float, num_images: int) -> float:
    """Lowest share of a task's accuracy on so few images that still counts as the same task.

    ``threshold``, or where chance alone could go below that, three standard errors below 1.

    >>> lowest_fit(0.8, 0.95, 0.1, 128), round(lowest_fit(0.8, 0.6, 0.1, 16), 2)
    (0.8, 0.33)
    """
    standard_error = (max(accuracy * (1 - accuracy), 1 / num_images) / num_images) ** 0.5
    return min(threshold, 1 - 3 * standard_error / above_chance(accuracy, chance))


class Verdict(NamedTuple):
    """A rule's judgement of one batch.

    Attributes:
        task: the task that fits it best.
        statistic: how well.
        threshold: the task fits if the statistic is not below it; otherwise none does.
    """

    task: int
    statistic: float
    threshold: float

    @property
    def fits(self) -> bool:
        """Whether training continues with that task."""
        return self.statistic >= self.threshold


class Discovery(ABC):
    """Base class of rules: when to judge a batch, and what follows; override `judge` for a rule of your own.

    Args:
        every: batches from one decision to the next.
        alarm: decide at once where accuracy on training batches (above chance) falls below this share of what it was
            on the ten before; by None never, so that a task that lasts less than ``every`` may be overlooked.
        max_masks: the most masks to make; by default there is no limit.
        at_max_masks: what then becomes of a batch that no task fits: ``reuse`` the best of them, or ``stop``.
        on_unknown: what becomes of it before: ``new_mask``; ``combine``, train only the coefficients of a linear
            combination of the masks there are; or ``auto``, try to combine, and make a mask if that is not accurate.
        combine_from: masks that there have to be before any are combined.
        trial_steps: batches on which a combination is trained before it is judged; far less than a task lasts, or the
            task is over before it gets a mask.
        tolerance: in accuracy on training batches: how far a combination may be below the mean of the known tasks.
        scores: where scores of tasks that may come again are kept: ``device``, ``host`` or ``bits`` (`KeptScores`).

    Raises:
        ConfigurationError: an option out of its range.

    Attributes:
        needs_gate: it asks the sums of inference=discriminant.
    """

    needs_gate = False

    def __init__(
        self,
        *,
        every: int = 100,
        alarm: float | None = 0.8,
        max_masks: int | None = None,
        at_max_masks: str = "reuse",
        on_unknown: str = "new_mask",
        combine_from: int = 2,
        trial_steps: int = 100,
        tolerance: float = 0.02,
        scores: str = "host",
    ) -> None:
        check_choice("discovery.at_max_masks", at_max_masks, ("reuse", "stop"))
        check_choice("discovery.on_unknown", on_unknown, ("new_mask", "combine", "auto"))
        check_choice("discovery.scores", scores, PLACES)
        counts = {"every": every, "max_masks": max_masks, "combine_from": combine_from, "trial_steps": trial_steps}
        for name, value in counts.items():
            if value is not None or name != "max_masks":
                check_whole(f"discovery.{name}", value)
        if alarm is not None and not (_is_number(alarm) and 0 < alarm < 1):
            raise ConfigurationError(f"discovery.alarm={alarm!r} is a share; it lies between 0 and 1, or is null.")
        if not (_is_number(tolerance) and 0 <= tolerance < 1):
            raise ConfigurationError(f"discovery.tolerance={tolerance!r} is in accuracy; it lies in [0, 1).")
        if at_max_masks == "stop" and max_masks is None:
            raise ConfigurationError("discovery.at_max_masks=stop has no effect without discovery.max_masks.")
        if on_unknown != "new_mask" and max_masks is not None and combine_from > max_masks:
            raise ConfigurationError(
                f"discovery.combine_from={combine_from} masks cannot be reached with discovery.max_masks={max_masks}."
            )
        self.every = every
        self.alarm = alarm
        self.max_masks = max_masks
        self.at_max_masks = at_max_masks
        self.on_unknown = on_unknown
        self.combine_from = combine_from
        self.trial_steps = trial_steps
        self.tolerance = tolerance
        self.scores = scores

    def check(self, *, output_size: int, num_classes: int) -> None:  # noqa: B027 (most have nothing to check)
        """Raise `ConfigurationError` if the rule cannot work with such a network."""

    @abstractmethod
    def judge(
        self,
        method: Any,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        current: int,
        accuracy: Mapping[int, float],
    ) -> Verdict:
        """Which task fits a training batch best, and how well.

        Args:
            method: with the tasks so far, each as it was last committed, the one in training included.
            images: ``(batch, *shape)`` float32.
            labels: ``(batch,)`` int64.
            num_classes: of the task with most of them.
            current: the task in training.
            accuracy: of each task on its own training batches, as last measured.

        Of small batches, several are judged at once.
        With several processes, each judges its share of a batch: bring what is measured together by
        `mean_over_processes` before anything is decided on it. The first process's verdict counts.
        """


class AsksGradient(Discovery):
    """Base class of rules that ask the gradient of a superposition.

    Args:
        objective: of the one-shot gradient: ``entropy``, ``superfluous`` or ``max_probability``.
        options: those of `Discovery`.
    """

    def __init__(self, objective: str = "entropy", **options) -> None:
        super().__init__(**options)
        check_choice("discovery.objective", objective, tuple(OBJECTIVES))
        self.objective_name = objective
        self.objective: Objective = OBJECTIVES[objective]

    def check(self, *, output_size: int, num_classes: int) -> None:
        """Raise `ConfigurationError` if the objective needs superfluous outputs and the network has none."""
        check_superfluous("discovery", self.objective_name, output_size=output_size, num_classes=num_classes)


class AccuracyDiscovery(AsksGradient):
    """A task fits if its accuracy on the batch is close to that on its own earlier batches.

    One gradient of the superposition names a few candidates, masks and combinations; each, and the task in training,
    then predicts the batch, whose labels training knows. Statistic: accuracy above chance, as a share of that on the
    task's own batches: near 1 for a known task and 0 for an unknown one, however many masks there are.

    Args:
        objective: of the one-shot gradient.
        threshold: the share that a task has to reach; less where the batch is too small to tell (`lowest_fit`).
        candidates: masks, and combinations, that predict the batch.
        options: those of `Discovery`.
    """

    def __init__(self, objective: str = "entropy", *, threshold: float = 0.8, candidates: int = 3, **options) -> None:
        super().__init__(objective, **options)
        if not (_is_number(threshold) and 0 < threshold < 1):
            raise ConfigurationError(f"discovery.threshold={threshold!r} must lie between 0 and 1.")
        self.threshold = threshold
        self.candidates = check_whole("discovery.candidates", candidates)

    def judge(
        self,
        method: Any,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        current: int,
        accuracy: Mapping[int, float],
    ) -> Verdict:
        """The fitting candidate with the highest accuracy."""
        gain = mean_over_processes(confidence_gain(method, images, num_classes, self.objective))
        # A combination's gain is a mean of its masks', so they would leave it no place.
        masks, combined = gain[: method.num_masks], gain[method.num_masks :]
        likely = [self._first(masks), self._first(combined) + method.num_masks]
        tasks = list(dict.fromkeys([current, *method.tasks[torch.cat(likely)].tolist()]))
        right = [(method(images, task)[:, :num_classes].argmax(1) == labels).float().mean() for task in tasks]
        shares = mean_over_processes(torch.stack(right)).tolist()
        chance = 1 / num_classes
        fits = [
            above_chance(share, chance) / above_chance(accuracy[task], chance)
            for task, share in zip(tasks, shares, strict=True)
        ]
        num_images = len(images) * num_processes()
        lowest = [lowest_fit(self.threshold, accuracy[task], chance, num_images) for task in tasks]
        fitting = [place for place, fit in enumerate(fits) if fit >= lowest[place]]
        best = max(fitting, key=shares.__getitem__) if fitting else max(range(len(fits)), key=fits.__getitem__)
        return Verdict(tasks[best], fits[best], lowest[best])

    def _first(self, gain: Tensor) -> Tensor:
        return gain.topk(min(self.candidates, len(gain))).indices


class GradientDiscovery(AsksGradient):
    """The paper's rule: no task fits if the gradients of all tasks are nearly equal (section 3.4).

    Statistic: ``k * max_i softmax(-dO/da)_i``, 1 where all tasks gain alike. It looks at no label, and it shrinks as
    tasks become many: at a fixed ``epsilon`` it serves dozens of them, trained with ``optimizer=rmsprop``.

    Args:
        objective: of the one-shot gradient.
        epsilon: a task fits if the statistic is at least 1 + epsilon.
        min_masks: while there are fewer, random masks that no task has trained fill the superposition up.
        options: those of `Discovery`.
    """

    def __init__(self, objective: str = "entropy", *, epsilon: float = 2**-3, min_masks: int = 5, **options) -> None:
        super().__init__(objective, **options)
        if not (_is_number(epsilon) and epsilon > 0):
            raise ConfigurationError(f"discovery.epsilon={epsilon!r} must be positive.")
        self.epsilon = epsilon
        self.min_masks = check_whole("discovery.min_masks", min_masks, least=2, more=": one mask by itself always wins")

    def judge(
        self,
        method: Any,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        current: int,
        accuracy: Mapping[int, float],
    ) -> Verdict:
        """The task with the largest gain."""
        missing = self.min_masks - len(method.tasks)
        with method.with_random_masks(missing) if missing > 0 else nullcontext():
            gain = mean_over_processes(confidence_gain(method, images, num_classes, self.objective))
            tasks = method.tasks.tolist()
        known = [place for place, task in enumerate(tasks) if task >= 0]
        best = max(known, key=gain.tolist().__getitem__)
        statistic = len(gain) * torch.softmax(gain, 0)[best].item()
        return Verdict(tasks[best], statistic, 1 + self.epsilon)


def num_processes() -> int:
    """Number of processes that share each batch."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, the same in each."""
    if num_processes() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / num_processes()


def from_first_process(value: Any) -> Any:
    """Value of the first process, in every process."""
    if num_processes() > 1:
        values = [value]
        torch.distributed.broadcast_object_list(values)
        (value,) = values
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
