"""Base classes of task inference."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from supsup_lightning.errors import ConfigurationError, as_whole, check_whole
from supsup_lightning.inference.consistency import NAME, consistency, standardised, value_of
from supsup_lightning.inference.objectives import Objective, check_superfluous, make_objective
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import ByNumber, Superposes


def differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: run a function outside of `torch.inference_mode`, with ordinary tensors.

    A `Trainer` tests in inference mode, where `torch.func.grad` silently returns zeros in PyTorch 2.11 (2.14 is right).
    No gradient is recorded but for such transforms.
    """

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            with torch.no_grad():
                return function(*arguments, **options)
        with torch.inference_mode(False), torch.no_grad():
            own = [each.clone() if isinstance(each, Tensor) and each.is_inference() else each for each in arguments]
            return function(*own, **options)

    return call


class Inference(ABC):
    """Finds the task of unlabelled images.

    Attributes:
        finds_task: the answer comes from the images; otherwise it has to be given.
        numbers_tasks: it says which task it is, not only what the images are.
        needs: the protocol (`methods.protocols`) that a method has to offer for it.
        superimposes: it asks the gradient of a superposition.
        asks_single_images: one image by itself passes through the network to decide.
        finds_unknown: it answers -1 for an input of no task.
        evidence_name: of what `evidence` gives, for its file; empty if it gives nothing.
        measured_options: names of the options in use for which a task's own validation images are asked when it ends.
    """

    finds_task: bool
    numbers_tasks = True
    needs: type = ByNumber
    superimposes = False
    asks_single_images = False
    finds_unknown = False
    evidence_name = ""
    measured_options: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """The task of each image: ``(batch, *shape)`` to ``(batch,)`` int64.

        ``num_classes`` is that of the task with most of them: no task has a class from there on.
        """

    def predict(self, method: Method, images: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Task ``(batch,)`` int64 and logits ``(batch, output_size)`` of each image under the task that is found."""
        if not len(images):
            return images.new_empty(0, dtype=torch.int64), images.new_empty(0, 0)
        tasks = self(method, images, num_classes)
        logits = {task: method(images[tasks == task], task) for task in tasks.unique().tolist()}
        together = torch.cat(list(logits.values()))
        for task, own in logits.items():
            together[tasks == task] = own
        return tasks, together

    def evidence(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """What these images together say for each task, ``(k,)``, in the order of ``method.tasks``; to be shown."""
        raise NotImplementedError

    def check(  # noqa: B027 (most have nothing to check)
        self, *, output_size: int, num_classes: int, layers: Sequence[str] = ()
    ) -> None:
        """Raise `ConfigurationError` if this inference cannot work with such a network, whose masks are over layers."""


def check_images(images: int | str) -> int | str:
    """Return the option ``inference.images``. Raises `ConfigurationError` unless it is a number, batch or each."""
    count = as_whole(images)
    if images not in ("batch", "each") and (count is None or count < 1):
        raise ConfigurationError(
            f"inference.images={images!r} is neither a number of images from 1 on, nor batch, nor each."
        )
    return images if count is None else count


class Given(Inference):
    """No inference: the task is given (scenario GG)."""

    finds_task = False

    def __call__(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """Raise `ConfigurationError`, as this inference finds no task."""
        raise ConfigurationError("inference=given cannot find a task; use one_shot, binary or exhaustive.")


class ConfidenceInference(Inference):
    """The task under which the network is most confident.

    Args:
        objective: ``entropy``, ``superfluous`` (needs an output_size above the number of classes), ``max_probability``
            or ``consistency`` (needs a method whose superfluous outputs learn transformed copies).
        images: how many images decide. An integer ``n``: the first ``n`` of a batch decide for all of it (the paper:
            1). ``batch``: all of them do. ``each``: every image finds its own task.
        temperature: of the softmax, for ``entropy`` alone.

    Raises:
        ConfigurationError: an option that is unknown or has no effect.
    """

    finds_task = True

    def __init__(self, objective: str = "superfluous", *, images: int | str = 1, temperature: float = 1.0) -> None:
        self.images = check_images(images)
        self.name = objective
        self.asks_single_images = self.images in (1, "each")
        self.objective = _objective(objective, temperature=temperature)

    def check(self, *, output_size: int, num_classes: int, layers: Sequence[str] = ()) -> None:
        """Raise `ConfigurationError` if the objective needs superfluous outputs and the network has none."""
        check_superfluous("inference", self.name, output_size=output_size, num_classes=num_classes)

    @property
    def objectives(self) -> dict[str, str]:
        """Names of the objectives in use, by option."""
        return {"inference.objective": self.name}

    @torch.no_grad()
    def __call__(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """The task of each image: ``(batch, *shape)`` to ``(batch,)`` int64."""
        # Differences between tasks are small next to bfloat16's steps, so autocast stays out.
        with torch.autocast(images.device.type, enabled=False):
            images = images.float() if images.is_floating_point() else images
            if self.images == "each":
                return method.tasks[self.decide_each(method, images, num_classes)]
            deciding = images if self.images == "batch" else images[: self.images]
            return method.tasks[self.decide(method, deciding, num_classes)].expand(len(images))

    @abstractmethod
    def decide(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """The position among ``method.tasks`` of the one task of all these images, ``()`` int64."""

    def decide_each(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """The position of each image's own task, ``(batch,)`` int64."""
        return torch.stack([self.decide(method, image, num_classes) for image in images.split(1)])


def logits_of_each(method: Method, images: Tensor, rows: Tensor) -> Tensor:
    """``(rows, batch, output_size)``: a forward pass under the mask of each of these tasks; rows are positions."""
    logits = torch.empty(0)
    for place, task in enumerate(method.tasks[rows.to(method.tasks.device)].tolist()):
        own = method(images, task)
        if place == 0:
            logits = own.new_empty(len(rows), *own.shape)
        logits[place] = own  # not kept in a list: small tensors in the gaps of large ones let a CPU's heap grow
    return logits


def objective_of_each(method: Method, images: Tensor, rows: Tensor, num_classes: int, objective: Objective) -> Tensor:
    """``(rows, batch)``: the objective under the mask of each of these tasks, in standard units for `consistency`."""
    if objective is not consistency:
        return objective(logits_of_each(method, images, rows), num_classes)
    values = torch.empty(len(rows), len(images), device=images.device)
    for place, task in enumerate(method.tasks[rows.to(method.tasks.device)].tolist()):
        own = value_of(objective, partial(method, task=task), images, num_classes, method)
        values[place] = standardised(own, method, task)
    return values


def _objective(name: str, *, option: str = "inference.objective", temperature: float = 1.0) -> Objective:
    if name == NAME and temperature == 1:
        return consistency
    return make_objective(name, option=option, temperature=temperature, others=(NAME,))


class GradientInference(ConfidenceInference):
    """Base class of gradient-based inference; may try the best candidates one by one.

    Args:
        objective: as in `ConfidenceInference`; also ``images`` and ``temperature``.
        candidates: how many tasks are tried, by a forward pass under the mask of each; 1: the gradient decides
            alone, as in the paper.
        candidate_objective: by which those are judged; None for ``objective``.
        layers: whose weights count in the inner product of gradient and mask: ``all``, as in the paper; ``first``,
            which tells permuted inputs apart far better (docs/results.md); or patterns of names.

    Raises:
        ConfigurationError: an option that is unknown or has no effect.
    """

    needs = Superposes
    superimposes = True
    evidence_name = "gain"

    def __init__(
        self,
        objective: str = "superfluous",
        *,
        images: int | str = 1,
        candidates: int = 1,
        candidate_objective: str | None = None,
        layers: str | Sequence[str] = "all",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(objective, images=images, temperature=temperature)
        candidates = check_whole("inference.candidates", candidates)
        if layers not in ("all", "first") and (
            isinstance(layers, str) or not isinstance(layers, Sequence) or not layers
        ):
            raise ConfigurationError(
                f"inference.layers={layers!r} is neither all, nor first, nor a list of patterns of names, such as "
                "[0.weight]."
            )
        if candidate_objective is not None and candidates == 1:
            raise ConfigurationError(
                f"inference.candidate_objective={candidate_objective} has no effect with inference.candidates=1; leave "
                "it out, or raise that."
            )
        self.candidates = candidates
        self.candidate_objective = candidate_objective
        self.judge = self.objective
        if candidate_objective is not None:
            self.judge = _objective(candidate_objective, option="inference.candidate_objective")
        self.layers = layers if isinstance(layers, str) else list(layers)

    def check(self, *, output_size: int, num_classes: int, layers: Sequence[str] = ()) -> None:
        """Raise `ConfigurationError` also if no layer matches a pattern."""
        super().check(output_size=output_size, num_classes=num_classes, layers=layers)
        if self.candidate_objective is not None:
            check_superfluous("inference", self.candidate_objective, output_size=output_size, num_classes=num_classes)
        for pattern in self.layers if not isinstance(self.layers, str) else ():
            if not layers_among([pattern], layers):
                raise ConfigurationError(
                    f"inference.layers: the pattern {pattern!r} matches no masked parameter of the network "
                    f"({', '.join(layers)})."
                )

    @property
    def objectives(self) -> dict[str, str]:
        """Names of the objectives in use, by option."""
        judge = {} if self.candidate_objective is None else {"inference.candidate_objective": self.candidate_objective}
        return {**super().objectives, **judge}

    def judged(self, method: Method, images: Tensor, num_classes: int, rows: Tensor) -> Tensor:
        """Objective of each image under each of these candidates, ``(rows, batch)``."""
        return objective_of_each(method, images, rows, num_classes, self.judge)


def layers_among(layers: str | Sequence[str], names: Iterable[str]) -> list[str]:
    """Names of the layers that the option ``layers`` selects.

    >>> layers_among("first", ["1.weight", "3.weight"]), layers_among(["3.*"], ["1.weight", "3.weight"])
    (['1.weight'], ['3.weight'])
    """
    if layers == "all":
        return [*names]
    if layers == "first":
        return [*names][:1]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in layers)]
