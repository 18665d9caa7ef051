"""Ordinary LightningDataModules, one after another: each one is a task."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.data.tasks import TaskSequence
from supsup_lightning.errors import ConfigurationError, DataError, as_whole
from supsup_lightning.seeding import derive_seed


class DataModuleSequence(TaskSequence):
    """Each of these data modules is a task, trained, validated and tested with its own loaders (`TaskSequence`).

    Batches must be ``(images, labels)`` with labels from 0. A module without validation data is not validated. Modules
    are set up when their task comes.

    Args:
        modules: in the order of the tasks.
        num_classes: of each task, or one number for all; by default each module's attribute ``num_classes``.
        input_shape: of one input, for a network's configuration to refer to; checked if it is given.
        steps_per_task: training length in batches, passing over the loader as often as needed. Give this or
            ``epochs_per_task``; with neither, one pass.
        epochs_per_task: training length in passes over the loader.
        patience: epochs without a better validation accuracy after which a task ends; see `TaskSequence`.
        tasks_at_once: how many tasks are trained in the same step, or ``auto``; see `TaskSequence`.
        seed: of the order in which loaders shuffle, and of layers that draw.

    Raises:
        ConfigurationError: an option out of its range, or a task whose number of classes nobody says.
    """

    def __init__(
        self,
        modules: Sequence[L.LightningDataModule],
        *,
        num_classes: int | Sequence[int] | None = None,
        input_shape: Sequence[int] | None = None,
        steps_per_task: int | None = None,
        epochs_per_task: int | None = None,
        patience: int | None = None,
        tasks_at_once: int | str = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            steps_per_task=steps_per_task,
            epochs_per_task=epochs_per_task,
            patience=patience,
            tasks_at_once=tasks_at_once,
            seed=seed,
        )
        self.modules = list(modules)
        if not self.modules:
            raise ConfigurationError("data.modules is empty; name one LightningDataModule a task.")
        for task, module in enumerate(self.modules):
            if not isinstance(module, L.LightningDataModule):
                raise ConfigurationError(f"data.modules[{task}] is no LightningDataModule but {type(module).__name__}.")
            for needed in ("train_dataloader", "test_dataloader"):
                if not _defines(module, needed):
                    raise ConfigurationError(
                        f"data.modules[{task}] ({type(module).__name__}) defines no {needed}; every task is trained "
                        "and tested."
                    )
        if num_classes is None:
            num_classes = [getattr(module, "num_classes", 0) for module in self.modules]
        elif not isinstance(num_classes, Iterable) or as_whole(num_classes) is not None:
            num_classes = [num_classes] * len(self.modules)  # type: ignore[list-item]
        if len(num_classes) != len(self.modules):
            raise ConfigurationError(
                f"data.num_classes={list(num_classes)} has {len(num_classes)} numbers for {len(self.modules)} tasks."
            )
        for task, (module, count) in enumerate(zip(self.modules, num_classes, strict=True)):
            if (as_whole(count) or 0) < 2:
                raise ConfigurationError(
                    f"Task {task} ({type(module).__name__}) has num_classes={count!r}; give data.num_classes, a number "
                    "from 2 on for each task, or the attribute num_classes to the module."
                )
        self._num_classes = tuple(map(int, num_classes))
        self.input_shape = None if input_shape is None else tuple(map(int, input_shape))
        self._ready: set[int] = set()

    @property
    def num_tasks(self) -> int:
        """One a module."""
        return len(self.modules)

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Of each task."""
        return self._num_classes

    def steps_per_epoch(self, task: int) -> int:
        """As given, or the length of the task's own loader."""
        return self.steps_per_task or len(self._loader(task, "train"))

    def example(self) -> Tensor:
        """The first two training images of task 0 that come."""
        images, _ = next(iter(self.train_loader(0)))
        if self.input_shape is not None and tuple(images.shape[1:]) != self.input_shape:
            raise ConfigurationError(
                f"data.input_shape={list(self.input_shape)}, but the inputs of task 0 have shape "
                f"{list(images.shape[1:])}."
            )
        return images[:1].repeat_interleave(2, 0).cpu()

    def prepare_data(self) -> None:
        """Each module's own."""
        for module in self.modules:
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Nothing yet: a module is set up when its task comes."""
        if self.processes()[1] > 1:
            raise ConfigurationError(
                "A sequence of LightningDataModules runs in one process: their loaders know nothing of the others. "
                "Use trainer.devices=1, or a ContinualDataModule over their data sets."
            )

    def identity(self) -> dict[str, Any]:
        """The options, and the modules by name."""
        names = ("num_tasks", "steps_per_task", "epochs_per_task", "patience", "tasks_at_once", "seed")
        modules = [type(module).__name__ for module in self.modules]
        return {**{name: getattr(self, name) for name in names}, "modules": modules}

    def train_loader(self, task: int, *, epoch: int = 0, steps: slice = slice(None)) -> "ModuleLoader":
        """The task's own training loader; each pass shuffles by a seed of its own."""
        first, last, _ = steps.indices(self.steps_per_epoch(task))
        return ModuleLoader(self, task, self._loader(task, "train"), length=last - first, skip=first, epoch=epoch)

    def val_loader(self, task: int) -> "ModuleLoader | list":
        """The task's own validation loader; an empty list if it has none."""
        loader = self._loader(task, "val")
        return ModuleLoader(self, task, loader, length=len(loader)) if len(loader) else []

    def test_loader(self, task: int) -> "ModuleLoader":
        """The task's own test loader."""
        loader = self._loader(task, "test")
        return ModuleLoader(self, task, loader, length=len(loader))

    def _loader(self, task: int, half: str) -> Any:
        self.check_task(task)
        module = self.modules[task]
        if task not in self._ready:
            module.trainer = self.trainer
            if self.trainer is None:
                module.prepare_data()
            module.setup("fit")
            module.setup("test")
            self._ready.add(task)
        name = f"{half}_dataloader"
        if half == "val" and not _defines(module, name):
            return []
        loader = getattr(module, name)()
        if loader is None and half == "val":
            return []
        if isinstance(loader, (list, tuple, dict)):
            raise ConfigurationError(
                f"{type(module).__name__}.{half}_dataloader returns {len(loader)} loaders; a task has one."
            )
        return loader


