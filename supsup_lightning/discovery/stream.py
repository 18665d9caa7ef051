"""Streams whose task changes without notice (scenario NNs): order of tasks and DataModule.

Order        for how long at a time each task comes: `Blocks`, `Recurring`, `Switching`
Unannounced  the data module that serves the batches of any `TaskSequence` in that order
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from supsup_lightning.data.naming import TaskDescription
from supsup_lightning.data.raw_images import RawImages
from supsup_lightning.data.tasks import TaskDataModule, TaskSequence
from supsup_lightning.errors import ConfigurationError, as_whole, check_whole
from supsup_lightning.seeding import generator


class Decision(Protocol):
    """A learner's decision: from ``step`` on, it trains its own task ``task``."""

    @property
    def step(self) -> int:
        """First step of the block in the stream."""
        ...

    @property
    def task(self) -> int:
        """Number of the learner's task."""
        ...


class Block(NamedTuple):
    """Consecutive batches of one task.

    Attributes:
        task: the true one.
        steps: batches.
    """

    task: int
    steps: int


class Order(ABC):
    """Order of tasks in a stream; each task gets its whole training length in any order."""

    @abstractmethod
    def blocks(self, lengths: Sequence[int], *, seed: int) -> list[Block]:
        """The stream.

        Args:
            lengths: training batches of each task.
            seed: of what is random in it.
        """

    def identity(self) -> dict[str, Any]:
        """Options of the order, compared with those of a checkpoint."""
        return {"order": type(self).__name__, **vars(self)}


class Blocks(Order):
    """Each task once, in one block.

    Args:
        tasks: their order; by default from 0 on.

    >>> Blocks(tasks=[1, 0]).blocks([300, 200], seed=0)
    [Block(task=1, steps=200), Block(task=0, steps=300)]
    """

    def __init__(self, *, tasks: Sequence[int] | None = None) -> None:
        if tasks is not None and (isinstance(tasks, str) or not isinstance(tasks, Sequence)):
            raise ConfigurationError(f"order.tasks={tasks!r} must be a list of tasks, such as [2,0,1].")
        self.tasks = None if tasks is None else [task if as_whole(task) is None else int(task) for task in tasks]

    def blocks(self, lengths: Sequence[int], *, seed: int) -> list[Block]:
        """One block per task."""
        tasks = list(range(len(lengths))) if self.tasks is None else self.tasks
        if sorted(tasks) != list(range(len(lengths))):
            raise ConfigurationError(f"order.tasks={tasks} must name each task from 0 to {len(lengths) - 1} once.")
        return [Block(task, lengths[task]) for task in tasks]


