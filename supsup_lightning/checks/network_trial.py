"""Trial of the network before training: it must work with the parameters of tasks in place of its own.

Two tasks are begun, trained for two steps, finished and inferred on a copy of the method, which shares the network.
A failure raises an error with one message, and the network is left unchanged.
"""

import copy
import random
from collections.abc import Iterator
from textwrap import shorten
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from supsup_lightning.bank.rows import TaskRows
from supsup_lightning.checks.untouched import Untouched, in_mode
from supsup_lightning.data import TaskDataModule
from supsup_lightning.errors import ConfigurationError, SupSupError
from supsup_lightning.inference import Discriminant, Inference
from supsup_lightning.methods import Method
from supsup_lightning.methods.conventions import is_narrow
from supsup_lightning.methods.frozen_network import FrozenNetworkMethod
from supsup_lightning.methods.protocols import ByNumber, Searches
from supsup_lightning.methods.recompute import keep_for_backward, take_out

_MOST_NAMES = 4  # in a message


def output_size(method: Method, images: Tensor, *, task: int = 0) -> int:
    """Number of outputs of the network without a task.

    Args:
        method: method that holds the network.
        images: two or more images.
        task: task of the images, for messages.

    Raises:
        ConfigurationError: the network does not accept these images, does not return ``(batch, output_size)``, or
            makes parameters in its forward pass.
    """
    network, base = method.network, method.base
    shape = list(images.shape[1:])
    kind = "" if images.dtype == torch.float32 else f" and type {images.dtype}"
    kind += f", as task {task} has them" if task else ""
    names = network.state_dict().keys()
    sizes: set[int] = set()
    for training in (True, False):
        try:
            with Untouched(network, images.device), torch.no_grad(), in_mode(network, training=training):
                output = functional_call(network, base.given({}), (base.conventions.images(images),), tie_weights=False)
                made = sorted(network.state_dict().keys() - names)
        except Exception as error:  # a network may raise any error
            raise ConfigurationError(
                f"{type(network).__name__} does not take inputs of shape {shape}{kind} ({_cause(error)}). "
                f"{_remedy(error, shape, task)}"
            ) from error
        if made:
            raise ConfigurationError(
                f"{type(network).__name__} makes {_some(made)} in its forward pass, too late for masks and files. Make "
                "them in __init__, buffers with persistent=False, or pass a batch through the network before it is "
                "given to a method."
            )
        logits = isinstance(output, Tensor) and output.is_floating_point()
        if not logits or output.ndim != 2 or len(output) != len(images) or len(sizes | {output.shape[1]}) > 1:
            got = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise ConfigurationError(
                f"{type(network).__name__} must return logits (batch, output_size), as many in training and "
                f"in evaluation; got {got} in {'training' if training else 'evaluation'} for {len(images)} inputs of "
                f"shape {shape}{kind}."
            )
        sizes.add(output.shape[1])
    return output.shape[1]


def output_size_of(method: Method, data: TaskDataModule, example: Tensor) -> int:
    """Number of outputs of the network, checked to accept the inputs of all tasks; see `output_size`."""
    size = output_size(method, example)
    for task, images in data.other_examples().items():
        output_size(method, images.to(example.device), task=task)
    return size


def check_superposition(method: Method, inference: Inference, images: Tensor) -> None:
    """Check that ``inference`` can find the task of images with this network.

    Raises:
        ConfigurationError: the network computes in half precision; it normalises by batch statistics, and one image
            decides; or a superposition has no gradient.
    """
    network = method.network
    if inference.finds_task and is_narrow(network):
        raise ConfigurationError(
            f"{type(network).__name__} computes in half precision, whose rounding hides the differences by which tasks "
            "are found; use trainer.precision=bf16-mixed in place of bf16-true or 16-true (or network.float()), or "
            "scenario=gg."
        )
    if inference.asks_single_images:
        images = images[:1]
    alone: Exception | None = None
    superposed: Exception | None = None
    with Untouched(network, images.device), torch.no_grad(), in_mode(network, training=False):
        try:
            method.call_network({}, images)
        except Exception as raised:
            alone = raised
        if inference.superimposes and isinstance(method, FrozenNetworkMethod):
            try:
                _superposed_gradient(method, images, each=getattr(inference, "images", None) == "each")
            except Exception as raised:
                superposed = raised
    error = superposed if inference.superimposes else alone
    exhaustive = alone is None and isinstance(method, ByNumber)
    if isinstance(error, ValueError) and inference.asks_single_images:  # torch raises it for a single value per channel
        superimposes_nothing = ", or inference=exhaustive, which superimposes nothing"
        raise ConfigurationError(
            f"{type(network).__name__} normalises by the statistics of the images that decide, and one image has "
            f"none ({error}). Use inference.images=batch or a number from 2 on"
            f"{superimposes_nothing if exhaustive else ''}."
        ) from error
    if error is not None:
        raise ConfigurationError(
            f"{type(network).__name__} cannot take the gradient of a superposition of tasks ({_cause(error)}). "
            f"{'Use inference=exhaustive, which superimposes nothing, or scenario=gg' if exhaustive else 'Change it'}"
            f"{_or_without_checkpoints(method)}."
        ) from error


