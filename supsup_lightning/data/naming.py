"""Names of tasks and of their classes, as far as the data know them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supsup_lightning.data.datasets import Datasets, class_names_of
from supsup_lightning.data.inputs import Inputs
from supsup_lightning.data.raw_images import RawImages
from supsup_lightning.data.sources import CIFAR10, KMNIST, FashionMNIST, Named, Source

_MOST_IN_A_NAME = 3  # classes
_DIFFERENT = RawImages(refused="its tasks have images that were prepared differently")


class TaskDescription(NamedTuple):
    """What the data say of a task.

    Attributes:
        name: name of the task.
        classes: name of each class, in the order of the labels.
        inputs: what the task does to the images of the data set, in words; empty if nothing.
    """

    name: str
    classes: tuple[str, ...]
    inputs: str = ""


def numbered(task: int, num_classes: int) -> TaskDescription:
    """Describe a task of which nothing is known but numbers.

    >>> numbered(3, 2)
    TaskDescription(name='task 3', classes=('0', '1'), inputs='')
    """
    return TaskDescription(f"task {task}", tuple(map(str, range(num_classes))))


def class_names(source: Source, root: Path, *, num_classes: int) -> tuple[str, ...]:
    """Names of a data set's classes in the order of their labels; numbers where it has none."""
    names: Sequence[str] = ()
    if isinstance(source, Named):
        names = source.class_names(root)
    elif isinstance(source, (FashionMNIST, KMNIST, CIFAR10)):
        names = source.names
    elif isinstance(source, Datasets):
        names = class_names_of(source)
    found = tuple(map(str, names))
    return found if len(found) == num_classes else tuple(map(str, range(num_classes)))


def name_of_classes(names: tuple[str, ...]) -> str:
    """Name a task after its classes.

    >>> name_of_classes(("cat", "dog")), name_of_classes(("ant", "bee", "cat", "dog", "eel"))
    ('cat, dog', 'ant, bee, cat, ...')
    """
    return ", ".join(names[:_MOST_IN_A_NAME]) + (", ..." if len(names) > _MOST_IN_A_NAME else "")


def name_of_source(source: Any) -> str:
    """Name of a data set: its folder if it has one, else its class.

    >>> from supsup_lightning.data import MNIST, ImageFolder
    >>> name_of_source(MNIST()), name_of_source(ImageFolder("birds/small"))
    ('MNIST', 'small')
    """
    folder = Path(getattr(source, "folder", "") or "")
    return folder.name or type(source).__name__


def distinct(descriptions: list[TaskDescription]) -> tuple[TaskDescription, ...]:
    """Add the task's number to names that several tasks have."""
    names = [each.name for each in descriptions]
    twice = {name for name in names if names.count(name) > 1} if len({*names}) < len(names) else set()
    return tuple(
        each._replace(name=f"{each.name} (task {task})") if each.name in twice else each
        for task, each in enumerate(descriptions)
    )


@dataclass(frozen=True)
class AboutData:
    """What a model has to remember of the data that it was trained on, to predict other images.

    Attributes:
        inputs: shape, type and normalisation of network inputs.
        raw: how raw images become network inputs.
        tasks: what the data say of each task.
    """

    inputs: Inputs
    raw: RawImages
    tasks: tuple[TaskDescription, ...]

    def after(self, earlier: "AboutData | None", *, first_task: int) -> "AboutData":
        """Return this with the tasks before ``first_task`` as ``earlier`` knows them.

        If theirs were prepared in another way, no raw image can be prepared, as nothing tells whose it is.
        """
        if earlier is None or not first_task:
            return self
        known = earlier.tasks[:first_task]
        return self.joined(earlier, distinct([*known, *self.tasks[len(known) :]]))

    def joined(self, other: "AboutData", tasks: tuple[TaskDescription, ...]) -> "AboutData":
        """Return what holds for all of these tasks, of which the other has some."""
        inputs = self.inputs
        if not _same(inputs.normalisation, other.inputs.normalisation):
            inputs = replace(inputs, normalisation=None)
        return AboutData(inputs, self.raw if self.raw == other.raw else _DIFFERENT, tasks)

    def state(self) -> dict[str, Any]:
        """Return the state as plain values and tensors, for a checkpoint."""
        return {"inputs": self.inputs.state(), "raw": self.raw.state(), "tasks": [[*each] for each in self.tasks]}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "AboutData":
        """Make it from the state of a checkpoint."""
        tasks = tuple(TaskDescription(name, tuple(classes), inputs) for name, classes, inputs in state["tasks"])
        return cls(Inputs.of(state["inputs"]), RawImages.of(state["raw"]), tasks)


def _same(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None) -> bool:
    """Whether two normalisations are equal."""
    if one is None or other is None:
        return one is other
    return all(torch.equal(mine.cpu(), theirs.cpu()) for mine, theirs in zip(one, other, strict=True))
