"""Progress bar and per-task log lines."""

from collections.abc import Mapping
from math import isfinite
from time import monotonic
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from supsup_lightning.callbacks.task_boundary import boundary_of
from supsup_lightning.callbacks.task_discovery import discovery_of
from supsup_lightning.report.summary import num_masks

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

_SECONDS_BETWEEN_REFRESHES = 0.2


class TaskProgress(ProgressBar):
    """Shows task, accuracy, tasks per minute and time left in a progress bar, and prints a line per finished task.

    Where nothing announces tasks, a line for each that is discovered, and one for each epoch. On a terminal as a moving
    bar; where the output goes to a file, the lines alone.
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
        """Disable the bar; Lightning calls this in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Enable the bar."""
        self._enabled = True

    # Training.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar, starting at the resumed position."""
        self._first_epoch = trainer.current_epoch
        self._began = monotonic()
        self._open(trainer.datamodule.num_epochs, completed=self._first_epoch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "ContinualModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh the bar a few times per second."""
        if self._progress is None or monotonic() - self._refreshed < _SECONDS_BETWEEN_REFRESHES:
            return
        epochs = trainer.current_epoch + (batch_idx + 1) / int(trainer.num_training_batches)
        accuracy = f"batch accuracy {_batch_accuracy(pl_module, outputs):.3f}"
        if pl_module.scenario.task_known_in_training:
            data = trainer.datamodule
            tasks = data.timetable.tasks(trainer.current_epoch)
            last = f" to {tasks[-1] + 1}" if len(tasks) > 1 else ""
            description = f"training task{'s' if last else ''} {tasks[0] + 1}{last}/{data.num_tasks}"
            self._update(epochs, description, f"{accuracy}  {self._tasks_per_minute(data, epochs):.1f} tasks/min")
        else:
            self._update(epochs, f"training task {pl_module.method.live.task}", f"{accuracy}  {_discovered(pl_module)}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Print one line per finished task, or per epoch of an unannounced stream."""
        if not self._enabled:
            return
        if not pl_module.scenario.task_known_in_training:
            self._print_epoch(trainer, pl_module)
            return
        epoch, times = trainer.current_epoch, trainer.datamodule.timetable
        tasks = times.tasks(epoch)
        search = pl_module.method.details().get("sparsity_search")
        if search is not None and times.ends_trial(epoch):
            sparsity, accuracy = search["tried"][str(tasks[0])][-1]
            self._print(
                f"task {tasks[0] + 1}/{trainer.datamodule.num_tasks}  tried sparsity {sparsity}: {accuracy:.4f}"
            )
        if times.ends_task(epoch):
            counted = pl_module.validation_accuracy
            accuracies = [float("nan")] * len(tasks) if counted is None else counted.compute()[0].tolist()
            for task, accuracy in zip(tasks, accuracies, strict=True):
                said = f"  validation accuracy {accuracy:.4f}" if accuracy == accuracy else ""
                if trainer.datamodule.patience is not None and (boundary := boundary_of(trainer)) is not None:
                    epochs, best = boundary.patience.finished[task]
                    said = f"  validation accuracy {best:.4f}  {epochs}/{times.epochs_of_task} epochs"
                if search is not None:
                    said = f"  kept sparsity {search['chosen'][str(task)]}"
                self._print_task(trainer, task, said)

    def _print_task(self, trainer: L.Trainer, task: int, said: str) -> None:
        data = trainer.datamodule
        rate = self._tasks_per_minute(data, trainer.current_epoch + 1)
        minutes_left = (data.num_tasks - data.timetable.tasks(trainer.current_epoch)[-1] - 1) / rate
        self._print(f"task {task + 1}/{data.num_tasks}{said}  {rate:.1f} tasks/min  {_clock(60 * minutes_left)} left")

    def _print_epoch(self, trainer: L.Trainer, module: "ContinualModule") -> None:
        data, discovery = trainer.datamodule, discovery_of(trainer)
        begun = data.step(trainer.current_epoch, 0)
        for decision in discovery.decisions if discovery is not None else ():
            if decision.step >= begun and decision.action not in ("go on", "switch"):
                judged = decision.statistic == decision.statistic  # not NaN
                why = f" ({decision.statistic:.3f} against {decision.threshold:.3f})" if judged else ""
                self._print(f"batch {decision.step}: task {decision.task}, {decision.action}{why}")
        done = trainer.current_epoch + 1
        seconds_left = (monotonic() - self._began) / (done - self._first_epoch) * (data.num_epochs - done)
        batches = min(data.step(done, 0), data.num_steps)
        self._print(f"{batches}/{data.num_steps} batches  {_discovered(module)}  {_clock(seconds_left)} left")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar."""
        self._close()

    # Test.

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show a bar for the final test."""
        self._began = monotonic()
        self._open(sum(_test_batches(trainer)))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refresh the bar a few times per second."""
        if self._progress is None or monotonic() - self._refreshed < _SECONDS_BETWEEN_REFRESHES:
            return
        batches = _test_batches(trainer)
        done = sum(batches[:dataloader_idx]) + batch_idx + 1
        self._update(done, f"testing task {dataloader_idx + 1}/{len(batches)}", "")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bar, so that the error is readable."""
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

    def _print(self, line: str) -> None:
        (self._progress.console if self._progress else self.console).print(line, highlight=False)

    def _update(self, done: float, description: str, status: str) -> None:
        assert self._progress is not None
        self._refreshed = monotonic()
        self._progress.update(self._bar, completed=done, description=description, status=status)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _tasks_per_minute(self, data: Any, epochs_done: float) -> float:
        tasks = data.tasks_at_once * (epochs_done - self._first_epoch) / data.timetable.epochs_of_task
        return 60 * tasks / max(1e-9, monotonic() - self._began)


def _batch_accuracy(module: "ContinualModule", outputs: Any) -> float:
    if not isinstance(outputs, Mapping) or not module.method.live.tasks:
        return float("nan")
    return module.batch_accuracy(outputs["logits"], outputs["labels"]).item()


def _discovered(module: "ContinualModule") -> str:
    tasks = len(module.method.tasks)
    masks = num_masks(module.method)
    combined = f" and {tasks - masks} combinations" if tasks > masks else ""
    return f"{masks} mask{'s' if masks != 1 else ''}{combined} so far"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _test_batches(trainer: L.Trainer) -> list[int]:
    """Number of test batches of each task; 1 where its loader has no length."""
    return [int(number) if isfinite(number) else 1 for number in trainer.num_test_batches]
