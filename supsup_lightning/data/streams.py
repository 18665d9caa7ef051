"""Task streams: how data sets become a sequence of tasks."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from supsup_lightning.data.images import Images, check_picture
from supsup_lightning.data.naming import TaskDescription, class_names, name_of_classes, name_of_source, numbered
from supsup_lightning.data.sources import Reading, Source
from supsup_lightning.errors import ConfigurationError, DataError, check_choice, check_whole
from supsup_lightning.seeding import generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Data of one task.

    Attributes:
        train: training images, including those for validation.
        test: test images.
        num_classes: number of classes; labels are below it.
    """

    train: Images
    test: Images
    num_classes: int


class Stream(ABC):
    """Sequence of tasks made from data sets. Call `length`, which reads no image, then `load`, then `task`.

    Attributes:
        keeps_neighbours: neighbouring pixels are neighbours in the image.
    """

    keeps_neighbours = True

    @property
    @abstractmethod
    def sources(self) -> Sequence[Source]:
        """The data sets that tasks are made from."""

    @abstractmethod
    def length(self, root: Path) -> int | None:
        """Number of tasks; None if the stream is endless."""

    @abstractmethod
    def load(self, root: Path, reading: Reading) -> None:
        """Read the data sets below ``root``. Raises `DataError`."""

    def identity(self) -> dict[str, Any]:
        """Return what tasks depend on, besides images and seed; a checkpoint is compared with it."""
        return {"stream": type(self).__name__, "sources": [type(source).__name__ for source in self.sources]}

    def describe(self, task: int, *, root: Path, seed: int) -> TaskDescription:
        """Name a task and its classes; by number, unless a subclass knows names. Called after `load`."""
        return numbered(task, self.task(task, seed=seed).num_classes)

    @abstractmethod
    def task(self, task: int, *, seed: int) -> Task:
        """Return the data of a task, which depend only on the seed and the task's number."""


class OneSource(Stream):
    """Tasks over one data set: all images, with one transform per task. Override `transformed`, `task` or `length`.

    Args:
        source: the data set.

    Attributes:
        train: training images, set by `load`.
        test: test images, set by `load`.
        num_classes: number of classes of the data set.
    """

    train: Images
    test: Images

    def __init__(self, source: Source) -> None:
        self.source = source
        self.num_classes = 0

    @property
    def sources(self) -> Sequence[Source]:
        """The data set, in a tuple."""
        return (self.source,)

    def length(self, root: Path) -> int | None:
        """Always None: the stream is endless."""
        return None

    def load(self, root: Path, reading: Reading) -> None:
        """Read both halves, and check that each has images, and labels in range.

        Raises:
            DataError: a half without images, fewer than two classes, or a class without training images.
        """
        self.num_classes = self.source.num_classes(root)
        self.train, self.test = self.source.load(root, reading)
        name = type(self.source).__name__
        if not len(self.train) or not len(self.test):
            raise DataError(f"{name} has {len(self.train)} training and {len(self.test)} test images.")
        if self.num_classes < 2:
            raise DataError(f"{name} has {self.num_classes} class: there is nothing to tell apart.")
        for half, images in (("training", self.train), ("test", self.test)):
            if images.labels.min() < 0 or images.labels.max() >= self.num_classes:
                raise DataError(
                    f"{name} has {half} labels from {images.labels.min()} to {images.labels.max()}, where its "
                    f"{self.num_classes} classes are numbered from 0."
                )
        absent = (self.train.labels.bincount(minlength=self.num_classes) == 0).nonzero().flatten().tolist()
        if absent:
            raise DataError(f"{name} has no training images of its class {absent[0]} (of {self.num_classes}).")

    def task(self, task: int, *, seed: int) -> Task:
        """Return all images, with the transform of the task."""
        return Task(self.transformed(self.train, task, seed), self.transformed(self.test, task, seed), self.num_classes)

    def describe(self, task: int, *, root: Path, seed: int) -> TaskDescription:
        """Name a task by its number, and its classes as the data set does."""
        return TaskDescription(f"task {task}", self._class_names(root))

    def _class_names(self, root: Path) -> tuple[str, ...]:
        return class_names(self.source, root, num_classes=self.num_classes)

    def transformed(self, images: Images, task: int, seed: int) -> Images:
        """Return the images of a task. By default they are unchanged.

        Args:
            images: a half of the data set.
            task: number of the task.
            seed: seed of the data.

        Returns:
            ``dataclasses.replace(images, transform=...)`` with a function from a batch ``(batch, channels, height,
            width)`` to another. Random numbers must come from ``seeding.generator(seed, purpose, task)``, so that
            they depend on nothing else.
        """
        return images


