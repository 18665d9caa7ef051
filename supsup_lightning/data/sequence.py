"""Sequence of ordinary LightningDataModules, each of which is a task."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from operator import length_hint
from typing import Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.data.module_loader import ModuleLoader, defines, only_loader
from supsup_lightning.data.naming import TaskDescription, distinct, numbered
from supsup_lightning.data.tasks import TaskSequence
from supsup_lightning.data.values import check_same, check_same_range
from supsup_lightning.data.workers import seeded
from supsup_lightning.errors import ConfigurationError, DataError, as_whole

logger = logging.getLogger(__name__)

# Sample of each half of a task, to check that the halves are alike: this many images, from at most so many batches.
_IMAGES = 128
_BATCHES = 8


class DataModuleSequence(TaskSequence):
    """Tasks made of LightningDataModules, each trained, validated and tested with its own loaders (`TaskSequence`).

    Batches are ``(images, labels)`` or a dict of both, with labels from 0; further parts of a tuple are left out. A
    module without validation data is not validated. All modules are set up, and their first batches checked, before
    training.

    Args:
        modules: the data modules in the order of the tasks, from ``first_task`` on.
        num_classes: number of classes of each task, or one number for all; by default each module's attribute
            ``num_classes``. With ``first_task``, also of the tasks before it.
        input_shape: shape of one input, for a network's configuration to refer to; checked if given.
        steps_per_task: training length in batches; the loader is repeated as often as needed. Give this or
            ``epochs_per_task``; by default one pass.
        epochs_per_task: training length in passes over the loader.
        patience: epochs without a better validation accuracy after which a task ends; see `TaskSequence`.
        tasks_at_once: number of tasks trained in the same step, or ``auto``; see `TaskSequence`.
        task_shard: train and test one shard of the tasks alone, ``i/n`` with ``i`` from 0; see `TaskSequence`.
        first_task: number of the first module's task, where earlier tasks are finished; see `TaskSequence`.
        seed: seed of the loaders' shuffling, and of random layers.

    Raises:
        ConfigurationError: an option out of its range, or a task whose number of classes is not known.
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
        task_shard: str | None = None,
        first_task: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            steps_per_task=steps_per_task,
            epochs_per_task=epochs_per_task,
            patience=patience,
            tasks_at_once=tasks_at_once,
            task_shard=task_shard,
            first_task=first_task,
            seed=seed,
        )
        self.modules = list(modules)
        if not self.modules:
            raise ConfigurationError("data.modules is empty; name one LightningDataModule per task.")
        for place, module in enumerate(self.modules):
            if not isinstance(module, L.LightningDataModule):
                raise ConfigurationError(
                    f"data.modules[{place}] is no LightningDataModule but {type(module).__name__}."
                )
            for needed in ("train_dataloader", "test_dataloader"):
                if not defines(module, needed):
                    raise ConfigurationError(
                        f"data.modules[{place}] ({type(module).__name__}) defines no {needed}; every task is trained "
                        "and tested."
                    )
        if num_classes is None and self.first_task:
            raise ConfigurationError(
                f"data.first_task={self.first_task} needs data.num_classes, one number for each of the "
                f"{self.num_tasks} tasks, or one for all: classes of an input are looked for among those of any task."
            )
        if num_classes is None:
            num_classes = [getattr(module, "num_classes", 0) for module in self.modules]
        elif not isinstance(num_classes, Iterable) or as_whole(num_classes) is not None:
            num_classes = [num_classes] * self.num_tasks  # type: ignore[list-item]
        if len(num_classes) != self.num_tasks:
            raise ConfigurationError(
                f"data.num_classes={list(num_classes)} has {len(num_classes)} numbers for {self.num_tasks} tasks."
            )
        for task, count in enumerate(num_classes):
            if (as_whole(count) or 0) < 2:
                whose = "finished" if task < self.first_task else type(self.module_of(task)).__name__
                raise ConfigurationError(
                    f"Task {task} ({whose}) has num_classes={count!r}; give data.num_classes, a number "
                    "from 2 on for each task, or the attribute num_classes to the module."
                )
        self._num_classes = tuple(map(int, num_classes))
        self.input_shape = None if input_shape is None else tuple(map(int, input_shape))
        self.types: dict[int, torch.dtype] = {}  # of each task's images; filled as batches come
        self.said = False  # whether it was logged that batches have more than two parts
        self._examples: dict[tuple[tuple[int, ...], torch.dtype], tuple[int, Tensor]] = {}  # by shape and type
        self._lengths: dict[int, int] = {}
        self._ready: set[int] = set()
        self._examined: set[int] = set()

    @property
    def num_tasks(self) -> int:
        """Number of tasks, one per data module, and those before the first."""
        return self.first_task + len(self.modules)

    def module_of(self, task: int) -> L.LightningDataModule:
        """Return the data module of a task. Raises `ConfigurationError` if there is none."""
        self.check_task(task)
        if task < self.first_task:
            raise ConfigurationError(
                f"The data of task {task} are needed, and data.first_task={self.first_task} says that there are none. "
                "(inference=discriminant with features=convolution takes them from a bank that was trained with it.)"
            )
        return self.modules[task - self.first_task]

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Number of classes of each task."""
        return self._num_classes

    def steps_per_epoch(self, task: int) -> int:
        """Training batches per epoch: ``steps_per_task`` if given, else the first length of the task's own loader."""
        if self.steps_per_task is not None:
            return self.steps_per_task
        loader = self._loader(task, "train")
        length = length_hint(loader, -1)
        name = f"the training loader of task {task} ({type(self.module_of(task)).__name__})"
        if length < 0:
            raise ConfigurationError(f"data.steps_per_task is needed: {name} has no length.")
        if length == 0:
            raise DataError(f"There is no batch in {name}: no image, or fewer than its batch_size with drop_last=True.")
        before = self._lengths.setdefault(task, length)
        if length != before:
            logger.warning("%s has %d batches, and had %d: an epoch has as many as at first.", name, length, before)
        return before

    def example(self) -> Tensor:
        """The first training image of the first task, repeated twice, ``(2, *shape)``."""
        task = self.task_numbers[0]
        images, _ = next(iter(self.train_loader(task)))
        if self.input_shape is not None and tuple(images.shape[1:]) != self.input_shape:
            raise ConfigurationError(
                f"data.input_shape={list(self.input_shape)}, but the inputs of task {task} have shape "
                f"{list(images.shape[1:])}."
            )
        return images[:1].repeat_interleave(2, 0).cpu()

    def other_examples(self) -> dict[int, Tensor]:
        """Two inputs of each later task with a new shape or type, from its checked training batches."""
        first = self.task_numbers[0]
        return {task: images for task, images in self._examples.values() if task != first}

    def describe_tasks(self) -> tuple[TaskDescription, ...]:
        """Name tasks after their data modules, and classes by their attribute ``class_names``, if they have it."""
        found = [numbered(task, self.num_classes[task]) for task in range(self.first_task)]
        for task, module in enumerate(self.modules, start=self.first_task):
            number = self.num_classes[task]
            names = getattr(module, "class_names", None)
            known = isinstance(names, (list, tuple)) and len(names) == number
            classes = tuple(map(str, names)) if known else numbered(task, number).classes  # type: ignore[arg-type]
            found.append(TaskDescription(type(module).__name__, classes))
        return distinct(found)

    def prepare_data(self) -> None:
        """Call each data module's `prepare_data`."""
        for module in self.modules:
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up each data module and check its first batches, so that errors are found before training."""
        if self.processes()[1] > 1:
            raise ConfigurationError(
                "A sequence of LightningDataModules runs in one process: their loaders know nothing of the others. "
                "Use trainer.devices=1, or a ContinualDataModule over their data sets."
            )
        for task in self.task_numbers:
            if task not in self._examined:
                self._examine(task)
                self._examined.add(task)

    def identity(self) -> dict[str, Any]:
        """Return the options, and the class names of the data modules."""
        names = ("num_tasks", "steps_per_task", "epochs_per_task", "patience", "tasks_at_once", "seed")
        modules = [type(module).__name__ for module in self.modules]
        return {**{name: getattr(self, name) for name in names}, **self.part(), "modules": modules}

    def train_loader(self, task: int, *, epoch: int = 0, steps: slice = slice(None)) -> ModuleLoader:
        """Return the task's own training loader; each pass shuffles by its own seed."""
        first, last, _ = steps.indices(self.steps_per_epoch(task))
        loader = self._loader(task, "train")
        return ModuleLoader(self, task, "training", loader, length=last - first, skip=first, epoch=epoch)

    def val_loader(self, task: int) -> "ModuleLoader | list":
        """Return the task's own validation loader, or an empty list if it has none."""
        loader = self._loader(task, "val")
        if loader is None or length_hint(loader, 1) == 0:
            return []
        return ModuleLoader(self, task, "validation", loader)

    def each_image(self, task: int, *, half: str) -> "ModuleLoader | list":
        """Return one pass of the task's own loader, with the augmentation that this has, if any.

        A loader without a length may have no end: of it, an epoch.
        """
        if half == "validation":
            return self.val_loader(task)
        loader = self._loader(task, "train")
        endless = length_hint(loader, -1) < 0
        return ModuleLoader(self, task, "training", loader, most=self.steps_per_epoch(task) if endless else None)

    def test_loader(self, task: int) -> ModuleLoader:
        """Return the task's own test loader."""
        return ModuleLoader(self, task, "test", self._loader(task, "test"))

    def _loader(self, task: int, half: str) -> Any:
        module = self.module_of(task)
        if task not in self._ready:
            module.trainer = self.trainer
            if self.trainer is None:
                module.prepare_data()
            module.setup("fit")
            module.setup("test")
            self._ready.add(task)
        name = f"{half}_dataloader"
        if half == "val" and not defines(module, name):
            return None
        return only_loader(getattr(module, name)(), f"{type(module).__name__}.{name}")

    def _examine(self, task: int) -> None:
        """Check the first batches of each half, and that all halves have the same kind of images."""
        with seeded(0):  # the loaders may draw random numbers, and training must not depend on that
            train = _sample(self.train_loader(task))
            self._examples.setdefault((tuple(train.shape[1:]), train.dtype), (task, train[:1].repeat_interleave(2, 0)))
            others = {"validation": self.val_loader(task), "test": self.test_loader(task)}
            samples = {half: _sample(loader) for half, loader in others.items() if isinstance(loader, ModuleLoader)}
        whose = f"task {task} ({type(self.module_of(task)).__name__})"
        if defines(self.module_of(task), "val_dataloader") and "validation" not in samples:
            logger.warning("The validation loader of %s is empty: it is not validated.", whose)
        for half, images in samples.items():
            if train.is_floating_point():  # sequences of tokens may have any length
                check_same("shape", tuple(train.shape[1:]), tuple(images.shape[1:]), whose=whose, other=half)
            check_same_range(train, images, whose=whose, other=half)


def _sample(loader: ModuleLoader) -> Tensor:
    """Return images of the first batches. Raises `DataError` if they have none."""
    batches: list[Tensor] = []
    for images, _ in itertools.islice(loader, _BATCHES):
        if batches and images.shape[1:] != batches[0].shape[1:]:
            break
        batches.append(images.cpu())
        if sum(map(len, batches)) >= _IMAGES:
            break
    images = torch.cat(batches)
    if not len(images):
        raise DataError(f"There is no image in the first batches of {loader.name}.")
    return images