def _superposed_gradient(method: FrozenNetworkMethod, images: Tensor, *, each: bool) -> None:
    parameters = method.layout.split(method.frozen)

    def value(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return method.base.call_superposed(parameters, images).logsumexp(-1).mean()

    if each:
        vmap(lambda image: grad(value)(parameters, image))(images.unsqueeze(1))
    else:
        grad(value)(parameters, images)


def before_training(method: Method, inference: Inference, trainer: L.Trainer, *, num_classes: int) -> "FinishedAnswers":
    """Try two tasks and a training step on the trainer's device.

    Returns:
        A check that finished tasks keep their answers during training.

    Raises:
        ConfigurationError: the network, or the inference, does not work.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    example = data.example().to(trainer.strategy.root_device)
    inference_mode = trainer.test_loop.inference_mode
    try_tasks(method, inference, example, num_classes=num_classes, inference_mode=inference_mode)
    batch_size = getattr(data, "batch_size", len(example)) // trainer.world_size
    check_training_step(method, example[:1].expand(batch_size, *example.shape[1:]))
    return FinishedAnswers(method, example)


def try_tasks(
    method: Method, inference: Inference, images: Tensor, *, num_classes: int, inference_mode: bool = True
) -> None:
    """Begin, train, finish and infer two tasks in miniature.

    Args:
        method: method about to be trained.
        inference: inference of the task.
        images: a few images, on the method's device.
        num_classes: largest number of classes of a task.
        inference_mode: whether the `Trainer` tests in inference mode.

    Raises:
        ConfigurationError: the network, or the inference, does not work.
    """
    network, device = method.network, images.device
    with Untouched(network, device) as untouched, in_mode(network, training=True), torch.enable_grad():
        trial = _copy(method).train()
        first = max([-1, *method.tasks.tolist()]) + 1
        together = trial.live.rows > 1
        snapshot: dict[str, Tensor] = {}
        before = torch.empty(0)
        for tasks in [(first, first + 1)] if together else [(first,), (first + 1,)]:
            for _ in range(trial.trials_per_task if isinstance(trial, Searches) else 1):
                trial.begin_task(*tasks)
                if not snapshot:
                    snapshot = {name: value.detach().clone() for name, value in trial.effective(first).items()}
                    before = _answers(trial, snapshot, images)
                _train(trial, tasks[0], images)
                if isinstance(trial, Searches) and trial.trials_per_task > 1:
                    trial.finish_trial(tasks[0], accuracy=0.0)
            trial.finish_task(*tasks)
            if trial.gate is not None:
                labels = torch.arange(len(images), device=device) % num_classes
                trial.gate.prepare([(images, labels)])
                with in_mode(trial, training=False):
                    for task in tasks:
                        trial.gate.learn(trial, task, [(images, labels)], num_classes=num_classes)
                        trial.gate.assume(task)
                        if isinstance(inference, Discriminant):
                            inference.measure(trial, [(images, labels)], task=task, num_classes=num_classes)
        if changed := untouched.changed_parameters():
            raise ConfigurationError(
                f"{type(network).__name__} changes its own {_some(changed)} in its forward pass, for all tasks, "
                "finished ones among them. Make it constant, or compute it anew in each forward pass."
            )
        if not _equal(before, _answers(trial, snapshot, images)):
            raise ConfigurationError(_state_message(network, untouched.changed()))
        if inference.finds_task:
            with in_mode(trial, training=False), torch.inference_mode() if inference_mode else torch.no_grad():
                _find(trial, copy.deepcopy(inference), images, num_classes, size=before.shape[1])


def check_training_step(method: Method, images: Tensor) -> None:
    """Raise `ConfigurationError` if the network cannot be compiled, or trained on several tasks in one step.

    Args:
        method: method about to be trained.
        images: images of one training batch, on the method's device.
    """
    live, base, name = method.live, method.base, type(method.network).__name__
    if live.rows == 1 and not live.compile_network:
        return
    statistics = base.statistics_by_name(base.fresh_statistics().expand_as(live.statistics).clone())
    parameters = {**method.live_parameters(live.values), **statistics}
    if live.rows == 1:
        parameters, images = {key: value.squeeze(0) for key, value in parameters.items()}, base.laid_out(images)
    try:
        with in_mode(method.network, training=True), torch.random.fork_rng(devices=[]):
            batch = images.expand(live.rows, *images.shape)
            logits = live.run(method.call_network, parameters, batch, updated=base.statistics_layout.names)
            torch.autograd.grad(logits.sum(), live.values)
    except RuntimeError as error:
        cause = " ".join(str(error).split("\n")[:2]).strip()
        if live.compile_network:
            raise ConfigurationError(f"{name} cannot be compiled here ({cause}); use method.compile=false.") from error
        raise ConfigurationError(
            f"{name} cannot be trained on {live.rows} tasks in the same step ({cause}). Layers that draw "
            "at random (dropout) or look at values cannot be, nor can activation checkpointing; use "
            "data.tasks_at_once=1."
        ) from error


def _copy(method: Method) -> Method:
    """Copy a method without its network; tables of finished tasks are shared, as they are never changed in place."""
    memo: dict[int, object] = {id(method.network): method.network}
    for rows in method.modules():
        if isinstance(rows, TaskRows):
            memo |= {id(table): table for table in (rows.tasks, *map(rows.get_buffer, rows.columns))}
    trial = copy.deepcopy(method, memo)
    trial.live.compile_network = False
    return trial


def _train(trial: Method, task: int, images: Tensor) -> None:
    """Run two steps without an optimizer; the second fails if the network keeps tensors of the first."""
    name = type(trial.network).__name__
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for _ in range(2):
        for parameter in trial.trainable():
            parameter.grad = None
        try:
            cross_entropy(trial(images, task), labels).backward()
        except SupSupError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"{name} works by itself, but cannot be trained through the parameters of a task. Activation "
                f"checkpointing has to be use_reentrant=False{_or_without_checkpoints(trial)}; a forward pass may "
                f"keep no tensor for later ones, nor change a parameter in place. ({_cause(error)})"
            ) from error
        finally:
            take_out(trial.network)
    if isinstance(trial, FrozenNetworkMethod):
        _check_gradient(trial, task, images)


def _check_gradient(trial: FrozenNetworkMethod, task: int, images: Tensor) -> None:
    """Raise `ConfigurationError` if logits depend on a masked parameter whose mask gets no gradient."""
    (scores,) = trial.trainable()
    gradients = (torch.zeros_like(scores) if scores.grad is None else scores.grad)[0]
    without = [name for name, part in trial.layout.split(gradients).items() if not part.any()]
    if not without:
        return
    parameters = {name: value.detach().clone() for name, value in trial.effective(task).items()}
    leaves = {name: parameters[name].requires_grad_() for name in trial.layout.names}
    with in_mode(trial, training=True):
        logits = _logits(trial, {**parameters, **leaves}, images)
        if logits.requires_grad:
            logits.sum().backward()
        blocked = []
        for name in without:
            if leaves[name].grad is None:
                other = {**parameters, **{key: leaf.detach() for key, leaf in leaves.items()}, name: -leaves[name]}
                if not _equal(logits, _logits(trial, other, images)):
                    blocked.append(name)
    if blocked:
        names = ",".join(blocked)
        raise ConfigurationError(
            f"No gradient reaches {_some(blocked)} of {type(trial.network).__name__}, although its outputs depend on "
            f"them: their masks would stay random. Leave them out by mask.exclude=[{names}], or let the gradient "
            "through: no torch.no_grad or detach there, and activation checkpointing with "
            f"use_reentrant=False{_or_without_checkpoints(trial)}."
        )


def _logits(trial: Method, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return logits with the same random numbers each time, on copies of buffers and running statistics."""
    buffers = {name: parameters.get(name, buffer).clone() for name, buffer in trial.network.named_buffers()}
    given = {**parameters, **buffers}
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    logits = trial.call_network(given, images)
    return keep_for_backward(logits, trial.network, lambda: trial.base.given(given))


@torch.no_grad()
def _answers(trial: Method, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    with in_mode(trial, training=False):
        return _logits(trial, parameters, images)


def _find(trial: Method, inference: Inference, images: Tensor, num_classes: int, *, size: int) -> None:
    """Infer the task of images. Raises `ConfigurationError` if that fails or returns no valid tasks and logits."""
    name, known = type(inference).__name__, trial.tasks.tolist()
    try:
        found = inference.predict(trial, images, num_classes)
    except SupSupError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{name} failed when it was tried on {len(images)} images of shape {list(images.shape[1:])} and "
            f"{len(known)} tasks ({_cause(error)})."
        ) from error
    wanted = f"tasks ({len(images)},) of an integer type, each a finished one, and logits ({len(images)}, {size})"
    got = f"{type(found).__name__}"
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        tasks, logits = found
        got = f"{tuple(tasks.shape)} {tasks.dtype} and {tuple(logits.shape)} {logits.dtype}"
        integer = not (tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool)
        if integer and tasks.shape == (len(images),) and logits.is_floating_point():
            tells = inference.numbers_tasks and not inference.finds_unknown
            unknown = sorted({*tasks.tolist()} - {*known, *(() if tells else (-1,))})
            shapes = [(len(images), size), (len(images), num_classes)]
            if not unknown and tuple(logits.shape) in shapes:
                return
            if unknown:
                got = f"task {unknown[0]}, where {known} are finished"
    raise ConfigurationError(f"{name}.predict must return {wanted}; tried before training, it returned {got}.")


class FinishedAnswers:
    """Check that no later task changes the logits of the first finished task.

    Masks do not change them, but state in a network's plain attributes may.

    Args:
        method: method in training.
        images: images to predict, on the method's device.
    """

    def __init__(self, method: Method, images: Tensor) -> None:
        self.method, self.images = method, images
        self._first: tuple[int, Tensor] | None = None

    def check(self) -> None:
        """Raise `ConfigurationError` if the logits differ from those of the previous call."""
        method, network = self.method, self.method.network
        if not method.begins_anew or not isinstance(method, ByNumber) or not len(method.tasks):
            return
        task = int(method.tasks[0])
        with Untouched(network, self.images.device), torch.no_grad(), in_mode(method, training=False):
            logits = _logits(method, method.effective(task), self.images)
        if self._first is not None and self._first[0] == task and not _equal(self._first[1], logits):
            raise ConfigurationError(_state_message(network, []))
        self._first = task, logits


def _state_message(network: torch.nn.Module, names: list[str]) -> str:
    where = f"in the attributes {_some(names)}" if names else "outside of parameters and buffers"
    return (
        f"{type(network).__name__} keeps state {where}, by which training changes what a finished task answers: its "
        "logits for the same images are other ones now. Make it constant, or compute it anew in each forward pass."
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal: exactly on a CPU, approximately elsewhere, as kernels may add in any order."""
    tolerance = 0.0 if one.device.type == "cpu" else 1e-3
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _cause(error: Exception) -> str:
    """Return the start of an error's message, or its type if the message is empty."""
    return shorten(str(error), 200) or type(error).__name__


def _remedy(error: Exception, shape: list[int], task: int) -> str:
    if task:
        return "Bring the images of all tasks to one shape and type, in the data sets or by data.resize=true."
    if "dtype" in str(error):
        return "Give images of the type of the network's parameters, or cast them in its forward."
    return f"Give the network the same input_shape as the data, data.input_shape={shape}."


def _or_without_checkpoints(method: Method) -> str:
    """Return the active switches of activation checkpointing, as a remedy to suggest."""
    switches = [*_switches(method.network)]
    return f", or without it: switch off {_some(switches)}" if switches else ""


def _switches(network: torch.nn.Module) -> Iterator[str]:
    for layer, module in network.named_modules():
        for name, value in vars(module).items():
            if value is True and ("checkpoint" in name or name == "memory_efficient"):
                yield f"{layer}.{name}" if layer else name


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
