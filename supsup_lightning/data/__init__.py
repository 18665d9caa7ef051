"""Continual-learning data: a source (whole data set in memory) and a stream (how it becomes tasks)."""

from collections.abc import Sequence
from pathlib import Path

from supsup_lightning.data.datamodule import ContinualDataModule
from supsup_lightning.data.images import Images
from supsup_lightning.data.sources import MNIST, Digits
from supsup_lightning.data.streams import Permuted


def PermutedDigits(*, num_tasks: int = 10, input_shape: Sequence[int] = (1, 8, 8), **options) -> ContinualDataModule:
    """scikit-learn's 8 x 8 digits under one fixed permutation of the pixels a task. Nothing to download.

    With neither ``steps_per_task`` nor ``epochs_per_task``, 400 steps: the images are few and small.
    """
    if options.get("steps_per_task") is None and options.get("epochs_per_task") is None:
        options["steps_per_task"] = 400
    return ContinualDataModule(Digits(), Permuted(), num_tasks=num_tasks, input_shape=input_shape, **options)


def PermutedMNIST(
    *, root: str | Path = "data", num_tasks: int = 10, input_shape: Sequence[int] = (1, 28, 28), **options
) -> ContinualDataModule:
    """MNIST under one fixed permutation of the pixels a task."""
    return ContinualDataModule(MNIST(root), Permuted(), num_tasks=num_tasks, input_shape=input_shape, **options)


__all__ = ["MNIST", "ContinualDataModule", "Digits", "Images", "Permuted", "PermutedDigits", "PermutedMNIST"]
