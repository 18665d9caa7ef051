"""Loader of a task that wraps a data module's own: it checks each batch, and moves it by the module's hooks."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from operator import length_hint
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.data.items import as_tensor, image_and_label, labels_of_batch, num_ignored
from supsup_lightning.data.values import Watch, check_numbers, check_same
from supsup_lightning.errors import ConfigurationError, DataError
from supsup_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from supsup_lightning.data.sequence import DataModuleSequence

logger = logging.getLogger(__name__)


class ModuleLoader:
    """Loader of ``(images, labels)`` batches from a data module's loader.

    Args:
        sequence: the sequence that holds the data module.
        task: number of the task.
        half: training, validation or test.
        loader: the data module's loader.
        length: number of training batches; the loader is repeated as often as needed. None in evaluation: one pass,
            whatever length the loader reports.
        most: number of batches of one pass, at most; None: all.
        skip: number of training batches to skip at the start.
        epoch: epoch within the task; each pass of each epoch shuffles by its own seed.
    """

    def __init__(
        self,
        sequence: "DataModuleSequence",
        task: int,
        half: str,
        loader: Any,
        *,
        length: int | None = None,
        most: int | None = None,
        skip: int = 0,
        epoch: int = 0,
    ) -> None:
        self.sequence = sequence
        self.task = task
        self.half = half
        self.loader = loader
        self.length = length
        self.most = most
        self.skip = skip
        self.epoch = epoch
        module = sequence.module_of(task)
        self.name = f"the {half} loader of task {task} ({type(module).__name__})"
        self._changes_batches = any(
            defines(module, hook) for hook in ("transfer_batch_to_device", "on_after_batch_transfer")
        )

    def __len__(self) -> int:
        """Number of batches. Raises `TypeError` if the loader has no length; Lightning then iterates to its end."""
        return len(self.loader) if self.length is None else self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        module, device = self.sequence.module_of(self.task), self.sequence.device
        batches = itertools.islice(self._once(), self.most) if self.length is None else self._part(self.length)
        watch = Watch(lambda number, _: f"Batch {number} of {self.name}")
        for number, batch in enumerate(batches):
            given = module.on_before_batch_transfer(batch, 0)
            # Values are checked before they move, unless hooks change them later: a check on an accelerator makes it
            # wait.
            early = device.type != "cpu" and not self._changes_batches
            if early:
                self._look(*self._parts(given, number), number)
            moved = module.transfer_batch_to_device(given, device, 0)
            images, labels = self._parts(module.on_after_batch_transfer(moved, 0), number)
            if not early:
                if number == 0 or device.type == "cpu":
                    self._look(images, labels, number)
                else:
                    watch.look(images, number)
            yield images.to(device), labels.to(device)
        watch.end()

    def _part(self, length: int) -> Iterator[Any]:
        """Yield ``length`` training batches after the skipped ones, repeating the loader."""
        passes = itertools.chain.from_iterable(self._pass(number) for number in itertools.count())
        return itertools.islice(passes, self.skip, self.skip + length)

    def _once(self) -> Iterator[Any]:
        """Yield all batches of one pass, so that each image counts once. Raises `DataError` for a wrong length."""
        announced = length_hint(self.loader, -1)
        batches = self._pass(0)
        batch = next(batches)
        for number in itertools.count(1):
            following = next(batches, None)
            if following is not None and number == announced:  # Lightning would stop here
                raise DataError(f"{self.name} says that it has {announced} batches, and has more; fix its __len__.")
            yield batch
            if following is None:
                return
            batch = following

    def _pass(self, number: int) -> Iterator[Any]:
        # A loader draws its order with its first batch; this seed makes the order independent of training.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.sequence.seed, "loader", self.task, self.epoch, number))
            batches = iter(self.loader)
            first = next(batches, None)
        if first is None:
            raise DataError(
                f"There is no batch in {self.name}: no image, or fewer than its batch_size with drop_last=True."
            )
        yield first
        yield from batches

    def _parts(self, batch: Any, number: int) -> tuple[Tensor, Tensor]:
        whose = f"Batch {number} of {self.name}"
        images, labels = image_and_label(batch, whose)
        if not isinstance(batch, Mapping) and num_ignored(batch) and not self.sequence.said:
            self.sequence.said = True
            logger.info("Of each batch the first two of %d parts are used, as images and labels.", len(batch))
        images = as_tensor(images, whose)
        first = self.sequence.types.setdefault(self.task, images.dtype)
        check_same("type", first, images.dtype, whose=f"task {self.task}", other=self.half)
        return images, labels_of_batch(labels, len(images), f"task {self.task} ({whose})")

    def _look(self, images: Tensor, labels: Tensor, number: int) -> None:
        check_numbers(images, lambda place: f"Image {place} of batch {number} of {self.name}")
        num_classes = self.sequence.num_classes[self.task]
        if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
            place = int(((labels < 0) | (labels >= num_classes)).nonzero()[0])
            raise DataError(
                f"Batch {number} of {self.name} has labels from {labels.min()} to {labels.max()} (image {place}: "
                f"{labels[place]}), where its {num_classes} classes are numbered from 0."
            )


def only_loader(loader: Any, whose: str) -> Any:
    """Return the only loader of a task. Raises `ConfigurationError` for several, or for an iterator (read once).

    Args:
        loader: what a data module returns: a loader, a list of one loader, or a list of batches.
        whose: name of the method that returned it, which begins an error message.
    """
    if isinstance(loader, (list, tuple)) and len(loader) == 1 and not isinstance(loader[0], (list, tuple, Mapping)):
        loader = loader[0]
    if not isinstance(loader, Iterable):
        raise ConfigurationError(f"{whose} returns {type(loader).__name__}; it has to return a DataLoader.")
    if isinstance(loader, Mapping) or (
        isinstance(loader, (list, tuple)) and not all(isinstance(batch, (list, tuple, Mapping)) for batch in loader)
    ):
        raise ConfigurationError(f"{whose} returns {len(loader)} loaders; a task has one.")
    if isinstance(loader, Iterator):
        raise ConfigurationError(
            f"{whose} returns an iterator ({type(loader).__name__}), which is read once, or several loaders in one; "
            "return a DataLoader."
        )
    return loader


def defines(module: L.LightningDataModule, name: str) -> bool:
    """Whether a data module's class, or the instance (as after `from_datasets`), overrides Lightning's method."""
    return getattr(getattr(module, name), "__func__", None) is not getattr(L.LightningDataModule, name)
