"""Stops a training that has diverged."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.errors import TrainingDiverged


class LossGuard(L.Callback):
    """Raises `TrainingDiverged`, naming task and step, once a loss is NaN or infinite and before its mask is committed.

    Args:
        every_n_steps: losses are looked at so many at once, as each look makes an accelerator wait.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.losses: list[Tensor] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the losses of an epoch that was broken off."""
        self.losses.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; look at the kept ones now and then, and after the epoch's last."""
        self.losses.append(outputs["loss"] if isinstance(outputs, Mapping) else outputs)
        if len(self.losses) < self.every_n_steps and not trainer.is_last_batch:
            return
        losses = torch.stack(self.losses)
        self.losses.clear()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            data = trainer.datamodule
            position = int(bad[0])
            step = (trainer.current_epoch % data.epochs_per_task) * data.steps_per_epoch
            step += batch_idx + 1 - len(losses) + position
            task = data.task_of_epoch(trainer.current_epoch)
            raise TrainingDiverged(
                f"The loss became {losses[position].item()} in task {task} at its step {step}. The {task} tasks "
                "before it are kept. Lower the learning rate (optimizer.lr) and start afresh."
            )