class Whole(OneSource):
    """Stream of a single task, which is the whole data set. For `Mixed`."""

    def length(self, root: Path) -> int | None:
        """Number of tasks: 1."""
        return 1

    def describe(self, task: int, *, root: Path, seed: int) -> TaskDescription:
        """Name the task after the data set."""
        return TaskDescription(name_of_source(self.source), self._class_names(root))


class Permuted(OneSource):
    """Stream whose tasks permute the pixels (over all channels) in a random order, fixed by seed and task."""

    keeps_neighbours = False

    def describe(self, task: int, *, root: Path, seed: int) -> TaskDescription:
        """Name the permutation."""
        inputs = f"pixels in the random order of task {task} and seed {seed}"
        return TaskDescription(f"permutation {task}", self._class_names(root), inputs)

    def transformed(self, images: Images, task: int, seed: int) -> Images:
        """Return the images with the permutation of ``task`` as their transform."""
        return replace(images, transform=_Permutation(task=task, seed=seed))


class _Permutation:
    def __init__(self, *, task: int, seed: int) -> None:
        self.task, self.seed = task, seed
        self.order = torch.empty(0, dtype=torch.int64)

    def __call__(self, batch: Tensor) -> Tensor:
        pixels = batch.flatten(1)
        if len(self.order) != pixels.shape[1]:
            self.order = torch.randperm(pixels.shape[1], generator=generator(self.seed, "permutation", self.task))
        self.order = self.order.to(batch.device)
        return pixels.index_select(1, self.order).view_as(batch)


