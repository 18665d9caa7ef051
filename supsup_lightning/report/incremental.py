"""Class-incremental accuracy, where the task is hidden: over the images of all tasks, and as tasks come.

a_n = right predictions after n tasks / test images of these n tasks     accuracy over all classes seen so far
last accuracy: a_T      average incremental accuracy: (a_1 + ... + a_T) / T   (Rebuffi et al. 2017, iCaRL)

An image counts as much as any other here. ``average_accuracy`` and the task-incremental accuracy are means over tasks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from supsup_lightning.inference import Inference
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import ByNumber
from supsup_lightning.report.metrics import TaskAccuracy
from supsup_lightning.scenario import Scenario

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


def last_accuracy(matrix: Tensor, images: Tensor) -> float | None:
    """Accuracy over the test images of all tasks, after the last one.

    Args:
        matrix: accuracy matrix, ``(tasks, tasks)``: row ``n - 1`` after ``n`` tasks, NaN where not evaluated.
        images: number of test images of each task, ``(tasks,)``.

    Returns:
        In [0, 1]; None if a task with test images was not evaluated, or none has any.

    >>> last_accuracy(torch.tensor([[1.0, float("nan")], [0.8, 0.5]]), torch.tensor([300, 100]))
    0.725
    """
    value = _over_all_images(matrix[-1], images)
    return None if value is None else round(value, 6)


def average_incremental_accuracy(matrix: Tensor, images: Tensor) -> float | None:
    """Mean over the sequence of the accuracy over all classes seen so far (Rebuffi et al. 2017).

    Arguments are as in `last_accuracy`.

    Returns:
        In [0, 1]; None unless all tasks seen so far were evaluated after every task.

    >>> average_incremental_accuracy(torch.tensor([[1.0, float("nan")], [0.8, 0.5]]), torch.tensor([300, 100]))
    0.8625
    """
    seen = [_over_all_images(row[:number], images[:number]) for number, row in enumerate(matrix, start=1)]
    known = [value for value in seen if value is not None]
    return round(sum(known) / len(known), 6) if known and len(known) == len(seen) else None


def _over_all_images(accuracy: Tensor, images: Tensor) -> float | None:
    images = images.to(accuracy.device)
    has_images = images > 0
    right = (accuracy * images)[has_images].sum()  # NaN if a task was not evaluated
    return None if right.isnan() or not has_images.any() else (right / images.sum()).item()


def images_per_decision(inference: Inference, scenario: Scenario) -> int | str | None:
    """How many images decide on a task: a number of the first of a batch, ``batch``, or ``each`` for itself.

    None where the task is given, or an inference of one's own has no such option.
    """
    return None if scenario.task_known_at_inference else getattr(inference, "images", None)


def can_be_given(method: Method, scenario: Scenario) -> bool:
    """Whether there is a task-incremental accuracy beside the one of a hidden task.

    A learner of unannounced tasks has numbers of its own for them, among which none is the true one.
    """
    hidden = scenario.task_known_in_training and not scenario.task_known_at_inference
    return hidden and isinstance(method, ByNumber)


@torch.no_grad()
def count_given(
    given: TaskAccuracy, module: "ContinualModule", batch: tuple[Tensor, Tensor], *, task: int, outputs: Any
) -> None:
    """Count what is predicted right of a test batch with its task given.

    Where the mask of the task that was found predicts the class, an image of which the right task was found has its
    answer already; only the others pass through the network once more.

    Args:
        given: where to count.
        module: in a test.
        batch: images ``(batch, *shape)`` and labels ``(batch,)``.
        task: the true task.
        outputs: of the test step: ``right`` and ``found``, ``(batch,)`` bool.
    """
    images, labels = batch
    answered, right = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels, dtype=torch.bool)
    # An inference with a ``predict`` of its own may name classes in another way than by the mask.
    if isinstance(outputs, Mapping) and type(module.inference).predict is Inference.predict:
        answered, right = outputs["found"], outputs["right"] & outputs["found"]
    if not answered.all():
        missing = ~answered
        right[missing] = module.classes(module.method(images[missing], task), task) == labels[missing]
    given.update(task, right=right, found=torch.ones_like(right))


def entries(
    *,
    scenario: Scenario,
    inference: Inference,
    accuracy: TaskAccuracy,
    matrix: Tensor,
    images: Tensor,
    num_learned: int,
    given: Tensor | None,
) -> dict[str, Any]:
    """Return the entries of results.json; those of a hidden task are None where it is given.

    Args:
        scenario: the scenario.
        inference: how the task was found.
        accuracy: accuracy of the final test.
        matrix: accuracy matrix, ``(tasks, tasks)``.
        images: number of test images of each task, ``(tasks,)``, of all processes.
        num_learned: number of finished tasks; a test of only the first ones is no part of the sequence.
        given: accuracy of each task with the task given, ``(tasks,)``; None if it was not measured.
    """
    hidden, announced = not scenario.task_known_at_inference, scenario.task_known_in_training
    whole = hidden and announced and num_learned == len(matrix)
    per_task = None if given is None else [round(value, 6) for value in given.tolist()]
    return {
        "images_per_decision": images_per_decision(inference, scenario),
        "last_accuracy": last_accuracy(accuracy.compute()[:1].cpu(), images) if hidden else None,
        "average_incremental_accuracy": average_incremental_accuracy(matrix, images) if whole else None,
        "task_incremental_accuracy": None if per_task is None else round(sum(per_task) / len(per_task), 6),
        "task_incremental_accuracy_per_task": per_task,
        "test_images_per_task": images.tolist(),
    }


def in_words(result: Mapping[str, Any]) -> str:
    """Return the class-incremental numbers of a result in one sentence; empty where the task is given.

    >>> in_words({"last_accuracy": 0.5, "average_incremental_accuracy": None, "task_incremental_accuracy": 0.75})
    'over all classes seen: last accuracy 0.5000, average incremental not known; with the task given 0.7500'
    """
    last, average = result.get("last_accuracy"), result.get("average_incremental_accuracy")
    if last is None:
        return ""
    given = result.get("task_incremental_accuracy")
    said = f"over all classes seen: last accuracy {last:.4f}"
    said += f", average incremental {'not known' if average is None else f'{average:.4f}'}"
    return said + ("" if given is None else f"; with the task given {given:.4f}")


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Return how the average incremental accuracy is obtained, where it is not known and could be."""
    announced = "learned_as" not in result
    if not announced or "evaluation" in result or result.get("last_accuracy") is None:
        return []
    if result["average_incremental_accuracy"] is not None:
        return []
    together = " data.tasks_at_once=1" if result["tasks_at_once"] > 1 else ""
    return [f"average incremental accuracy needs a test after every task, which eval_at=all{together} gives"]
