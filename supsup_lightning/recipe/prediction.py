"""Predictions by name: the task, the class and the confidence of each image of a mixed batch."""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.data.raw_images import network_inputs
from supsup_lightning.errors import ConfigurationError, SupSupError, as_whole
from supsup_lightning.inference import Discriminant, Inference
from supsup_lightning.inference.inference import ConfidenceInference, differentiable

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


@dataclass(frozen=True)
class Prediction:
    """Answers for a batch of images.

    Attributes:
        task: number of each image's task, ``(batch,)`` int64; -1 for an unknown input, and where the inference does not
            number tasks.
        label: class of each image among those of its task, ``(batch,)`` int64; -1 for an unknown input.
        confidence: softmax probability of the class among the classes of the task, ``(batch,)`` float32 in [0, 1]; 0
            for an unknown input. It does not say how sure the task is.
        unknown: whether each image belongs to no task, ``(batch,)`` bool; True only where the inference looks for such
            (``inference.unknown``).
        task_name: name of each task; None where ``task`` is -1.
        class_name: name of each class; None for an unknown input.
    """

    task: Tensor
    label: Tensor
    confidence: Tensor
    unknown: Tensor
    task_name: list[str | None]
    class_name: list[str | None]

    def __len__(self) -> int:
        return len(self.task)


def predict(module: "ContinualModule", images: Any, *, task: Any, together: bool) -> Prediction:
    """See `ContinualModule.predict`."""
    if not module.num_classes or not len(module.method.tasks):
        raise ConfigurationError("There is no finished task to predict; train first, or load a mask bank.")
    about = module.about_data
    inputs, raw = (module.inputs, None) if about is None else (about.inputs, about.raw)
    batch = network_inputs(images, inputs, raw, module.method.network).to(module.device)
    if task is not None or not module.inference.finds_task:
        tasks, labels, confidence = _given(module, batch, _tasks(module, task, len(batch), together=together))
    else:
        tasks, labels, confidence = _inferred(module, batch, together=together)
    unknown = (
        tasks == -1 if module.inference.finds_unknown and task is None else torch.zeros_like(tasks, dtype=torch.bool)
    )
    labels, confidence = labels.masked_fill(unknown, -1), confidence.masked_fill(unknown, 0.0)
    pairs = list(zip(tasks.tolist(), labels.tolist(), strict=True))
    return Prediction(
        task=tasks,
        label=labels,
        confidence=confidence,
        unknown=unknown,
        task_name=[None if number < 0 else module.name_of_task(number) for number, _ in pairs],
        class_name=[None if label < 0 else module.name_of_class(number, label) for number, label in pairs],
    )


def _tasks(module: "ContinualModule", task: Any, batch: int, *, together: bool) -> list[int]:
    finished = {*module.method.tasks.tolist()}
    if together:
        raise ConfigurationError("together=True has no effect where the task is given; leave it out.")
    if task is None:
        raise ConfigurationError(
            "This model finds no task (scenario=gg): say which it is, predict(images, task=3), with one number for all "
            "images or one for each."
        )
    numbers = [task] * batch if as_whole(task) is not None else [*task] if isinstance(task, Iterable) else []
    known = [as_whole(number) for number in numbers]
    if len(known) != batch or any(number not in finished for number in known):
        raise ConfigurationError(
            f"task={task!s:.80} is neither a finished task nor one for each of {batch} images; finished are "
            f"{', '.join(map(str, sorted(finished)[:20]))}."
        )
    return [number for number in known if number is not None]


def _given(module: "ContinualModule", images: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    tasks = torch.tensor(numbers, dtype=torch.int64, device=images.device)
    labels, confidence = torch.full_like(tasks, -1), torch.zeros(len(tasks), device=images.device)
    with in_mode(module, training=False):
        for number in {*numbers}:
            own = tasks == number
            labels[own], confidence[own] = _answer(module, module.method(images[own], number), number)
    return tasks, labels, confidence


def _inferred(module: "ContinualModule", images: Tensor, *, together: bool) -> tuple[Tensor, Tensor, Tensor]:
    inference = module.inference
    alone = getattr(inference, "images", None) == "each"
    if together and alone:
        raise ConfigurationError(
            "together=True has no effect with inference.images=each, by which every image decides by itself; leave it "
            "out, or use another inference.images."
        )
    if together or alone or not len(images):
        return _infer(module, images, inference)
    try:
        if isinstance(inference, (ConfidenceInference, Discriminant)):
            each = copy(inference)
            each.images = "each"
            return _infer(module, images, each)
        answers = [_infer(module, image, inference) for image in images.split(1)]
    except ValueError as error:
        if isinstance(error, SupSupError):
            raise
        # torch's, of a layer that is to normalise a single value
        raise ConfigurationError(
            f"A single image is too few to find its task by, as the network normalises by the batch ({error}). Give "
            "images of one task and predict(images, together=True)."
        ) from error
    tasks, labels, confidence = (torch.cat(column) for column in zip(*answers, strict=True))
    return tasks, labels, confidence


@differentiable
def _infer(module: "ContinualModule", images: Tensor, inference: Inference) -> tuple[Tensor, Tensor, Tensor]:
    if not len(images):
        none = torch.empty(0, dtype=torch.int64, device=images.device)
        return none, none.clone(), none.float()
    with in_mode(module, training=False):
        tasks, logits = inference.predict(module.method, images, max(module.num_classes))
        labels, confidence = torch.full_like(tasks, -1), torch.zeros(len(tasks), device=logits.device)
        for number in tasks.unique().tolist():
            own = tasks == number
            labels[own], confidence[own] = _answer(module, logits[own], number if inference.numbers_tasks else -1)
    return tasks, labels, confidence


def _answer(module: "ContinualModule", logits: Tensor, task: int) -> tuple[Tensor, Tensor]:
    """Label, and its probability, of each image ``(batch,)`` from logits ``(batch, output_size)``."""
    probabilities = logits[:, : module.num_classes_of(task)].float().softmax(1)
    labels = module.classes(logits, task)
    return labels, probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
