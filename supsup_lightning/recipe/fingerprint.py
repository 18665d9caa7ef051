"""A few logits of each of two tasks, by which a model made from a file shows that it computes what was trained.

Checksums cover the weights. Logits also cover what lies between them: an activation that was replaced, another version
of a library's network, a network that was handed over with the same shapes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.data.inputs import Inputs
from supsup_lightning.errors import MismatchError
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import ByNumber
from supsup_lightning.seeding import generator

_IMAGES, _LOGITS = 2, 6
_DIGITS = 5
_TOLERANCE = 0.02  # of the largest logit: another device rounds otherwise, up to TF32
_MOST_VALUES = 2**24  # of an input


def fingerprint(method: Method, inputs: Inputs | None, *, tasks: Sequence[int]) -> dict[str, list[list[float]]]:
    """Logits of each of these finished tasks for images that are drawn; empty where there are none to compare.

    >>> from supsup_lightning import LeNet, SupSup
    >>> method = SupSup(LeNet(output_size=3, input_shape=(1, 8, 8)))
    >>> method.begin_task(4)
    >>> method.finish_task(4)
    >>> [len(row) for row in fingerprint(method, Inputs((1, 8, 8), torch.float32), tasks=[4])["4"]]
    [3, 3]
    """
    if inputs is None or not isinstance(method, ByNumber) or method.base.types_changed:
        return {}
    images = _images(inputs).to(method.live.values.device)
    with in_mode(method, training=False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        logits = {task: method(images, task)[:, :_LOGITS].float().cpu() for task in tasks}
    return {str(task): _rounded(own) for task, own in logits.items() if own.isfinite().all()}


def ends_of(method: Method) -> list[int]:
    """The first and the last finished task."""
    tasks = sorted(method.tasks.tolist())
    return list(dict.fromkeys(tasks[:1] + tasks[-1:]))


def check(method: Method, inputs: Inputs | None, expected: Mapping[str, Any]) -> None:
    """Raise `MismatchError` unless the tasks have the logits of a fingerprint.

    Args:
        method: with the tasks of the file.
        inputs: what it was trained on.
        expected: of the file.
    """
    tasks = [int(task) for task in expected][:2]
    own = fingerprint(method, inputs, tasks=tasks)
    for task, rows in own.items():
        there, here = torch.tensor(expected[task], dtype=torch.float32), torch.tensor(rows)
        if there.shape != here.shape or (there - here).abs().max() > _TOLERANCE * there.abs().max().clamp_min(1e-3):
            raise MismatchError(
                f"The network does not compute what was trained: under the mask of task {task} it gives other logits "
                "than it did then, though its weights are the same. Hand over the very network of the training: "
                "load(path, network=...)."
            )


def _images(inputs: Inputs) -> Tensor:
    shape = (_IMAGES, *inputs.shape)
    if torch.Size(inputs.shape).numel() > _MOST_VALUES:
        raise ValueError(f"its inputs have the shape {list(inputs.shape)[:8]}")
    if not inputs.dtype.is_floating_point:
        return torch.zeros(shape, dtype=inputs.dtype)  # tokens, say, of which 0 is one
    return torch.randn(shape, generator=generator(0, "fingerprint")).to(inputs.dtype)


def _rounded(logits: Tensor) -> list[list[float]]:
    return [[float(f"{value:.{_DIGITS}g}") for value in row] for row in logits.tolist()]