class ModuleLoader:
    """A data module's loader, ``length`` batches of it after the first ``skip``, moved by the module's own hooks."""

    def __init__(
        self, sequence: DataModuleSequence, task: int, loader: Iterable, *, length: int, skip: int = 0, epoch: int = 0
    ) -> None:
        self.sequence = sequence
        self.task = task
        self.loader = loader
        self.length = length
        self.skip = skip
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        module, device = self.sequence.modules[self.task], self.sequence.device
        for number, batch in enumerate(itertools.islice(self._endless(), self.skip, self.skip + self.length)):
            moved = module.transfer_batch_to_device(module.on_before_batch_transfer(batch, 0), device, 0)
            yield self._checked(module.on_after_batch_transfer(moved, 0), first=number == 0)

    def _endless(self) -> Iterator[Any]:
        for number in itertools.count():
            # What a loader shuffles by is drawn with its first batch; it depends on nothing that happens in training.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.sequence.seed, "loader", self.task, self.epoch, number))
                batches = iter(self.loader)
                first = next(batches, None)
            if first is None:
                return
            yield first
            yield from batches

    def _checked(self, batch: Any, *, first: bool) -> tuple[Tensor, Tensor]:
        name = type(self.sequence.modules[self.task]).__name__
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"A batch of task {self.task} ({name}) is no (images, labels): it has no labels.")
        images, labels = batch
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
            kind = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
            raise DataError(f"The labels of task {self.task} ({name}) are not integers, one an image: {kind}.")
        num_classes = self.sequence.num_classes[self.task]
        looked_at = first or labels.device.type == "cpu"  # each look makes an accelerator wait
        if looked_at and (labels.min() < 0 or labels.max() >= num_classes):
            raise DataError(
                f"A batch of task {self.task} ({name}) has labels from {labels.min()} to {labels.max()}, where its "
                f"{num_classes} classes are numbered from 0."
            )
        return images, labels.long()


def _defines(module: L.LightningDataModule, name: str) -> bool:
    """Whether its class, or the instance (as after `from_datasets`), replaces Lightning's own method."""
    return getattr(getattr(module, name), "__func__", None) is not getattr(L.LightningDataModule, name)
