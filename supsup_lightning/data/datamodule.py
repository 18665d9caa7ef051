"""The continual-learning DataModule: which task's data is served at which epoch."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.data.images import BatchLoader, Images
from supsup_lightning.data.sources import Source
from supsup_lightning.data.streams import Stream
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from supsup_lightning.seeding import generator

# Without effect on results, as validation counts images one by one; large, because each batch costs loop overhead.
_VALIDATION_BATCH = 1000


class ContinualDataModule(L.LightningDataModule):
    """Tasks in sequence; an epoch belongs to a task by arithmetic on the trainer's epoch, so that a resume is exact.

    Serves the training images of the current task, a validation split of them (never test images), and one test loader
    a task. Batches are ``(images, labels)`` on the device. Needs ``Trainer(reload_dataloaders_every_n_epochs=1)``.

    Args:
        source: the data set.
        stream: how it becomes tasks.
        num_tasks: length of the stream.
        input_shape: of one image, ``(channels, height, width)``; the data set's own has to be the same.
        batch_size: images in one optimizer step, over all processes together.
        steps_per_task: training length of a task in batches. Give this or ``epochs_per_task``, not both.
        epochs_per_task: training length in passes over the data; the incomplete last batch of a pass is left out.
        validation_share: of the training images kept apart for validation.
        seed: of the tasks, the split and the order of the images.

    Raises:
        ConfigurationError: an option out of its range.

    With neither length given, 1000 steps, as in the paper's MNIST experiments.
    """

    def __init__(
        self,
        source: Source,
        stream: Stream,
        *,
        num_tasks: int,
        input_shape: Sequence[int],
        batch_size: int = 128,
        steps_per_task: int | None = None,
        epochs_per_task: int | None = None,
        validation_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_lengths(num_tasks, batch_size, steps_per_task, epochs_per_task)
        if not 0 < validation_share < 1:
            raise ConfigurationError(f"data.validation_share={validation_share} must lie between 0 and 1.")
        self.source = source
        self.stream = stream
        self.num_tasks = num_tasks
        self.input_shape = tuple(input_shape)
        self.batch_size = batch_size
        self.steps_per_task = 1000 if steps_per_task is None and epochs_per_task is None else steps_per_task
        self.epochs_per_task = epochs_per_task or 1  # a number of steps is one epoch of that many batches
        self.validation_share = validation_share
        self.seed = seed
        self._split: dict[str, Images] = {}
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer test batches than processes are fine

    # Arithmetic of tasks and epochs.

    @property
    def num_classes(self) -> int:
        """Classes of a task."""
        return self.source.num_classes

    @property
    def num_epochs(self) -> int:
        """For ``Trainer(max_epochs=...)``."""
        return self.num_tasks * self.epochs_per_task

    def task_of_epoch(self, epoch: int) -> int:
        """The task that is trained in this epoch."""
        return epoch // self.epochs_per_task

    def begins_task(self, epoch: int) -> bool:
        """Whether this is the first epoch of a task."""
        return epoch % self.epochs_per_task == 0

    def ends_task(self, epoch: int) -> bool:
        """Whether this is the last epoch of a task."""
        return (epoch + 1) % self.epochs_per_task == 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        if self.steps_per_task is not None:
            return self.steps_per_task
        return max(1, len(self._split["train"]) // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Batches of one task."""
        return self.steps_per_epoch * self.epochs_per_task

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Download what is absent."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the data set and split off the validation images."""
        if self._split:
            return
        train, test = self.source.load()
        if tuple(train.pixels.shape[1:]) != self.input_shape:
            raise ConfigurationError(
                f"data.input_shape={list(self.input_shape)}, but the images have shape {list(train.pixels.shape[1:])}."
            )
        if not len(train) or not len(test):
            raise DataError(f"{type(self.source).__name__} has {len(train)} training and {len(test)} test images.")
        order = torch.randperm(len(train), generator=generator(self.seed, "validation"))
        num_validation = max(1, round(len(train) * self.validation_share))
        self._split = {
            "train": train.select(order[num_validation:]),
            "validation": train.select(order[:num_validation]),
            "test": test,
        }

    # What a checkpoint was trained on; to go on with anything else would make other masks without a word.

    def state_dict(self) -> dict[str, Any]:
        """The options that masks depend on, into checkpoints."""
        names = ("num_tasks", "batch_size", "steps_per_task", "epochs_per_task", "validation_share", "seed")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise `MismatchError` if a checkpoint was made with other options."""
        differences = [
            f"data.{name}={state_dict.get(name)} there, {value} here"
            for name, value in self.state_dict().items()
            if state_dict.get(name) != value
        ]
        if differences:
            raise MismatchError(
                f"The checkpoint was made with other data options: {'; '.join(differences)}. "
                "Use the same, or start afresh."
            )

    def train_dataloader(self) -> BatchLoader:
        """The current task's training batches, in an order drawn from (seed, task, epoch)."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return self.train_loader(self.task_of_epoch(epoch), epoch=epoch % self.epochs_per_task)

    def val_dataloader(self) -> BatchLoader:
        """The current task's validation images."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return self.val_loader(self.task_of_epoch(epoch))

    def test_dataloader(self) -> list[BatchLoader]:
        """One loader a task."""
        return [self.test_loader(task) for task in range(self.num_tasks)]

    def train_loader(self, task: int, *, epoch: int = 0) -> BatchLoader:
        """The training batches of one epoch (counted within the task) of any task."""
        rank, world_size = self._processes()
        if self.batch_size % world_size:
            raise ConfigurationError(f"data.batch_size={self.batch_size} does not divide by {world_size} processes.")
        images = self._task("train", task)
        draw = generator(self.seed, "order", task, epoch)
        needed = self.steps_per_epoch * self.batch_size
        passes = [torch.randperm(len(images), generator=draw) for _ in range(-(-needed // len(images)))]
        order = torch.cat(passes)[:needed].view(-1, self.batch_size)
        # Each process takes its share of every batch, so that the number of processes does not change the gradient.
        return BatchLoader(images, list(order[:, rank::world_size].contiguous()))

    def val_loader(self, task: int) -> BatchLoader:
        """The validation images of any task."""
        rank, world_size = self._processes()
        images = self._task("validation", task)
        return BatchLoader(images, list(torch.arange(len(images))[rank::world_size].split(_VALIDATION_BATCH)))

    def test_loader(self, task: int) -> BatchLoader:
        """The test batches of any task."""
        rank, world_size = self._processes()
        images = self._task("test", task)
        # Whole batches go to a process each: how many images decide about a task must not depend on their number.
        return BatchLoader(images, list(torch.arange(len(images)).split(self.batch_size))[rank::world_size])

    def _task(self, half: str, task: int) -> Images:
        if not 0 <= task < self.num_tasks:
            raise ConfigurationError(f"Task {task} is not in a stream of data.num_tasks={self.num_tasks}.")
        if not self._split:
            self.prepare_data()
            self.setup()
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if self._split[half].pixels.device != device:
            self._split[half] = self._split[half].to(device)
        return self.stream(self._split[half], task=task, seed=self.seed)

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def transfer_batch_to_device(self, batch: tuple[Tensor, Tensor], device: torch.device, dataloader_idx: int):
        """Batches are made on the device."""
        return batch


def _check_lengths(num_tasks: int, batch_size: int, steps: int | None, epochs: int | None) -> None:
    if steps is not None and epochs is not None:
        raise ConfigurationError(
            f"data.steps_per_task={steps} and data.epochs_per_task={epochs} are both given; set one of them to null."
        )
    values = {"num_tasks": num_tasks, "batch_size": batch_size, "steps_per_task": steps, "epochs_per_task": epochs}
    for name, value in values.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigurationError(f"data.{name}={value!r} must be a whole number from 1 on.")