class Rotated(OneSource):
    """Stream whose task ``i`` rotates images by ``i * degrees`` counter-clockwise, bilinearly, filled with black.

    Args:
        source: the data set.
        degrees: angle between one task and the next; the paper's 10 give 36 tasks.
    """

    def __init__(self, source: Source, *, degrees: float = 10.0) -> None:
        super().__init__(source)
        if not 0 < degrees < 360:
            raise ConfigurationError(f"data.stream.degrees={degrees} must lie between 0 and 360.")
        self.degrees = degrees

    def length(self, root: Path) -> int | None:
        """Number of tasks until the images are upright again."""
        return -int(-360 // self.degrees)

    def load(self, root: Path, reading: Reading) -> None:
        """Read both halves, and check that the images can be rotated."""
        super().load(root, reading)
        for images in (self.train, self.test):
            check_picture(images.store.shape(), "data/stream=rotated (Rotated)")

    def identity(self) -> dict[str, Any]:
        """Return the data set and the angle."""
        return {**super().identity(), "degrees": self.degrees}

    def describe(self, task: int, *, root: Path, seed: int) -> TaskDescription:
        """Name the angle."""
        angle = f"{task * self.degrees:g} degrees"
        return TaskDescription(angle, self._class_names(root), f"turned by {angle} counter-clockwise")

    def transformed(self, images: Images, task: int, seed: int) -> Images:
        """Return the images with the rotation of ``task`` as their transform."""
        return replace(images, transform=_Rotation(task * self.degrees, fill=-images.mean / images.std))


class _Rotation:
    def __init__(self, angle: float, *, fill: Tensor) -> None:
        self.angle = angle
        self.fill = fill.flatten().tolist()

    def __call__(self, batch: Tensor) -> Tensor:
        if self.angle == 0:
            return batch
        fill = self.fill if len(self.fill) == batch.shape[1] else self.fill[:1] * batch.shape[1]
        return F.rotate(batch, self.angle, interpolation=InterpolationMode.BILINEAR, fill=fill)


class Split(OneSource):
    """Stream whose tasks have a few of the classes each; every class is in one task.

    If the classes do not divide evenly, the last task has fewer of them. A single class left over is left out.

    Args:
        source: the data set.
        classes_per_task: number of classes per task, at least two.
        class_order: ``random`` (from the seed), ``fixed`` (0, 1, 2, ...), or a list of classes.
        relabel: number the classes of each task from 0; otherwise keep the labels of the data set.
    """

    def __init__(
        self,
        source: Source,
        *,
        classes_per_task: int,
        class_order: str | Sequence[int] = "random",
        relabel: bool = True,
    ) -> None:
        super().__init__(source)
        alone = ": a task of one class has nothing to tell apart"
        self.classes_per_task = check_whole("data.stream.classes_per_task", classes_per_task, least=2, more=alone)
        if isinstance(class_order, str):
            check_choice("data.stream.class_order", class_order, ("random", "fixed"))
        else:
            class_order = [check_whole("data.stream.class_order", label, least=0) for label in class_order]
        self.class_order = class_order
        self.relabel = relabel

    def length(self, root: Path) -> int | None:
        """Number of tasks that the classes make; the last one may have fewer classes."""
        available = self.source.num_classes(root)
        if available < 2:
            raise DataError(f"{type(self.source).__name__} has {available} class: there is nothing to tell apart.")
        if not isinstance(self.class_order, str):
            order = self.class_order
            if len(set(order)) != len(order) or not all(0 <= label < available for label in order):
                raise ConfigurationError(
                    f"data.stream.class_order={order} must name classes from 0 to {available - 1}, each once at most."
                )
            available = len(order)
        whole, left = divmod(available, self.classes_per_task)
        if not whole:
            raise ConfigurationError(
                f"data.stream.classes_per_task={self.classes_per_task} is more than the {available} classes there are."
            )
        if left == 1:
            logger.warning(
                "%d classes do not divide by data.stream.classes_per_task=%d: the last one is left out, as a task of "
                "one class has nothing to tell apart.",
                available,
                self.classes_per_task,
            )
            return whole
        if left:
            logger.info("The last task has %d classes, the others %d.", left, self.classes_per_task)
        return whole + (left > 0)

    def task(self, task: int, *, seed: int) -> Task:
        """Return the images of the task's classes."""
        classes = self._order(seed)[task * self.classes_per_task :][: self.classes_per_task]
        number = torch.full((self.num_classes,), -1)
        number[classes] = torch.arange(len(classes)) if self.relabel else classes
        train, test = (_relabelled(images, number) for images in (self.train, self.test))
        for half, images in (("training", train), ("test", test)):
            if not len(images):
                raise DataError(f"There are no {half} images of the classes {classes.tolist()} of task {task}.")
        return Task(train, test, len(classes) if self.relabel else self.num_classes)

    def describe(self, task: int, *, root: Path, seed: int) -> TaskDescription:
        """Name the task after its classes."""
        every = self._class_names(root)
        places = self._order(seed)[task * self.classes_per_task :][: self.classes_per_task].tolist()
        own = tuple(every[place] for place in places)
        return TaskDescription(name_of_classes(own), own if self.relabel else every)

    def _order(self, seed: int) -> Tensor:
        if self.class_order == "fixed":
            return torch.arange(self.num_classes)
        if self.class_order == "random":
            return torch.randperm(self.num_classes, generator=generator(seed, "classes"))
        return torch.tensor(self.class_order)


def _relabelled(images: Images, number: Tensor) -> Images:
    """Return the images with label ``number[label]``; those with a negative number are left out."""
    labels = number[images.labels]
    chosen = images.select((labels >= 0).nonzero().flatten())
    return replace(chosen, labels=number[chosen.labels])
