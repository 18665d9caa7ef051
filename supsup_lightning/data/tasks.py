"""Base DataModules for tasks: arithmetic of tasks and epochs, and Lightning's hooks. Subclasses supply the data."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from math import ceil
from typing import Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.checks.meaning import differences, plain
from supsup_lightning.data.naming import TaskDescription, numbered
from supsup_lightning.data.raw_images import REFUSED, RawImages
from supsup_lightning.data.shard import Shard
from supsup_lightning.data.timetable import Timetable
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError, as_whole, check_whole

# Options of the trainer on which masks depend, as on those of the data.
_TRAINING_OPTIONS = (
    "limit_train_batches",
    "overfit_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
)
# Options of training alone: tests of finished masks do not depend on them.
_TRAINING_LENGTH = ("steps_per_task", "epochs_per_task", "patience", "tasks_at_once")
_OF_EACH_TASK = ("num_classes", "modules")


class TaskDataModule(L.LightningDataModule, ABC):
    """Base class of data modules with tasks, as module, callbacks and inference use them.

    Batches are ``(images, labels)`` on the device. Needs ``Trainer(reload_dataloaders_every_n_epochs=1)``.

    Args:
        seed: seed of everything random in the data.

    Attributes:
        trials_per_task: number of trainings of each task from the start, set from the method's attribute of that name.
        tasks_at_once: number of tasks trained in the same step.
        task_shard: shard of the tasks that is trained and tested, ``i/n``; None for all.
        first_task: number of the first task that is trained and tested.
    """

    trials_per_task = 1
    tasks_at_once: int | str = 1
    task_shard: str | None = None
    first_task = 0

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        self.seed = seed if as_whole(seed) is None else int(seed)
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer test batches than processes are fine

    # What a subclass says.

    @property
    @abstractmethod
    def num_tasks(self) -> int:
        """Number of tasks."""

    @property
    def task_numbers(self) -> range:
        """Numbers of the tasks that are trained and tested: all, or those of a part."""
        return range(self.num_tasks)

    @property
    @abstractmethod
    def num_classes(self) -> tuple[int, ...]:
        """Number of classes of each task, of those of other parts as well; known after `setup`."""

    @property
    @abstractmethod
    def num_epochs(self) -> int:
        """Number of epochs of all tasks that are trained, for ``Trainer(max_epochs=...)``."""

    @abstractmethod
    def example(self) -> Tensor:
        """Two network inputs of the first task, ``(2, *shape)``."""

    def other_examples(self) -> dict[int, Tensor]:
        """Two inputs of each later task whose inputs have a new shape or type; `example` is for the first task."""
        return {}

    @abstractmethod
    def test_loader(self, task: int) -> Iterable:
        """Return the test batches of any task."""

    @abstractmethod
    def true_tasks(self, epoch: int) -> dict[int, float]:
        """Share of each task in an epoch's training batches, for reports alone."""

    @abstractmethod
    def place(self, epoch: int, batch: int) -> str:
        """Describe where in training a batch is, for messages."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the options that masks depend on."""

    def optimizer_steps(self, epoch: int) -> int | None:
        """Optimizer steps of one training of the epoch's tasks; None if not known."""
        return None

    @property
    def keeps_neighbours(self) -> bool:
        """Whether neighbouring pixels are neighbours in the image, as convolutions need; permutations change that."""
        return True

    def num_skipped(self) -> int:
        """Number of images left out because they could not be read."""
        return 0

    def normalisation(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation that normalise bytes, ``(channels, 1, 1)`` each; None if more is done to them."""
        return None

    def raw_images(self) -> RawImages:
        """How raw images become network inputs, for files of finished tasks; by default that is not known."""
        return REFUSED

    def describe_tasks(self) -> tuple[TaskDescription, ...]:
        """Names of tasks and classes, for files of finished tasks; numbers by default. Known after `setup`."""
        return tuple(numbered(task, number) for task, number in enumerate(self.num_classes))

    def files(self) -> dict[str, Any] | None:
        """Files that the data are read from, as described by `run_identity.files_of`; None if there are none."""
        return None

    def check_task(self, task: int) -> None:
        """Raise `ConfigurationError` for a task number out of range."""
        if not 0 <= task < self.num_tasks:
            raise ConfigurationError(f"Task {task} is not among those of data.num_tasks={self.num_tasks}.")

    # Lightning's hooks.

    def test_dataloader(self) -> list[Iterable]:
        """Return the test loaders, one per task."""
        return [self.test_loader(task) for task in self.task_numbers]

    def predict_dataloader(self) -> list[Iterable]:
        """Return the test loaders, one per task."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch unchanged: batches are made on the device."""
        return batch

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def processes(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    # What a checkpoint was trained on; to continue with anything else would silently make other masks.

    def state_dict(self) -> dict[str, Any]:
        """Return the identity and the trainer's options, to save in a checkpoint."""
        return {**plain(self.identity()), **({"trainer": self._training_options()} if self.trainer else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise `MismatchError` if a checkpoint was made with other options."""
        self.check_trained_on(state_dict, "The checkpoint")

    def check_trained_on(self, state_dict: dict[str, Any], source: str) -> None:
        """Raise `MismatchError` if ``source``, whose state is ``state_dict``, was made with other options."""
        stored = {"tasks_at_once": 1, **state_dict}  # checkpoints older than the option do not have it
        different = differences(stored, self.identity(), group="data")
        if self.trainer is not None and self.trainer.training and "trainer" in stored:
            different += differences(stored["trainer"], self._training_options(), group="trainer")
        if different:
            raise MismatchError(
                f"{source} was made with other options: {'; '.join(different)}. Use the same, or start afresh."
            )

    def _training_options(self) -> dict[str, Any]:
        options = {name: getattr(self.trainer, name) for name in _TRAINING_OPTIONS}
        for name, value in options.items():
            if isinstance(value, Enum):
                options[name] = str(value.value)
            elif name.endswith("_batches") and name != "accumulate_grad_batches" and type(value) is int:
                options[name] = f"{value} batches"  # 1 is one batch, and 1.0 all of them
        return options


class TaskSequence(TaskDataModule):
    """Base class of data modules that train one task, or one group of tasks, after another.

    Serves the training batches of the current task, its validation batches (never test images), and one test loader
    per task. The trainer's epoch alone decides which task is current, so a resumed run continues exactly. If several
    tasks are trained at once, an epoch belongs to a group of them, and its batches are ``(tasks, batch, ...)``.

    Args:
        steps_per_task: training length of a task in batches. Give this or ``epochs_per_task``, not both.
        epochs_per_task: training length in passes over the task's data.
        patience: epochs without a better validation accuracy after which a task ends. Its mask is that of its best
            epoch, whether it ends early or not. The remaining epochs train nothing. Needs ``epochs_per_task``.
        tasks_at_once: number of tasks trained in the same step, all with the same number of steps. ``auto`` takes as
            many as are fast and fit in memory, as measured by `ContinualModule.plan_training`.
        task_shard: train and test the tasks of one shard alone: ``0/4`` for the first of four. They keep their numbers,
            so that the shards' banks join to that of one run over all tasks (`Method.merge`).
        first_task: train and test the tasks from this one on; those before are finished in the model, which was loaded
            from a bank.
        seed: seed of everything random in the data.

    Raises:
        ConfigurationError: an option out of its range.
    """

    task_is_over = False  # the task ended before its last epoch, and this epoch trains nothing

    def __init__(
        self,
        *,
        steps_per_task: int | None,
        epochs_per_task: int | None,
        patience: int | None = None,
        tasks_at_once: int | str = 1,
        task_shard: str | None = None,
        first_task: int = 0,
        seed: int,
    ) -> None:
        super().__init__(seed=seed)
        self.first_task = check_whole("data.first_task", first_task, least=0)
        self._shard = None if task_shard is None else Shard.of(task_shard)
        self.task_shard = None if self._shard is None else f"{self._shard.number}/{self._shard.count}"
        if self._shard is not None and self.first_task:
            raise ConfigurationError(
                f"data.task_shard={task_shard} and data.first_task={first_task} both say where to begin; leave out one."
            )
        if self._shard is not None and tasks_at_once == "auto":
            raise ConfigurationError(
                f"data.tasks_at_once=auto would group the tasks of data.task_shard={task_shard} by this machine; give "
                "a number, the same for all shards."
            )
        if steps_per_task is not None and epochs_per_task is not None:
            raise ConfigurationError(
                f"data.steps_per_task={steps_per_task} and data.epochs_per_task={epochs_per_task} are both given; "
                "set one of them to null."
            )
        if tasks_at_once != "auto":
            tasks_at_once = check_whole("data.tasks_at_once", tasks_at_once, more=", or auto")
        self.steps_per_task = check_count("steps_per_task", steps_per_task)
        # With a number of steps, a task is one epoch of that many batches.
        self.epochs_per_task = check_count("epochs_per_task", epochs_per_task) or 1
        self.patience = check_count("patience", patience)
        if patience is not None:
            if self.epochs_per_task == 1:
                raise ConfigurationError(
                    f"data.patience={patience} counts epochs, and a task has one; give data.epochs_per_task, 2 or more."
                )
            if tasks_at_once not in (1, "auto"):
                raise ConfigurationError(
                    f"data.patience={patience} ends each task in an epoch of its own, and data.tasks_at_once="
                    f"{tasks_at_once} trains several in the same steps; leave out one of the two."
                )
            tasks_at_once = 1
        self.tasks_at_once = tasks_at_once

    @property
    def task_numbers(self) -> range:
        """Numbers of the tasks that are trained and tested: all, from ``first_task`` on, or those of the shard."""
        if self._shard is not None:
            assert isinstance(self.tasks_at_once, int)  # as the constructor checks
            return self._shard.tasks(self.num_tasks, tasks_at_once=self.tasks_at_once)
        if self.first_task >= self.num_tasks:
            raise ConfigurationError(
                f"data.first_task={self.first_task} leaves none of the {self.num_tasks} tasks; raise data.num_tasks."
            )
        return range(self.first_task, self.num_tasks)

    def part(self) -> dict[str, Any]:
        """Return the options that say which tasks are trained, for `identity`; None where these are all."""
        return {"task_shard": self.task_shard, "first_task": self.first_task or None}

    # What a subclass says.

    @abstractmethod
    def steps_per_epoch(self, task: int) -> int:
        """Training batches per epoch of a task."""

    @abstractmethod
    def train_loader(self, task: int, *, epoch: int = 0, steps: slice = slice(None)) -> Iterable:
        """Return the training batches of one epoch (counted within the task), or a slice of them, of any task."""

    @abstractmethod
    def val_loader(self, task: int) -> Iterable:
        """Return the validation batches of any task."""

    @abstractmethod
    def each_image(self, task: int, *, half: str) -> Iterable:
        """Return batches with each training or validation image of any task once, in order and not augmented.

        All of them in each process.

        Args:
            task: number of the task.
            half: ``training`` or ``validation``.
        """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise `MismatchError` for a checkpoint of other tasks.

        A test may take only its first tasks; training may go on with further ones.
        """
        before = state_dict.get("num_tasks", 0)
        if self.trainer is not None and self.trainer.state.fn == "fit" and 0 < before < self.num_tasks:
            state_dict = self._grown(state_dict, before)
        if self.trainer is not None and self.trainer.state.fn != "fit":
            here = self.identity()
            state_dict = {**state_dict, **{name: here[name] for name in _TRAINING_LENGTH}}
            if self.num_tasks < state_dict.get("num_tasks", 0):
                first = {name: state_dict[name][: self.num_tasks] for name in _OF_EACH_TASK if name in state_dict}
                state_dict |= {"num_tasks": self.num_tasks, **first}
        super().load_state_dict(state_dict)

    def of_first_tasks(self, num_tasks: int) -> dict[str, Any]:
        """Return the part of `identity` that depends on the number of tasks, as it is for the first ones alone.

        A subclass whose `identity` has more that depends on it has to add that.
        """
        here = self.identity()
        return {
            "num_tasks": num_tasks,
            **{name: plain(here[name])[: num_tasks - self.first_task] for name in ("modules",) if name in here},
            **{name: plain(here[name])[:num_tasks] for name in ("num_classes",) if name in here},
        }

    def _grown(self, state_dict: dict[str, Any], before: int) -> dict[str, Any]:
        """Return the state of a training of the first tasks as it would be for all, if the first ones agree."""
        if self.task_shard is not None:
            return state_dict  # of other tasks, with more of them
        at_once = state_dict.get("tasks_at_once", 1)
        if isinstance(at_once, int) and (before - self.first_task) % at_once:
            raise ConfigurationError(
                f"data.num_tasks={self.num_tasks} adds tasks to {before - self.first_task}, and these do not fill "
                f"groups of data.tasks_at_once={at_once}: the last one was trained by itself. Start afresh, or load "
                f"the bank in Python and give the data first_task={before}."
            )
        first, here = self.of_first_tasks(before), self.identity()
        if differences(state_dict, first, group="data"):
            return {**state_dict, "num_tasks": self.num_tasks}  # what differs is said
        return {**state_dict, **{name: here[name] for name in first}}

    def limited_steps(self, task: int) -> int:
        """Training batches per epoch of a task, within the trainer's ``limit_train_batches``."""
        steps, limit = self.steps_per_epoch(task), self.trainer.limit_train_batches if self.trainer else 1.0
        number = limited(steps, limit)
        if steps and not number:
            raise ConfigurationError(
                f"Trainer(limit_train_batches={limit}) is less than one of the {steps} batches of task {task}; use at "
                f"least {1 / steps:.4g}, or an integer of batches."
            )
        return number

    def optimizer_steps(self, epoch: int) -> int:
        """Optimizer steps of one training of the epoch's tasks, which all have the same length."""
        batches = self.limited_steps(self.timetable.tasks(epoch)[0])
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        return -(-batches // accumulated) * self.epochs_per_task

    def check_lengths(self) -> None:
        """Raise `ConfigurationError` if tasks that are trained at once differ in their number of steps."""
        if self.tasks_at_once in (1, "auto") or self.steps_per_task is not None:
            return
        times = self.timetable
        for epoch in range(0, times.num_epochs, times.epochs_of_task):
            group = times.tasks(epoch)
            first = group[0]
            steps = {task: self.steps_per_epoch(task) for task in group}
            other = next((task for task in group if steps[task] != steps[first]), None)
            if other is not None:
                raise ConfigurationError(
                    f"data.tasks_at_once={self.tasks_at_once} trains tasks {first} and {other} in the same steps, but "
                    f"an epoch of theirs has {steps[first]} and {steps[other]}; give data.steps_per_task in place of "
                    "data.epochs_per_task, or data.tasks_at_once=1."
                )

    @property
    def timetable(self) -> Timetable:
        """Timetable of tasks and epochs. Raises `ConfigurationError` while ``tasks_at_once`` is ``auto``."""
        if isinstance(self.tasks_at_once, str):
            raise ConfigurationError(
                f"data.tasks_at_once={self.tasks_at_once} has to be decided before the Trainer is made; "
                "`model.task_callbacks(data)` or `model.plan_training(data)` does that."
            )
        tasks = self.task_numbers
        return Timetable(len(tasks), self.epochs_per_task, self.trials_per_task, self.tasks_at_once, tasks.start)

    @property
    def num_epochs(self) -> int:
        """Number of epochs of all tasks that are trained, for ``Trainer(max_epochs=...)``."""
        return self.timetable.num_epochs

    def true_tasks(self, epoch: int) -> dict[int, float]:
        """Equal shares for the tasks of the epoch."""
        tasks = self.timetable.tasks(epoch)
        return dict.fromkeys(tasks, 1 / len(tasks))

    def place(self, epoch: int, batch: int) -> str:
        """Describe the tasks and the step of a batch, for messages."""
        tasks, within = self.timetable.tasks(epoch), self.timetable.within_task(epoch)
        which = f"task {tasks[0]}" if len(tasks) == 1 else f"one of the tasks {tasks[0]} to {tasks[-1]}"
        return f"in {which} at its step {within * self.limited_steps(tasks[0]) + batch}"

    # Lightning's hooks.

    def train_dataloader(self) -> Iterable:
        """Return the current tasks' training batches, in an order drawn from (seed, task, epoch)."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        within = self.timetable.within_task(epoch)
        if getattr(self.trainer, "overfit_batches", 0):
            within = 0  # the same batches again and again
        steps = slice(None)
        if self.task_is_over:  # the fewest batches that Lightning counts as an epoch
            limit = self.trainer.limit_train_batches if self.trainer else 1.0
            steps = slice(1 if type(limit) is int else ceil(1 / limit))
        loaders = [self.train_loader(task, epoch=within, steps=steps) for task in self.timetable.tasks(epoch)]
        return loaders[0] if self.tasks_at_once == 1 else SideBySide(loaders)

    def val_dataloader(self) -> Iterable:
        """Return one validation loader per current task, or per task for `Trainer.validate`."""
        if self.trainer and self.trainer.state.fn == "validate":
            return [self.val_loader(task) for task in self.task_numbers]
        epoch = self.trainer.current_epoch if self.trainer else 0
        return [self.val_loader(task) for task in self.timetable.tasks(epoch)]


class SideBySide:
    """Loader of several tasks' batches, stacked: images ``(tasks, batch, *shape)`` and labels ``(tasks, batch)``.

    Args:
        loaders: one loader per task, all of the same length.
    """

    def __init__(self, loaders: Sequence[Iterable]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return len(self.loaders[0])  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batches in zip(*self.loaders, strict=True):
            images, labels = zip(*batches, strict=True)
            if len({part.shape for part in images}) > 1:
                raise DataError(
                    f"Batches of shapes {', '.join(sorted({str(tuple(part.shape)) for part in images}))} cannot be "
                    "trained in the same step: tasks at once need images of one shape and batches of one size. Use "
                    "data.tasks_at_once=1."
                )
            yield torch.stack(images), torch.stack(labels)


def limited(batches: int, limit: float) -> int:
    """Number of batches under a trainer's ``limit_*_batches``, which is a number or a share.

    >>> limited(10, 3), limited(10, 0.25), limited(10, 1), limited(10, 1.0)
    (3, 2, 1, 10)
    """
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def check_count(name: str, value: Any) -> int | None:
    """Return an option of the data as an `int`, or None. Raises `ConfigurationError` if it is no positive integer."""
    return None if value is None else check_whole(f"data.{name}", value)
