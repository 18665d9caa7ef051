"""Rule for unannounced streams: a batch is of a known task if the means of its classes are that task's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from supsup_lightning.discovery.rules import Discovery, Verdict
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.gate.class_shift import shift


class NoveltyDiscovery(Discovery):
    """A task fits if the batch's classes have their means where the task's are, in the features of the gate.

    Statistic: minus the distance from the nearest task, `gate.class_shift.Shift`; the threshold is what a batch of that
    task reaches but for so many standard deviations. It asks no mask, so it tells tasks apart that look alike, where
    gradients cannot. Needs ``inference=discriminant``, whose sums it compares with.

    Args:
        deviations: number of standard deviations.
        options: those of `Discovery`.
    """

    needs_gate = True

    def __init__(self, *, deviations: float = 5.0, **options) -> None:
        super().__init__(**options)
        number = isinstance(deviations, (int, float)) and not isinstance(deviations, bool)
        if not number or not deviations > 0:
            raise ConfigurationError(f"discovery.deviations={deviations!r} must be positive.")
        self.deviations = deviations

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
        """The nearest task."""
        gate = method.gate
        found = shift(gate.discriminant(method.tasks, rounded=False), gate.features(method, images), labels)
        nearest = int(found.distances.argmin())
        limit = found.expected[nearest] + self.deviations * found.deviation[nearest]
        return Verdict(int(method.tasks[nearest]), -found.distances[nearest].item(), -limit.item())
