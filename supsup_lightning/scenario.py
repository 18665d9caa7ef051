"""Scenarios of the paper's table 1: what is known in training and at inference."""

from dataclasses import dataclass

from supsup_lightning.recipe.recorded import recorded


@recorded
@dataclass(frozen=True)
class Scenario:
    """What is known in training and at inference.

    Attributes:
        name: as in the paper.
        task_known_in_training: each training batch comes with its task.
        task_known_at_inference: each test batch comes with its task.
        labels_shared: tasks share their labels, so that a prediction is right if its class is; otherwise both the task
            and the class must be right.
    """

    name: str
    task_known_in_training: bool
    task_known_at_inference: bool
    labels_shared: bool


GG = Scenario("GG", task_known_in_training=True, task_known_at_inference=True, labels_shared=True)
"""Task given in training and at test time."""

GNS = Scenario("GNs", task_known_in_training=True, task_known_at_inference=False, labels_shared=True)
"""Task given in training, hidden at test time; labels shared between tasks."""

GNU = Scenario("GNu", task_known_in_training=True, task_known_at_inference=False, labels_shared=False)
"""Task given in training, hidden at test time; a prediction is right if task and class both are."""

NNS = Scenario("NNs", task_known_in_training=False, task_known_at_inference=False, labels_shared=True)
"""Task hidden in training as well."""
