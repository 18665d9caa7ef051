"""Continual-learning DataModule over a stream of tasks, with its loaders and options."""

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from supsup_lightning.data.augment import CropFlip, make_augment, name_of
from supsup_lightning.data.datasets import Datasets
from supsup_lightning.data.examination import examine
from supsup_lightning.data.images import Augment, BatchLoader, Images, InOrder, Memory, check_picture
from supsup_lightning.data.naming import TaskDescription, distinct, numbered
from supsup_lightning.data.raw_images import RawImages
from supsup_lightning.data.sources import Reading
from supsup_lightning.data.streams import Permuted, Rotated, Split, Stream, Task
from supsup_lightning.data.tasks import TaskSequence, check_count
from supsup_lightning.errors import ConfigurationError, as_whole, check_choice, check_whole
from supsup_lightning.runs.run_identity import files_of
from supsup_lightning.seeding import generator

# No effect on results, as validation counts single images; large, because each batch costs loop overhead.
_VALIDATION_BATCH = 1000


class ContinualDataModule(TaskSequence):
    """Lightning DataModule that serves the tasks of a stream one after another (`TaskSequence`).

    Args:
        stream: how data sets become tasks.
        num_tasks: number of tasks; by default all of the stream, if it is finite.
        root: folder that holds the data sets.
        input_shape: shape of one network input, ``(channels, height, width)``; by default the data set's own.
        resize: bring images of another shape to ``input_shape``; otherwise they raise an error.
        batch_size: images per optimizer step, over all processes together.
        steps_per_task: training length of a task in batches. Give this or ``epochs_per_task``, not both.
        epochs_per_task: training length in passes over the data; the incomplete last batch of a pass is left out.
        patience: epochs without a better validation accuracy after which a task ends; see `TaskSequence`.
        tasks_at_once: number of tasks trained in the same step, or ``auto``; see `TaskSequence`.
        task_shard: train and test one shard of the tasks alone, ``i/n`` with ``i`` from 0; see `TaskSequence`.
        first_task: train and test the tasks from this one on alone; see `TaskSequence`.
        augment: augmentation of training images: ``none``, ``crop_flip``, ``resized_crop`` (image files only, while
            they are read), or a function of a raw batch ``(batch, channels, height, width)`` and random integers
            ``(batch, 3)``.
        validation_share: share of a task's training images held out for validation.
        in_memory: read image files once, at the start; ``auto`` does so if they take at most one gigabyte.
        num_workers: processes that read images that are not in memory. None means one per core, up to 8, for image
            files, and the main process for a ``Dataset``.
        on_error: ``raise``, or ``skip`` to leave out image files that are missing or damaged.
        seed: seed of the tasks, the validation split and the order of the images.

    Raises:
        ConfigurationError: an option out of its range.

    Without ``steps_per_task`` and ``epochs_per_task``, a task takes 1000 steps, as in the paper's MNIST experiments.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        num_tasks: int | None = None,
        root: str | Path = "data",
        input_shape: Sequence[int] | None = None,
        resize: bool = False,
        batch_size: int = 128,
        steps_per_task: int | None = None,
        epochs_per_task: int | None = None,
        patience: int | None = None,
        tasks_at_once: int | str = 1,
        task_shard: str | None = None,
        first_task: int = 0,
        augment: str | Augment | None = None,
        validation_share: float = 0.05,
        in_memory: bool | str = "auto",
        num_workers: int | None = None,
        on_error: str = "raise",
        seed: int = 0,
    ) -> None:
        if steps_per_task is None and epochs_per_task is None:
            steps_per_task = 1000
        super().__init__(
            steps_per_task=steps_per_task,
            epochs_per_task=epochs_per_task,
            patience=patience,
            tasks_at_once=tasks_at_once,
            task_shard=task_shard,
            first_task=first_task,
            seed=seed,
        )
        if not 0 < validation_share < 1:
            raise ConfigurationError(f"data.validation_share={validation_share} must lie between 0 and 1.")
        check_choice("data.in_memory", in_memory, (True, False, "auto"))
        check_choice("data.on_error", on_error, ("raise", "skip"))
        if on_error == "skip" and tasks_at_once == "auto":
            self.tasks_at_once = 1
        if on_error == "skip" and self.tasks_at_once != 1:
            raise ConfigurationError(
                f"data.on_error=skip makes batches smaller, and data.tasks_at_once={tasks_at_once} needs them equal; "
                "use data.tasks_at_once=1."
            )
        if num_workers is not None:
            num_workers = check_whole("data.num_workers", num_workers, least=0)
        if input_shape is not None and not (
            isinstance(input_shape, Sequence) and all((as_whole(size) or 0) > 0 for size in input_shape)
        ):
            raise ConfigurationError(
                f"data.input_shape={input_shape!r} must be a list of integers, such as [3,32,32] for channels, "
                "height and width."
            )
        if resize and input_shape is None:
            raise ConfigurationError("data.resize=true needs data.input_shape, the shape to bring images to.")
        self.stream = stream
        self.root = Path(root).expanduser()
        self.resize = resize
        self.batch_size = check_whole("data.batch_size", batch_size)
        self.augment = make_augment(augment)
        self.validation_share = validation_share
        self.reading = Reading(
            input_shape=None if input_shape is None else tuple(map(int, input_shape)),
            in_memory=in_memory,
            num_workers=num_workers,
            on_error=on_error,
            resized_crop=augment == "resized_crop",
        )
        self._wanted_tasks = check_count("num_tasks", num_tasks)
        self._length: int | None = None
        self._num_classes: tuple[int, ...] = ()
        self._augment_name = name_of(augment)
        self._digests: list[str] = []  # of the images of the first tasks, by their number less one
        self._first_tasks: list[int] = []  # the first task of each data set
        self._loaded = False

    # Construction from a pair of torch data sets.

    @classmethod
    def split(
        cls,
        train: Dataset,
        test: Dataset,
        *,
        classes_per_task: int,
        class_order: str | Sequence[int] = "random",
        relabel: bool = True,
        **options: Any,
    ) -> "ContinualDataModule":
        """Tasks of a few classes each (`Split`) from a training and a test ``Dataset`` of ``(image, label)``."""
        stream = Split(
            Datasets(train, test), classes_per_task=classes_per_task, class_order=class_order, relabel=relabel
        )
        return cls(stream, **options)

    @classmethod
    def permuted(cls, train: Dataset, test: Dataset, *, num_tasks: int, **options: Any) -> "ContinualDataModule":
        """Tasks of permuted pixels (`Permuted`) from a training and a test ``Dataset`` of ``(image, label)``."""
        return cls(Permuted(Datasets(train, test)), num_tasks=num_tasks, **options)

    @classmethod
    def rotated(cls, train: Dataset, test: Dataset, *, degrees: float = 10.0, **options: Any) -> "ContinualDataModule":
        """Tasks of rotated images (`Rotated`) from a training and a test ``Dataset`` of ``(image, label)``."""
        return cls(Rotated(Datasets(train, test), degrees=degrees), **options)

    # Sizes.

    @property
    def num_tasks(self) -> int:
        """Number of tasks: the option ``num_tasks``, or all tasks of the stream."""
        if self._wanted_tasks is not None:
            return self._wanted_tasks
        if self._length is None:
            self._length = self._checked_length()
        return self._length

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Number of classes of each task; known after `setup`."""
        return self._num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one network input; known after `setup` if the option ``input_shape`` was not given."""
        return self.reading.input_shape or self._task(0).train.store.shape()

    def steps_per_epoch(self, task: int) -> int:
        """Training batches per epoch: ``steps_per_task`` if given, else one pass over the task's training images."""
        if self.steps_per_task is not None:
            return self.steps_per_task
        return max(1, len(self._halves(task)[0]) // self.batch_size)

    def example(self) -> Tensor:
        """The first readable training image of task 0, repeated twice, ``(2, *shape)``."""
        return _example(self._task(0).train)

    def other_examples(self) -> dict[int, Tensor]:
        """Two inputs from the first task of each data set, by task, if their shape or type is new."""
        examples = {task: _example(self._task(task).train) for task in self._first_tasks}
        kinds: dict[tuple[torch.Size, torch.dtype], int] = {}
        for task, images in examples.items():
            kinds.setdefault((images.shape, images.dtype), task)
        return {task: examples[task] for task in kinds.values() if task}

    def normalisation(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the training images; None if tasks differ in them or transform images."""
        first = self._task(0).train
        if torch.equal(first.std, torch.ones(1, 1, 1)):  # the images were not bytes
            return None
        for images in (self._task(task).train for task in range(self.num_tasks)):
            if images.transform is not None or images.input_shape is not None:
                return None
            if not (torch.equal(images.mean, first.mean) and torch.equal(images.std, first.std)):
                return None
        return first.mean, first.std

    def raw_images(self) -> RawImages:
        """How raw images become network inputs, as far as it is the same for all tasks."""
        first = self._task(0).train
        shape = first.store.shape()
        resizes = {getattr(source, "resizes_files", False) for source in self.stream.sources}
        if torch.equal(first.std, torch.ones(1, 1, 1)):
            return RawImages(refused="the data set gives tensors of its own, and not bytes")
        if len(resizes) > 1 or len(shape) != 3:
            return RawImages(refused="its data sets differ in how images are read")
        for task in range(self.num_tasks):
            images = self._task(task).train
            if images.transform is not None:
                return RawImages(refused="each task transforms its images in a way of its own")
            if not (torch.equal(images.mean, first.mean) and torch.equal(images.std, first.std)):
                return RawImages(refused="its tasks are normalised by different data sets")
            if images.store.shape() != shape:
                return RawImages(refused="its tasks have images of different shapes")
        if resizes == {True}:
            resize = "crop" if self.reading.resized_crop else "files"
        else:
            resize = "none" if first.input_shape is None else "inputs"
        highest = int(first.store.pixels.max()) if isinstance(first.store, Memory) else 255
        mean, std = (tuple(part.flatten().tolist()) for part in (first.mean, first.std))
        return RawImages(shape=shape, mean=mean, std=std, highest=highest, resize=resize)

    def describe_tasks(self) -> tuple[TaskDescription, ...]:
        """Names of tasks and of their classes, by the stream."""
        tasks = [self.stream.describe(task, root=self.root, seed=self.seed) for task in range(self.num_tasks)]
        return distinct(
            [
                each if len(each.classes) == number else numbered(task, number)
                for task, (each, number) in enumerate(zip(tasks, self.num_classes, strict=True))
            ]
        )

    @property
    def keeps_neighbours(self) -> bool:
        """Whether the stream leaves pixels where they are in the image, or moves them together."""
        return self.stream.keeps_neighbours

    def num_skipped(self) -> int:
        """Number of image files that this process could not read."""
        return sum(source.num_skipped() for source in self.stream.sources)

    def files(self) -> dict[str, Any] | None:
        """Files of the data sets, described without reading their contents."""
        return files_of(self.root, self.stream.sources)

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Download missing data sets."""
        for source in self.stream.sources:
            source.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Read the data sets, and check that every task can be trained and tested."""
        if self._loaded:
            return
        if self._wanted_tasks is not None:
            self._checked_length()
        self.stream.load(self.root, self.reading)
        self._loaded = True
        try:
            self._examine()
        except BaseException:
            self._loaded = False  # so that the next call checks the data again
            raise

    def _examine(self) -> None:
        """Check that every task can be trained and tested; store the numbers of classes and the digest."""
        digest, digests, classes = hashlib.sha256(), [], []
        self._first_tasks = []
        before: tuple[Tensor | None, ...] = (None,) * 3
        examined: set[int] = set()
        for number in range(self.num_tasks):
            task = self._task(number)
            classes.append(task.num_classes)
            if isinstance(self.augment, CropFlip):
                self.augment.check(task.train.store.shape())
            parts = task.train.positions, task.train.labels, task.test.labels
            if not all(map(operator.is_, parts, before)):  # tasks that only transform images share these tensors
                before = parts
                if id(task.train.store) not in examined:
                    self._first_tasks.append(number)
                examine(task, number, examined)
                self._check_training_half(number)
                for part in (task.train.positions, task.train.labels):
                    digest.update(part.numpy().tobytes())
            digests.append(digest.hexdigest())
        self._num_classes, self._digests = tuple(classes), digests

    def _check_training_half(self, task: int) -> None:
        """Raise `ConfigurationError` if the validation share leaves a class without training images."""
        whole, left = self._task(task).train.labels.unique(), self._halves(task)[0].labels.unique()
        if len(left) < len(whole):
            raise ConfigurationError(
                f"data.validation_share={self.validation_share} leaves {len(left)} of the {len(whole)} classes of task "
                f"{task} to train on, as it has {len(self._task(task).train)} images; lower it, or give more images."
            )

    def _checked_length(self) -> int:
        length = self.stream.length(self.root)
        wanted = self._wanted_tasks
        if length is None and wanted is None:
            raise ConfigurationError(f"data.num_tasks is needed: {type(self.stream).__name__} has no end of tasks.")
        if length is not None and wanted is not None and wanted > length:
            raise ConfigurationError(
                f"data.num_tasks={wanted} is more than the {length} tasks of {type(self.stream).__name__}; "
                "data.num_tasks=null takes all."
            )
        return wanted or length or 0

    def identity(self) -> dict[str, Any]:
        """Options of the data module and of its stream, with a digest of image positions and labels."""
        names = ("num_tasks", "batch_size", "steps_per_task", "epochs_per_task", "tasks_at_once", "validation_share")
        return {
            **{name: getattr(self, name) for name in (*names, "patience", "resize", "seed")},
            **self.part(),
            "num_classes": list(self.num_classes),
            "input_shape": list(self.input_shape),
            "augment": self._augment_name,
            **self.stream.identity(),
            "images": self._digests[-1] if self._digests else "",
        }

    def of_first_tasks(self, num_tasks: int) -> dict[str, Any]:
        """Return the part of `identity` that depends on the number of tasks, as it is for the first ones alone."""
        return {**super().of_first_tasks(num_tasks), "images": self._digests[num_tasks - 1] if self._digests else ""}

    # Loaders.

    def train_loader(self, task: int, *, epoch: int = 0, steps: slice = slice(None)) -> BatchLoader:
        """Return the training batches of one epoch (counted within the task), or a slice of them, of any task."""
        rank, world_size = self.processes()
        if self.batch_size % world_size:
            raise ConfigurationError(f"data.batch_size={self.batch_size} does not divide by {world_size} processes.")
        images, _ = self._halves(task)
        draw = generator(self.seed, "order", task, epoch)
        length = self.steps_per_epoch(task)
        needed = length * self.batch_size
        passes = [torch.randperm(len(images), generator=draw) for _ in range(-(-needed // len(images)))]
        order = torch.cat(passes)[:needed].view(-1, self.batch_size)
        draws = None
        if self.augment is not None or not isinstance(images.store, Memory):
            draw = generator(self.seed, "augment", task, epoch)
            draws = torch.randint(2**31, (length, self.batch_size, 3), generator=draw)[steps, rank::world_size]
        # Every process takes its share of each batch, so that the number of processes does not change the gradient.
        order = order[steps, rank::world_size].contiguous()
        name = f"training images of task {task}"
        return BatchLoader(images, order.unbind(), device=self.device, draws=draws, augment=self.augment, name=name)

    def val_loader(self, task: int) -> BatchLoader:
        """Return the validation batches of any task."""
        rank, world_size = self.processes()
        _, images = self._halves(task)
        order = InOrder(range(len(images))[rank::world_size], _VALIDATION_BATCH)
        return BatchLoader(images, order, device=self.device, name=f"validation images of task {task}")

    def each_image(self, task: int, *, half: str) -> BatchLoader:
        """Return batches with each training or validation image of any task once, in order and not augmented."""
        images = self._halves(task)[("training", "validation").index(half)]
        order = InOrder(range(len(images)), _VALIDATION_BATCH)
        return BatchLoader(images, order, device=self.device, name=f"{half} images of task {task}")

    def test_loader(self, task: int) -> BatchLoader:
        """Return the test batches of any task."""
        rank, world_size = self.processes()
        images = self._task(task).test
        # Each process gets whole batches, because inference decides about a task per batch, and the batch size must not
        # depend on the number of processes. A process without a batch gets one of no images: Lightning's test would
        # skip that process, and the others would wait for it.
        order = InOrder(range(len(images)), self.batch_size, slice(rank, None, world_size))
        return BatchLoader(images, order, device=self.device, name=f"test images of task {task}")

    def _halves(self, task: int) -> tuple[Images, Images]:
        """Return the task's training and validation images."""
        images = self._task(task).train
        order = torch.randperm(len(images), generator=generator(self.seed, "validation"))
        num_validation = max(1, round(len(images) * self.validation_share))
        return images.select(order[num_validation:]), images.select(order[:num_validation])

    def _task(self, task: int) -> Task:
        self.check_task(task)
        if not self._loaded:
            self.prepare_data()
            self.setup()
        found = self.stream.task(task, seed=self.seed)
        wanted = self.reading.input_shape
        own, other = found.train.store.shape(), found.test.store.shape()
        if wanted is None or (own == wanted and (other == wanted or not self.resize)):
            return found
        if not self.resize:
            raise ConfigurationError(
                f"data.input_shape={list(wanted)}, but the images of task {task} have shape {list(own)}; give "
                "data.input_shape that shape, or add data.resize=true."
            )
        for shape in (own, other, wanted):
            check_picture(shape, "data.resize=true")
        return replace(found, **{half: replace(getattr(found, half), input_shape=wanted) for half in ("train", "test")})


def _example(images: Images) -> Tensor:
    """Return the first readable image as a network input, repeated twice, ``(2, *shape)``."""
    first = next(iter(images.store.batches([images.positions[:8]], seeds=None, device=torch.device("cpu"))))
    return images.prepare(first.pixels[:1].repeat_interleave(2, 0))
