"""Stops a training that has diverged."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.errors import TrainingDiverged
from supsup_lightning.module import ContinualModule


class LossGuard(L.Callback):
    """Raises `TrainingDiverged`, naming task and step, before the mask of a diverged training is committed.

    That is: once a loss is NaN or infinite, or what is trained is, as a mask of NaN scores has a perfectly finite loss.

    Args:
        every_n_steps: they are looked at every so many steps, as each look makes an accelerator wait.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.losses: list[Tensor] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the losses of an epoch that was broken off."""
        self.losses.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: ContinualModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; look at the kept ones now and then, and after the epoch's last."""
        self.losses.append(outputs["loss"] if isinstance(outputs, Mapping) else outputs)
        if len(self.losses) < self.every_n_steps and not trainer.is_last_batch:
            return
        losses = torch.stack(self.losses)
        self.losses.clear()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            position = int(bad[0])
            step = batch_idx + 1 - len(losses) + position
            raise _diverged(trainer, f"The loss became {losses[position].item()}", step)
        if not all(parameter.isfinite().all() for parameter in pl_module.method.trainable()):
            raise _diverged(trainer, "The scores became NaN or infinite", batch_idx)


def _diverged(trainer: L.Trainer, what: str, batch: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what} {trainer.datamodule.place(trainer.current_epoch, batch)}. What was finished before is kept. Lower the "
        "learning rate (optimizer.lr) and start afresh."
    )