class Recurring(Order):
    """All tasks in order, ``rounds`` times; a block is that share of the task's training length.

    >>> Recurring(rounds=2).blocks([300, 200], seed=0)
    [Block(task=0, steps=150), Block(task=1, steps=100), Block(task=0, steps=150), Block(task=1, steps=100)]
    """

    def __init__(self, *, rounds: int = 2) -> None:
        self.rounds = check_whole("order.rounds", rounds)

    def blocks(self, lengths: Sequence[int], *, seed: int) -> list[Block]:
        """``rounds`` blocks per task."""
        if min(lengths) < self.rounds:
            raise ConfigurationError(f"order.rounds={self.rounds} is more than the {min(lengths)} steps of a task.")
        return [
            Block(task, steps * (part + 1) // self.rounds - steps * part // self.rounds)
            for part in range(self.rounds)
            for task, steps in enumerate(lengths)
        ]


class Switching(Order):
    """After each batch, with a fixed probability, another task that has training left.

    Blocks last ``mean_steps`` on average, until the tasks run out of training.

    >>> [tuple(block) for block in Switching(mean_steps=80).blocks([150, 150], seed=0)]
    [(1, 58), (0, 12), (1, 72), (0, 56), (1, 20), (0, 82)]
    """

    def __init__(self, *, mean_steps: int = 300) -> None:
        self.mean_steps = check_whole("order.mean_steps", mean_steps)

    def blocks(self, lengths: Sequence[int], *, seed: int) -> list[Block]:
        """Blocks whose lengths are geometrically distributed."""
        draw = generator(seed, "order of tasks")
        left = list(lengths)
        stream: list[Block] = []
        task = int(torch.randint(len(left), (), generator=draw))
        while any(left):
            others = [other for other, steps in enumerate(left) if steps and other != task]
            if stream and others:
                task = others[int(torch.randint(len(others), (), generator=draw))]
            elif stream:  # the last one with training left goes on
                task, before = stream.pop()
                left[task] += before
            # Of a geometric distribution, by its inverse.
            chance = float(torch.rand((), generator=draw, dtype=torch.float64))
            drawn = 1 + int(math.log1p(-chance) / math.log1p(-1 / self.mean_steps)) if self.mean_steps > 1 else 1
            steps = min(drawn, left[task]) if others else left[task]
            left[task] -= steps
            stream.append(Block(task, steps))
        return stream


class Unannounced(TaskDataModule):
    """DataModule that serves the training batches of tasks without announcing their task.

    An epoch is a fixed number of batches, whatever tasks they are of: a checkpoint is written after each. Nothing is
    validated, as the task would have to be known. The true task of a batch is kept for reports alone.

    Args:
        tasks: to be served, each for its own training length.
        order: how they follow one another.
        steps_per_epoch: batches in an epoch. Masks do not depend on it.

    Raises:
        ConfigurationError: an option out of its range.
    """

    def __init__(self, tasks: TaskSequence, order: Order | None = None, *, steps_per_epoch: int = 500) -> None:
        super().__init__(seed=tasks.seed)
        if tasks.tasks_at_once != 1:
            raise ConfigurationError(
                f"data.tasks_at_once={tasks.tasks_at_once} needs to know which tasks there are, and scenario=nns does "
                "not tell; leave it out."
            )
        if tasks.patience is not None:
            raise ConfigurationError(
                f"data.patience={tasks.patience} needs to know which task the validation images are of, and "
                "scenario=nns does not tell; leave it out."
            )
        for name, value in tasks.part().items():
            if value is not None:
                raise ConfigurationError(
                    f"data.{name}={value} needs to know which tasks the images are of, and scenario=nns does not tell; "
                    "leave it out, or use scenario=gg, gns or gnu."
                )
        self.tasks = tasks
        self.order = Blocks() if order is None else order
        self.steps_per_epoch = check_whole("datamodule.steps_per_epoch", steps_per_epoch)
        self._blocks: list[Block] = []
        self._ends: list[int] = []

    # The stream.

    @property
    def blocks(self) -> list[Block]:
        """Blocks of true tasks, for the loader and for reports; the learner must not use them."""
        if not self._blocks:
            data = self.tasks
            lengths = [data.steps_per_epoch(task) * data.epochs_per_task for task in range(data.num_tasks)]
            self._blocks = self.order.blocks(lengths, seed=self.seed)
        return self._blocks

    @property
    def _block_ends(self) -> list[int]:
        """End of each block, in steps of the stream."""
        if not self._ends:
            self._ends = list(accumulate(block.steps for block in self.blocks))
        return self._ends

    @property
    def num_steps(self) -> int:
        """Batches of the whole stream."""
        return sum(block.steps for block in self.blocks)

    @property
    def num_epochs(self) -> int:
        """For ``Trainer(max_epochs=...)``; the last one may be shorter."""
        return -(-self.num_steps // self.steps_per_epoch)

    def step(self, epoch: int, batch: int) -> int:
        """Position of a batch in the stream, from 0."""
        return epoch * self.steps_per_epoch + batch

    def true_task(self, step: int) -> int:
        """True task of a batch, for reports only."""
        return self.blocks[bisect_right(self._block_ends, step)].task

    def true_tasks(self, epoch: int) -> dict[int, float]:
        """Share of each task in the batches of an epoch."""
        first, last = self._span(epoch)
        shares: dict[int, float] = {}
        for block, start, end in self._pieces(first, last):
            shares[block.task] = shares.get(block.task, 0.0) + (end - start) / (last - first)
        return shares

    def tasks_seen(self, step: int) -> list[int]:
        """Tasks seen so far if the first block of a task ends with this batch, else empty; for reports only."""
        number = bisect_right(self._block_ends, step)
        if step + 1 != self._block_ends[number]:
            return []
        before = {block.task for block in self.blocks[:number]}
        if self.blocks[number].task in before:
            return []
        return sorted({*before, self.blocks[number].task})

    def learned(self, decisions: Iterable[Decision], *, before: int) -> dict[int, dict[int, int]]:
        """Number of batches by learner's task and true task; for reports only.

        Args:
            decisions: the learner's, each with the first step that it counts for.
            before: step of the stream before which training has stopped.
        """
        counts: dict[int, dict[int, int]] = {}
        starts = [(decision.step, decision.task) for decision in decisions if decision.step < before]
        for (start, task), (end, _) in pairwise([*starts, (before, -1)]):
            step = start
            while step < end:
                number = bisect_right(self._block_ends, step)
                stop = min(end, self._block_ends[number])
                own, true = counts.setdefault(task, {}), self.blocks[number].task
                own[true] = own.get(true, 0) + stop - step
                step = stop
        return counts

    def place(self, epoch: int, batch: int) -> str:
        """Position in the stream, for messages."""
        return f"at step {self.step(epoch, batch)} of the stream"

    def batches(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``first`` to ``last - 1`` of the stream, independent of where reading starts."""
        for block, start, end in self._pieces(first, last):
            per_epoch = self.tasks.steps_per_epoch(block.task)
            done = start  # of this task's own training
            while done < end:
                epoch, place = divmod(done, per_epoch)
                steps = slice(place, min(per_epoch, place + end - done))
                yield from self.tasks.train_loader(block.task, epoch=epoch, steps=steps)
                done += steps.stop - steps.start

    def _span(self, epoch: int) -> tuple[int, int]:
        first = epoch * self.steps_per_epoch
        return first, min(first + self.steps_per_epoch, self.num_steps)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[Block, int, int]]:
        """Blocks between two steps, each with the first and last training step of its task."""
        trained = [0] * self.tasks.num_tasks
        position = 0
        for block in self.blocks:
            start, end = max(first, position), min(last, position + block.steps)
            if start < end:
                before = trained[block.task] - position
                yield block, before + start, before + end
            trained[block.task] += block.steps
            position += block.steps
            if position >= last:
                return

    # What the tasks say.

    @property
    def num_tasks(self) -> int:
        """Number of tasks, for reports only."""
        return self.tasks.num_tasks

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Classes of each task."""
        return self.tasks.num_classes

    def example(self) -> Tensor:
        """Two inputs as the network gets them."""
        return self.tasks.example()

    def other_examples(self) -> dict[int, Tensor]:
        """The same as for the wrapped tasks."""
        return self.tasks.other_examples()

    def test_loader(self, task: int) -> Iterable:
        """The test batches of any task."""
        return self.tasks.test_loader(task)

    def normalisation(self) -> tuple[Tensor, Tensor] | None:
        """The same as for the wrapped tasks."""
        return self.tasks.normalisation()

    def raw_images(self) -> RawImages:
        """How raw images become network inputs."""
        return self.tasks.raw_images()

    def describe_tasks(self) -> tuple[TaskDescription, ...]:
        """Number the tasks, which are the learner's own; name the classes if all tasks have the same."""
        classes = {each.classes for each in self.tasks.describe_tasks()}
        numbers = super().describe_tasks()
        return tuple(each._replace(classes=min(classes)) for each in numbers) if len(classes) == 1 else numbers

    def num_skipped(self) -> int:
        """Images left out because they could not be read."""
        return self.tasks.num_skipped()

    def files(self) -> dict[str, Any] | None:
        """The same as for the wrapped tasks."""
        return self.tasks.files()

    def identity(self) -> dict[str, Any]:
        """The options of tasks, order and epochs."""
        return {**self.tasks.identity(), **self.order.identity(), "steps_per_epoch": self.steps_per_epoch}

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """The same as for the wrapped tasks."""
        self.tasks.prepare_data()

    def setup(self, stage: str = "fit") -> None:
        """The same as for the wrapped tasks."""
        self.tasks.trainer = self.trainer  # device and processes
        self.tasks.setup(stage)

    def train_dataloader(self) -> "_Epoch":
        """Training batches of the current epoch."""
        return _Epoch(self, *self._span(self.trainer.current_epoch if self.trainer else 0))

    def val_dataloader(self) -> list:
        """None."""
        return []


class _Epoch:
    """Batches of one epoch, as a loader."""

    def __init__(self, data: Unannounced, first: int, last: int) -> None:
        self.data = data
        self.first = first
        self.last = last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches(self.first, self.last)
