"""Stops training that has diverged."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.data.values import are_numbers
from supsup_lightning.errors import DataError, TrainingDiverged

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


class LossGuard(L.Callback):
    """Raises `TrainingDiverged` with task and step before the mask of a diverged task is stored.

    That is: once a loss is NaN or infinite, or what is trained is, as a mask of NaN scores has a perfectly finite loss.

    Args:
        every_n_steps: they are looked at every so many steps, as each look makes an accelerator wait.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.losses: list[Tensor] = []
        self.numbers: list[Tensor] = []  # whether each batch's images are

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear the losses of an interrupted epoch."""
        self.losses.clear()
        self.numbers.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "ContinualModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; check the kept ones every ``every_n_steps`` steps and at the end of the epoch."""
        self.losses.append(outputs["loss"] if isinstance(outputs, Mapping) else outputs)
        self.numbers.append(are_numbers(batch[0]))
        if len(self.losses) < self.every_n_steps and not trainer.is_last_batch:
            return
        losses, numbers = torch.stack(self.losses), torch.stack(self.numbers)
        self.losses.clear()
        self.numbers.clear()
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if not bad and all(parameter.isfinite().all() for parameter in pl_module.method.trainable()):
            return
        first = batch_idx + 1 - len(losses)
        no_numbers = (~numbers).nonzero().flatten().tolist()
        if no_numbers:  # then no learning rate helps
            place = trainer.datamodule.place(trainer.current_epoch, first + no_numbers[0])
            raise DataError(f"The images of the batch {place} hold a NaN or an infinite value; fix the data.")
        if bad:
            raise _diverged(trainer, f"The loss became {losses[bad[0]].item()}", first + bad[0])
        raise _diverged(trainer, "The scores became NaN or infinite", batch_idx)


def _diverged(trainer: L.Trainer, what: str, batch: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what} {trainer.datamodule.place(trainer.current_epoch, batch)}, from images without NaN or infinite values. "
        "What was finished before is kept. Lower the learning rate (optimizer.lr) and start afresh."
    )
