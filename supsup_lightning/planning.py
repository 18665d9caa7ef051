"""Plans how many tasks are trained at once."""

import logging
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supsup_lightning.checks import network_trial
from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.methods import Method
from supsup_lightning.methods.base_network import has_convolutions
from supsup_lightning.methods.protocols import Searches, TrainsTogether

logger = logging.getLogger(__name__)

_SHARE = 0.7  # of the memory, for `fitting`: the rest is left to what is not predicted

# More tasks at once are no faster on a CPU (benchmarks/train_step.py): their weights leave its caches, and convolutions
# become grouped ones. The bound on an accelerator is a guess, not measured.
_MOST_ON_CPU = 8
_MOST_WEIGHTS_ON_CPU = 2_500_000
_MOST_ON_ACCELERATOR = 256


def trials_of(method: Method) -> int:
    """Number of trainings per task."""
    return method.trials_per_task if isinstance(method, Searches) else 1


def plan(
    method: Method, data: Any, *, make_optimizer: Callable[[list[nn.Parameter]], Optimizer], accelerator: str
) -> None:
    """Set how often each task is trained and how many at once (`ContinualModule.plan_training`)."""
    data.trials_per_task = trials_of(method)
    at_once = getattr(data, "tasks_at_once", 1)
    if at_once == "auto" and not (isinstance(method, TrainsTogether) and method.one_after_another is None):
        at_once = data.tasks_at_once = 1
    if at_once != 1:
        _check_together(method, at_once, make_optimizer)
        example = torch.zeros(2, *data.input_shape) if data.input_shape is not None else data.example()
        network_trial.output_size(method, example)
        batch_size = getattr(data, "batch_size", len(example))
        with in_mode(method.network, training=True):
            bytes_per_task = training_bytes(method, example, batch_size=batch_size, make_optimizer=make_optimizer)
        if at_once == "auto":
            on_accelerator = accelerator not in ("cpu", "mps") and torch.cuda.is_available()
            at_once = min(data.num_tasks, fitting(method, bytes_per_task, on_accelerator=on_accelerator))
        data.tasks_at_once = at_once
        logger.info(
            "data.tasks_at_once=%d: about %.1f MB in training, %.1f MB for each of these tasks",
            at_once,
            at_once * bytes_per_task / 1e6,
            bytes_per_task / 1e6,
        )
    method.live.make_room(at_once)


def _check_together(
    method: Method, at_once: int | str, make_optimizer: Callable[[list[nn.Parameter]], Optimizer]
) -> None:
    """Raise `ConfigurationError` if the method or the optimizer cannot train several tasks in the same step."""
    if not isinstance(method, TrainsTogether):
        raise ConfigurationError(
            f"data.tasks_at_once={at_once} is for method=supsup; {type(method).__name__} trains one task after another."
        )
    if method.one_after_another is not None:
        raise ConfigurationError(
            f"{method.one_after_another} trains one task after another, not data.tasks_at_once={at_once}; leave out "
            "one of the two."
        )
    if not is_elementwise(make_optimizer):
        raise ConfigurationError(
            f"The optimizer does not treat each weight by itself, so data.tasks_at_once={at_once} would mix "
            "the tasks; use one that does (SGD, Adam, RMSprop), or data.tasks_at_once=1."
        )


def training_bytes(
    method: Method, images: Tensor, *, batch_size: int, make_optimizer: Callable[[list[nn.Parameter]], Optimizer]
) -> int:
    """Predicted bytes per task in training.

    Scores, their gradients, effective weights and their gradients, what the optimizer keeps, and what the network
    keeps of a batch for its backward pass; not what operations take for themselves.

    Args:
        method: with its network.
        images: a few inputs, ``(images, *shape)``.
        batch_size: of a training step.
        make_optimizer: of the scores.
    """
    values = 4 * method.live.values.shape[1]
    of_images = (_saved_bytes(method, images) + images.nbytes) * max(1, len(method.transforms))
    return int(values * (4 + _state_per_weight(make_optimizer)) + of_images / len(images) * batch_size)


def _state_per_weight(make_optimizer: Callable[[list[nn.Parameter]], Optimizer]) -> float:
    """Numbers per weight that the optimizer keeps after a step."""
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = make_optimizer([parameter])
    parameter.grad = torch.ones(1000)
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return sum(value.numel() for value in kept if value.numel() >= 1000) / 1000


def _saved_bytes(method: Method, images: Tensor) -> int:
    """Bytes that the network saves for the backward pass of these images."""
    parameters = dict(method.network.named_parameters())
    weights = method.layout.flatten({name: parameters[name].detach().float() for name in method.layout.names})
    weights.requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Copies of the statistics, as layers in training mode change them.
    buffers = {name: buffer.clone() for name, buffer in method.network.named_buffers()}
    keep = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), keep:
        method.call_network({**buffers, **method.layout.split(weights)}, images)
    for tensor in (weights, images, *method.network.parameters()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def fitting(method: Method, bytes_per_task: int, *, on_accelerator: bool) -> int:
    """Number of tasks to train at once: as many as are useful and fit into 0.7 of the memory.

    Of all the memory, not of what is free now, so that a resumed run decides the same.
    """
    most = _MOST_ON_ACCELERATOR
    if not on_accelerator:
        few = min(_MOST_ON_CPU, _MOST_WEIGHTS_ON_CPU // method.layout.num_weights)
        most = 1 if has_convolutions(method.network) else few
    return max(1, min(most, int(_SHARE * total_bytes(on_accelerator=on_accelerator)) // bytes_per_task))


def total_bytes(*, on_accelerator: bool) -> int:
    """Memory of the first accelerator, or of the machine."""
    return torch.cuda.get_device_properties(0).total_memory if on_accelerator else psutil.virtual_memory().total


def is_elementwise(make_optimizer: Callable[[list[nn.Parameter]], Optimizer]) -> bool:
    """Whether an optimizer's step on one row of a parameter is independent of other rows, tested on a few rows."""
    draw = torch.Generator().manual_seed(0)
    values, *gradients = torch.randn(4, 4, 8, generator=draw)

    def steps(rows: int) -> Tensor:
        parameter = nn.Parameter(values[:rows].clone())
        optimizer = make_optimizer([parameter])
        for gradient in gradients:
            parameter.grad = gradient[:rows].clone()
            optimizer.step()
        return parameter.detach()[0]

    try:
        return torch.allclose(steps(1), steps(4))
    except (RuntimeError, TypeError):  # one that wants a closure, say
        return False
