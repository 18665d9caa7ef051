"""What only some methods offer. An `Inference`, or a part of training, names the protocol that it needs.

Members are methods, properties and plain attributes: from Python 3.12 on, `isinstance` does not see an `nn.Module`'s
submodules, parameters and buffers.
"""

from contextlib import AbstractContextManager
from inspect import getdoc
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from supsup_lightning.bank.hopfield_memory import Descent, Loss, Recovery
from supsup_lightning.bank.layer_statistics import LayerStatistics
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.layout import Layout
from supsup_lightning.methods.base_network import BaseNetwork

Offered = TypeVar("Offered")


@runtime_checkable
class ByNumber(Protocol):
    """The parameters of any finished task."""

    def finished_parameters(self, task: int) -> dict[str, Tensor]:
        """Parameters by name, and the task's own buffers. Raises `KeyError` if the task is not finished."""
        ...


@runtime_checkable
class Superposes(Protocol):
    """A superposition of the finished tasks.

    Attributes:
        layout: the superposed parameters, among which ``inference.layers`` chooses.
        base: the network, which is called with superposed parameters.
    """

    layout: Layout
    base: BaseNetwork

    def superposed(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """Parameters by name for a weighted mixture of the finished tasks, by default ``1/k`` of each."""
        ...

    def project(self, gradients: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """From gradients of the superposed parameters to gradients of the coefficients.

        Args:
            gradients: by name, ``(*batch, *shape)``.
            rows: positions of the coefficients that are wanted, ``(k',)`` int64; by default all.

        Returns:
            ``(*batch, k)``, or ``(*batch, k')``.
        """
        ...


@runtime_checkable
class StandardisesScores(Protocol):
    """Superfluous outputs that learn transformed copies (method.superfluous=rotations, of method=supsup)."""

    def standardise(self, task: int, mean: float, spread: float) -> None:
        """Keep the mean and the spread of a finished task's score on its own validation images."""
        ...

    def standardisation(self, task: int) -> tuple[float, float]:
        """Mean and spread of a finished task's score."""
        ...


@runtime_checkable
class KnowsMasks(Protocol):
    """Masks of the finished tasks, for statistics."""

    def layer_statistics(self) -> list[LayerStatistics]:
        """Density and overlap of the masks, one entry per masked parameter; empty if the masks are unknown."""
        ...


@runtime_checkable
class RecoversMasks(Protocol):
    """Masks in a Hopfield memory (method=hopfield)."""

    def recover(self, loss: Loss, *, descent: Descent) -> Recovery:
        """The stored mask that a loss of the memory's state points to; see `hopfield_memory.recover`."""
        ...

    def logits(self, state: Tensor, images: Tensor) -> Tensor:
        """Logits ``(batch, output_size)`` under a state of the memory, ``(weights,)`` in [-1, 1]."""
        ...

    def nearest(self, state: Tensor) -> int:
        """The finished task whose mask is nearest to a state; -1 if the masks are unknown."""
        ...

    def reference_masks(self) -> Tensor:
        """The masks themselves, for reports: ``(k, weights)`` bool; ``(0, weights)`` if they are unknown."""
        ...

    def check_num_tasks(self, num_tasks: int) -> None:
        """Warn if the memory cannot hold so many tasks."""
        ...


@runtime_checkable
class TrainsTogether(Protocol):
    """Several tasks trained in the same step: a row of ``live.values`` each.

    Attributes:
        one_after_another: the option that makes tasks depend on one another; None if there is none.
    """

    one_after_another: str | None


@runtime_checkable
class Searches(Protocol):
    """Several trainings of each task, of which one is kept.

    Attributes:
        trials_per_task: number of trainings per task.
    """

    trials_per_task: int

    def finish_trial(self, task: int, *, accuracy: float) -> None:
        """End one training of a task, with its accuracy on validation images in [0, 1]."""
        ...


@runtime_checkable
class WarmStarts(Protocol):
    """A task starts from the finished one that its images are most like.

    Attributes:
        begins_like_another: whether tasks start so.
    """

    begins_like_another: bool

    def start_like(self, task: int) -> None:
        """Start the task in training from what a finished task has learned."""
        ...


@runtime_checkable
class SetsLearningRate(Protocol):
    """A learning rate of the task in training.

    Attributes:
        learning_rate: in place of the optimizer's; None for the optimizer's.
    """

    learning_rate: float | None


@runtime_checkable
class TrainsOn(Protocol):
    """Finished tasks that are trained further, or combined, as streams without task boundaries need (scenario NNs).

    Attributes:
        num_masks: number of finished tasks with a mask of their own; the others are combinations.
        combining: whether the task in training is a combination, whose coefficients are trained.
    """

    num_masks: int
    combining: bool

    def keep_scores(self, place: str) -> None:
        """Keep what is needed to train finished tasks further, in one of the places of `KeptScores`."""
        ...

    def reopen_task(self, task: int) -> None:
        """Train a finished task further."""
        ...

    def commit_task(self, task: int) -> None:
        """Store the task in training as it is now; its training may continue."""
        ...

    def begin_combination(self, task: int) -> None:
        """Train a task as a linear combination of the finished ones."""
        ...

    def with_random_masks(self, count: int) -> AbstractContextManager[None]:
        """Add untrained tasks, with negative numbers, to the finished ones for the length of a ``with`` block."""
        ...

    def combination_bytes(self) -> int:
        """Bytes that one more combination adds."""
        ...

    def bytes_of(self, task: int) -> int:
        """Bytes stored for a finished task."""
        ...


def require(method: object, protocol: type[Offered]) -> Offered:
    """The method, if it offers this protocol.

    Raises:
        ConfigurationError: it does not.
    """
    if not isinstance(method, protocol):
        raise ConfigurationError(f"{type(method).__name__} does not offer {offer(protocol)}; use another method.")
    return method


def offer(protocol: type) -> str:
    """A protocol in words, for messages: the first line of its docstring.

    >>> offer(Superposes)
    'a superposition of the finished tasks'
    """
    words = (getdoc(protocol) or protocol.__name__).partition("\n")[0].rstrip(".")
    return words[:1].lower() + words[1:]
