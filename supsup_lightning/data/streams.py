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
from supsup_lightning.data.sources import Reading, Source
from supsup_lightning.errors import ConfigurationError, DataError, check_choice, check_whole
from supsup_lightning.seeding import generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One task's data.

    Attributes:
        train: training images, those for validation among them.
        test: test images.
        num_classes: labels run from 0 to below it.
    """

    train: Images
    test: Images
    num_classes: int


class Stream(ABC):
    """Makes tasks of data sets. First `length`, which reads no image, then `load`, then `task`."""

    @property
    @abstractmethod
    def sources(self) -> Sequence[Source]:
        """The data sets."""

    @abstractmethod
    def length(self, root: Path) -> int | None:
        """How many tasks there are; None if there is no end of them."""

    @abstractmethod
    def load(self, root: Path, reading: Reading) -> None:
        """Read the data sets below ``root``. Raises `DataError`."""

    def identity(self) -> dict[str, Any]:
        """What the tasks depend on beside the data sets' images and the seed, for a checkpoint to be checked by."""
        return {"stream": type(self).__name__, "sources": [type(source).__name__ for source in self.sources]}

    @abstractmethod
    def task(self, task: int, *, seed: int) -> Task:
        """The data of a task, which depend on nothing but the seed and its number."""


class OneSource(Stream):
    """Tasks over one data set: all images, under a transform per task. Override `transformed`, `task` or `length`.

    Args:
        source: the data set.

    Attributes:
        train: training images, once `load` was called.
        test: test images.
        num_classes: of the data set.
    """

    train: Images
    test: Images

    def __init__(self, source: Source) -> None:
        self.source = source
        self.num_classes = 0

    @property
    def sources(self) -> Sequence[Source]:
        """The data set."""
        return (self.source,)

    def length(self, root: Path) -> int | None:
        """No end of tasks."""
        return None

    def load(self, root: Path, reading: Reading) -> None:
        """Read both halves, and see that they are something to learn from."""
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
        """All images, under the transform of the task."""
        return Task(self.transformed(self.train, task, seed), self.transformed(self.test, task, seed), self.num_classes)

    def transformed(self, images: Images, task: int, seed: int) -> Images:
        """The images of a task.

        Args:
            images: a half of the data set.
            task: its number.
            seed: of the data.

        Returns:
            ``dataclasses.replace(images, transform=...)`` with a function from a batch ``(batch, channels, height,
            width)`` to another. Random numbers have to come from ``seeding.generator(seed, purpose, task)``, so that
            they depend on nothing else. By default, the images as they are.
        """
        return images


class Whole(OneSource):
    """A single task: the data set as it is. For `Mixed`."""

    def length(self, root: Path) -> int | None:
        """One."""
        return 1


class Permuted(OneSource):
    """Each task sees the pixels (over all channels) in one random order of its own, fixed by seed and task."""

    def transformed(self, images: Images, task: int, seed: int) -> Images:
        """The images with the permutation of ``task`` as their transform."""
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
    """Task ``i`` sees the images turned by ``i * degrees``, counter-clockwise, bilinearly, on black.

    Args:
        source: the data set.
        degrees: from task to task; the paper's 10 give 36 tasks.
    """

    def __init__(self, source: Source, *, degrees: float = 10.0) -> None:
        super().__init__(source)
        if not 0 < degrees < 360:
            raise ConfigurationError(f"data.stream.degrees={degrees} must lie between 0 and 360.")
        self.degrees = degrees

    def length(self, root: Path) -> int | None:
        """Until the images are upright again."""
        return -int(-360 // self.degrees)

    def load(self, root: Path, reading: Reading) -> None:
        """Read both halves, and see that they can be turned."""
        super().load(root, reading)
        for images in (self.train, self.test):
            check_picture(images.store.shape(), "data/stream=rotated (Rotated)")

    def identity(self) -> dict[str, Any]:
        """With the angle."""
        return {**super().identity(), "degrees": self.degrees}

    def transformed(self, images: Images, task: int, seed: int) -> Images:
        """The images with the rotation of ``task`` as their transform."""
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
    """Each task has some of the classes, and every class is in one task.

    Classes that do not divide evenly leave a last task with fewer of them.

    Args:
        source: the data set.
        classes_per_task: at least two.
        class_order: ``random`` (from the seed), ``fixed`` (0, 1, 2, ...), or a list of classes.
        relabel: number the classes of each task from 0; otherwise labels stay the data set's.
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
        """Number of tasks that the classes fill, the last one perhaps in part."""
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
        """The images of the task's classes."""
        classes = self._order(seed)[task * self.classes_per_task :][: self.classes_per_task]
        number = torch.full((self.num_classes,), -1)
        number[classes] = torch.arange(len(classes)) if self.relabel else classes
        train, test = (_relabelled(images, number) for images in (self.train, self.test))
        for half, images in (("training", train), ("test", test)):
            if not len(images):
                raise DataError(f"There are no {half} images of the classes {classes.tolist()} of task {task}.")
        return Task(train, test, len(classes) if self.relabel else self.num_classes)

    def _order(self, seed: int) -> Tensor:
        if self.class_order == "fixed":
            return torch.arange(self.num_classes)
        if self.class_order == "random":
            return torch.randperm(self.num_classes, generator=generator(seed, "classes"))
        return torch.tensor(self.class_order)


def _relabelled(images: Images, number: Tensor) -> Images:
    """The images whose label has a number that is not negative, with that number as label."""
    labels = number[images.labels]
    chosen = images.select((labels >= 0).nonzero().flatten())
    return replace(chosen, labels=number[chosen.labels])
