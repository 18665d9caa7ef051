"""Continual-learning data: data sets (sources), how they become tasks (streams), and DataModules that serve them."""

from pathlib import Path

from supsup_lightning.data.augment import CropFlip
from supsup_lightning.data.datamodule import ContinualDataModule
from supsup_lightning.data.datasets import Datasets
from supsup_lightning.data.folders import ImageCSV, ImageFolder
from supsup_lightning.data.images import Images
from supsup_lightning.data.mixed import Domains, Mixed
from supsup_lightning.data.sequence import DataModuleSequence
from supsup_lightning.data.sources import (
    CIFAR10,
    CIFAR100,
    KMNIST,
    MNIST,
    Digits,
    FashionMNIST,
    Reading,
    Source,
    halves,
)
from supsup_lightning.data.streams import OneSource, Permuted, Rotated, Split, Stream, Task, Whole
from supsup_lightning.data.tasks import TaskDataModule, TaskSequence


def announced(tasks: TaskSequence) -> TaskSequence:
    """Return the tasks unchanged: training batches come with their task. For `datamodule` in conf/train.yaml."""
    return tasks


def PermutedDigits(*, num_tasks: int = 10, **options) -> ContinualDataModule:
    """scikit-learn's 8 x 8 digits with one fixed pixel permutation per task. Nothing to download.

    Without ``steps_per_task`` and ``epochs_per_task``, a task takes 400 steps: the images are few and small.
    """
    if options.get("steps_per_task") is None and options.get("epochs_per_task") is None:
        options["steps_per_task"] = 400
    return ContinualDataModule(Permuted(Digits()), num_tasks=num_tasks, **options)


def PermutedMNIST(*, root: str | Path = "data", num_tasks: int = 10, **options) -> ContinualDataModule:
    """MNIST with one fixed pixel permutation per task."""
    return ContinualDataModule(Permuted(MNIST()), root=root, num_tasks=num_tasks, **options)


__all__ = [
    "CIFAR10",
    "CIFAR100",
    "KMNIST",
    "MNIST",
    "ContinualDataModule",
    "CropFlip",
    "DataModuleSequence",
    "Datasets",
    "Digits",
    "Domains",
    "FashionMNIST",
    "ImageCSV",
    "ImageFolder",
    "Images",
    "Mixed",
    "OneSource",
    "Permuted",
    "PermutedDigits",
    "PermutedMNIST",
    "Reading",
    "Rotated",
    "Source",
    "Split",
    "Stream",
    "Task",
    "TaskDataModule",
    "TaskSequence",
    "Whole",
    "announced",
    "halves",
]
