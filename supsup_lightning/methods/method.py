"""The surface that every method offers to the module, the callbacks and the inference."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.methods.conventions import Conventions
from supsup_lightning.methods.recompute import keep_for_backward, take_out


class Offer(StrEnum):
    """What an inference may ask of a method, in words for a message."""

    EFFECTIVE = "the parameters of any finished task"
    SUPERPOSED = "a superposition of the finished tasks"
    RECOVERY = "masks in a Hopfield memory (method=hopfield)"


class Part(NamedTuple):
    """What a task keeps of one parameter or buffer of the network.

    Attributes:
        name: as in the network.
        shape: of it.
        kept: ``mask``, ``implicit`` (a mask in a memory that all tasks share), ``statistics`` (its own values),
            ``own`` (its own values), ``factors`` (two vectors that scale it), ``tied`` (to a masked parameter of
            another name); or nothing, because it is ``frozen``, ``shared`` (trained by the first task),
            ``overwritten`` by each task, or that and ``rotated`` for each.
        density: share of a mask's weights that are on.
        task_bytes: that one more task adds.
    """

    name: str
    shape: tuple[int, ...]
    kept: str
    density: float | None
    task_bytes: float


class Method(nn.Module, ABC):
    """A map from a task to effective parameters of one network, which stays as it is.

    A task's life: ``begin_task(t)``, training of ``trainable()`` through ``forward(images, t)``, ``finish_task(t)``.
    From then on the effective parameters of ``t`` never change.

    Attributes:
        network: any module; its parameters are only ever replaced for the length of one call.
        offers: what can be asked of finished tasks.
        usual_inference: for a message that refuses another one.
    """

    network: nn.Module
    offers: frozenset[Offer] = frozenset({Offer.EFFECTIVE, Offer.SUPERPOSED})
    usual_inference = "inference=one_shot, binary or exhaustive"
    task_in_training: int | None = None
    trials_per_task = 1  # how often a task is trained from the start, for a search
    begins_anew = True  # `begin_task` depends on nothing that an earlier attempt at the task has left
    begins_like_another = False  # a task starts from the finished one that is nearest, by `start_like`
    _channels_last: bool | None = None  # not known before the first images
    combining = False  # what is in training is no mask but the coefficients of a combination

    @abstractmethod
    def begin_task(self, task: int) -> None:
        """Make ready what is trained for ``task``; depends on nothing but the seed and the task."""

    @abstractmethod
    def finish_task(self, task: int) -> None:
        """Turn what was trained into what is kept."""

    def start_like(self, task: int) -> None:
        """Start the task in training from what a finished one has learned."""
        raise NotImplementedError

    def finish_trial(self, task: int, *, accuracy: float) -> None:
        """End one of several trainings of a task, with its accuracy on validation images."""
        raise NotImplementedError

    def in_training(self) -> list[Tensor]:
        """All that training changes: what is trained, and running statistics."""
        statistics = getattr(self, "statistics", None)
        return [*self.trainable(), *([] if statistics is None else [statistics])]

    # Several tasks trained in the same step.

    tasks_at_once = 1
    trains_together = False  # it can be more than 1

    def train_at_once(self, count: int) -> None:
        """Make room for so many tasks in each step. Raises `ConfigurationError` where a method cannot do that."""
        if count != 1:
            raise ConfigurationError(
                f"data.tasks_at_once={count} is for method=supsup; {type(self).__name__} trains one task after another."
            )

    def begin_tasks(self, tasks: Sequence[int]) -> None:
        """`begin_task` for all that are trained in the same step."""
        (task,) = tasks
        self.begin_task(task)

    def finish_tasks(self, tasks: Sequence[int]) -> None:
        """`finish_task` for all that were trained in the same step."""
        (task,) = tasks
        self.finish_task(task)

    def forward_together(self, images: Tensor) -> Tensor:
        """Logits ``(tasks, batch, output_size)`` of images ``(tasks, batch, *shape)`` of all tasks in training."""
        raise NotImplementedError

    def check_training_step(self, images: Tensor) -> None:
        """Raise `ConfigurationError` where the network cannot be trained as it is to be, on a batch like this."""

    # For streams that announce no task (scenario NNs).

    def keep_scores(self, place: str) -> None:
        """Keep what is needed to train finished tasks on. Raises `ConfigurationError` where a method cannot do that."""
        raise ConfigurationError(
            f"{type(self).__name__} cannot train a finished task on, as scenario=nns needs; use method=supsup."
        )

    def begin_combination(self, task: int) -> None:
        """Train ``task`` as a linear combination of the finished ones."""
        raise NotImplementedError

    def with_random_masks(self, count: int) -> AbstractContextManager[None]:
        """For the length of a ``with`` block, that many untrained tasks among the finished ones, at ids below 0."""
        raise NotImplementedError

    def reopen_task(self, task: int) -> None:
        """Train a finished task on."""
        raise NotImplementedError

    def commit_task(self, task: int) -> None:
        """Put the task in training into what is kept, and go on training it."""
        raise NotImplementedError

    @abstractmethod
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that an optimizer changes; the same objects for every task."""

    @property
    def learning_rate(self) -> float | None:
        """Of the task in training, where it takes another than the optimizer's."""
        return None

    @abstractmethod
    def effective(self, task: int) -> dict[str, Tensor]:
        """Parameters by name for ``task``, in training or finished, and the buffers that are the task's own.

        Raises `KeyError` for any other task: to answer with another task's normalisation would be a guess.
        """

    @property
    @abstractmethod
    def tasks(self) -> Tensor:
        """``(k,)`` int64: the finished tasks, in the order of the coefficients of `superposed`."""

    @property
    def num_masks(self) -> int:
        """How many of the finished tasks have a mask of their own."""
        return len(self.tasks)

    # Where it offers superpositions.

    def superposed(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """Parameters by name for a weighted mixture of the finished tasks, by default ``1/k`` of each."""
        raise NotImplementedError(f"{type(self).__name__} offers superpositions, but has no `superposed`.")

    def project(self, gradients: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """From gradients of the superposed parameters to those of the coefficients.

        Args:
            gradients: by name, ``(*batch, *shape)``.
            rows: positions of the coefficients that are wanted, ``(k',)`` int64; by default all.

        Returns:
            ``(*batch, k)``, or ``(*batch, k')``.
        """
        raise NotImplementedError(f"{type(self).__name__} offers superpositions, but has no `project`.")

    def forward_superposed(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits ``(batch, output_size)`` under parameters from `superposed`, differentiable in them."""
        return keep_for_backward(self.call_network(parameters, images), self.network, lambda: self.given(parameters))

    def check_num_tasks(self, num_tasks: int) -> None:
        """Warn, before training, where so many tasks are more than can be kept."""

    @abstractmethod
    def sparsity(self) -> Tensor:
        """Measured share of weights that each finished task switches off, ``(k,)``."""

    @abstractmethod
    def task_bytes(self) -> int:
        """Bytes that one more task adds to what is kept."""

    def combination_bytes(self) -> int:
        """Bytes that one more combination adds; 0 where a method has none."""
        return 0

    def bytes_of(self, task: int) -> int:
        """Bytes that are kept for a finished task."""
        return self.task_bytes()

    def details(self) -> dict[str, Any]:
        """What results.json says besides of what was learned and how."""
        return {}

    @abstractmethod
    def parts(self) -> list[Part]:
        """What a task keeps, by parameter and buffer; the bytes add up to `task_bytes` (rounded up)."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """All that predicts the finished tasks beside code and configuration, by name: what `save` writes."""

    def kept_elsewhere(self) -> int:
        """Bytes that prediction needs besides, and that are in no file of this package: a pretrained network's."""
        return 0

    def kept_bytes(self) -> dict[str, int]:
        """Bytes in memory of what is kept, by the first part of its names; the one rule by which methods compare."""
        bytes_by_part: dict[str, int] = {}
        for name, tensor in self.kept().items():
            part = name.partition(".")[0]
            bytes_by_part[part] = bytes_by_part.get(part, 0) + tensor.nbytes
        elsewhere = self.kept_elsewhere()
        return {**bytes_by_part, **({"network": elsewhere} if elsewhere else {})}

    def dense_bytes(self) -> int:
        """Of one whole network whose parameters are all kept in float32: the unit of ``cap`` in results.json.

        ``cap`` is the CAP of Kang et al. 2022 ("Winning subnetworks"), ``(1 - S) + (1 - alpha) T / 32``, in which
        the bytes of the file take the place of an assumed compression rate ``alpha``.
        """
        return 4 * sum(parameter.numel() for parameter in self.network.parameters())

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write all that prediction needs beside code and configuration."""

    @abstractmethod
    def load(self, path: str | Path) -> None:
        """Read what `save` wrote. Raises `MismatchError` if it does not belong to this network and configuration."""

    def forward(self, images: Tensor, task: int) -> Tensor:
        """Logits ``(batch, output_size)`` under the effective parameters of ``task``."""
        take_out(self.network)
        parameters = self.effective(task)
        logits = self._call(parameters, self.laid_out(images))
        return keep_for_backward(logits, self.network, lambda: self.given(parameters))

    def _call(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return self.call_network(parameters, images)

    def call_network(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits ``(batch, output_size)`` of the network with these parameters in place of its own."""
        return functional_call(self.network, self.given(parameters), (self.given_images(images),), tie_weights=False)

    def given(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """These parameters as the network takes them, tied ones under all of their names."""
        return Conventions(self.network).of(self.network, parameters)

    def given_images(self, images: Tensor) -> Tensor:
        """These images as the network takes them."""
        return images

    def laid_out(self, images: Tensor) -> Tensor:
        """Images with channels last in memory, which is faster, where the network has convolutions and takes them."""
        if images.ndim != 4 or self._channels_last is False or not len(images):
            return images
        laid_out = images.contiguous(memory_format=torch.channels_last)
        if self._channels_last is None:
            self._channels_last = has_convolutions(self.network) and self._takes(laid_out[:2])
            return self.laid_out(images)
        return laid_out

    def _takes(self, images: Tensor) -> bool:
        """Whether the network can compute with images in this layout; a `view` of a convolution's output cannot."""
        modes = {part: part.training for part in self.network.modules()}
        try:
            with torch.no_grad():
                self.network.eval()(images)
        except RuntimeError:
            return False
        finally:
            for part, training in modes.items():
                part.training = training
        return True


def has_convolutions(network: nn.Module) -> bool:
    """Over two dimensions."""
    return any(isinstance(layer, nn.Conv2d) for layer in network.modules())
