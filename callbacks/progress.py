"""What is seen while a run goes on."""

from collections.abc import Mapping
from time import monotonic
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from supsup_lightning.module import ContinualModule

_SECONDS_BETWEEN_REFRESHES = 0.2


class TaskProgress(ProgressBar):
    """The task in training, its accuracy so far, tasks per minute and time left; a line for each finished task.

    On a terminal as a moving bar; where the output goes to a file, the lines alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console = Console()
        self._enabled = True
        self._progress: Progress | None = None
        self._bar: Any = None
        self._began = self._refreshed = 0.0
        self._first_epoch = 0

    def disable(self) -> None:
        """Called by Lightning in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Counterpart of `disable`."""
        self._enabled = True

    # Training.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar, from where a resumed run goes on."""
        self._first_epoch = trainer.current_epoch
        self._began = monotonic()
        self._open(trainer.datamodule.num_epochs, completed=self._first_epoch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: ContinualModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh a few times a second; between refreshes this costs nothing."""
        if self._progress is None or monotonic() - self._refreshed < _SECONDS_BETWEEN_REFRESHES:
            return
        data = trainer.datamodule
        epochs = trainer.current_epoch + (batch_idx + 1) / int(trainer.num_training_batches)
        accuracy = _batch_accuracy(pl_module, outputs)
        status = f"batch accuracy {accuracy:.3f}  {self._tasks_per_minute(data, epochs):.1f} tasks/min"
        task = data.task_of_epoch(trainer.current_epoch)
        self._update(epochs, f"training task {task + 1}/{data.num_tasks}", status)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One line for a finished task."""
        data = trainer.datamodule
        if not self._enabled or not data.ends_task(trainer.current_epoch):
            return
        task = data.task_of_epoch(trainer.current_epoch)
        rate = self._tasks_per_minute(data, trainer.current_epoch + 1)
        minutes_left = (data.num_tasks - task - 1) / rate
        validated = any(int(batches) for batches in trainer.num_val_batches)  # not: by an earlier task's figure
        accuracy = trainer.callback_metrics.get("val/accuracy") if validated else None
        line = f"task {task + 1}/{data.num_tasks}"
        line += f"  validation accuracy {accuracy:.4f}" if accuracy is not None else ""
        line += f"  {rate:.1f} tasks/min  {_clock(60 * minutes_left)} left"
        (self._progress.console if self._progress else self.console).print(line, highlight=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        self._close()

    # Test.

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show a bar for the final test."""
        self._began = monotonic()
        self._open(sum(int(batches) for batches in trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refresh a few times a second."""
        if self._progress is None or monotonic() - self._refreshed < _SECONDS_BETWEEN_REFRESHES:
            return
        batches = [int(number) for number in trainer.num_test_batches]
        done = sum(batches[:dataloader_idx]) + batch_idx + 1
        self._update(done, f"testing task {dataloader_idx + 1}/{len(batches)}", "")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    # Drawing.

    def _open(self, total: float, *, completed: float = 0) -> None:
        if self._enabled and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._bar = self._progress.add_task("", total=total, status="")
            self._progress.update(self._bar, completed=completed)
            self._progress.start()

    def _update(self, done: float, description: str, status: str) -> None:
        assert self._progress is not None
        self._refreshed = monotonic()
        self._progress.update(self._bar, completed=done, description=description, status=status)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _tasks_per_minute(self, data: Any, epochs_done: float) -> float:
        tasks = (epochs_done - self._first_epoch) / data.epochs_per_task
        return 60 * tasks / max(1e-9, monotonic() - self._began)


def _batch_accuracy(module: ContinualModule, outputs: Any) -> float:
    if not isinstance(outputs, Mapping) or module.current_task is None:
        return float("nan")
    return (module.classes(outputs["logits"], module.current_task) == outputs["labels"]).float().mean().item()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
