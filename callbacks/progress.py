"""Progress bar and per-task log lines."""

from collections.abc import Mapping
from math import isfinite
from time import monotonic
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console

from supsup_lightning.callbacks.bars import Bar, NoBar, bar_for
from supsup_lightning.callbacks.evaluation import evaluation_of
from supsup_lightning.callbacks.task_boundary import boundary_of
from supsup_lightning.callbacks.task_discovery import discovery_of
from supsup_lightning.report.summary import num_masks

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


class TaskProgress(ProgressBar):
    """Shows task, step, accuracy, tasks found, masks and time left in a bar, and prints a line per finished task.

    Where nothing announces tasks, a line for each that is discovered, and one for each epoch. On a terminal one moving
    bar, in a notebook one bar per task; where the output goes to a file, the lines alone.

    Args:
        refresh_seconds: time between two changes of the bar, at least.
    """

    def __init__(self, *, refresh_seconds: float = 0.2) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.console = Console()
        self._enabled = True
        self._bar: Bar | None = None
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
        if self._bar is None or monotonic() - self._refreshed < self.refresh_seconds:
            return
        data, epoch, batches = trainer.datamodule, trainer.current_epoch, int(trainer.num_training_batches)
        epochs = epoch + (batch_idx + 1) / batches
        status = [f"accuracy {_batch_accuracy(pl_module, outputs):.3f}", *_found(trainer, pl_module)]
        if pl_module.scenario.task_known_in_training:
            tasks, of_task = data.timetable.tasks(epoch), data.timetable.epochs_of_task
            last = f" to {tasks[-1] + 1}" if len(tasks) > 1 else ""
            description = f"training task{'s' if last else ''} {tasks[0] + 1}{last}/{data.num_tasks}"
            step, steps = epoch % of_task * batches + batch_idx + 1, of_task * batches
        else:
            description = f"training task {pl_module.method.live.task}"
            step, steps = data.step(epoch, batch_idx) + 1, data.num_steps
        status = [f"{step}/{steps} steps", *status, _discovered(pl_module)]
        self._update(epochs, description, "  ".join(status), share=step / steps)

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
        minutes_left = (data.task_numbers.stop - data.timetable.tasks(trainer.current_epoch)[-1] - 1) / rate
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
        pl_module: "ContinualModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refresh the bar a few times per second."""
        if self._bar is None or monotonic() - self._refreshed < self.refresh_seconds:
            return
        batches = _test_batches(trainer)
        done = sum(batches[:dataloader_idx]) + batch_idx + 1
        number = pl_module.tested_tasks[dataloader_idx] + 1
        description = f"testing task {number}/{trainer.datamodule.num_tasks}"
        self._update(done, description, "", share=(batch_idx + 1) / batches[dataloader_idx])

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bar, so that the error is readable."""
        self._close()

    # Drawing.

    def _open(self, total: float, *, completed: float = 0) -> None:
        if self._enabled:
            self._bar = bar_for(self.console, total=total, completed=completed)

    def _print(self, line: str) -> None:
        (self._bar or NoBar(self.console)).print(line)

    def _update(self, done: float, description: str, status: str, *, share: float) -> None:
        assert self._bar is not None
        self._refreshed = monotonic()
        self._bar.update(done, description=description, status=status, share=share)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _tasks_per_minute(self, data: Any, epochs_done: float) -> float:
        tasks = data.tasks_at_once * (epochs_done - self._first_epoch) / data.timetable.epochs_of_task
        return 60 * tasks / max(1e-9, monotonic() - self._began)


def _batch_accuracy(module: "ContinualModule", outputs: Any) -> float:
    if not isinstance(outputs, Mapping) or not module.method.live.tasks:
        return float("nan")
    return module.batch_accuracy(outputs["logits"], outputs["labels"]).item()


def _found(trainer: L.Trainer, module: "ContinualModule") -> list[str]:
    """Share of test inputs whose task was found when the tasks so far were last tested."""
    evaluation = evaluation_of(trainer)
    known = module.scenario.task_known_at_inference or evaluation is None or evaluation.task_found is None
    return [] if known else [f"found {evaluation.task_found:.3f}"]  # type: ignore[union-attr]


def _discovered(module: "ContinualModule") -> str:
    tasks = len(module.method.tasks)
    masks = num_masks(module.method)
    combined = f" and {tasks - masks} combinations" if tasks > masks else ""
    return f"{masks} mask{'s' if masks != 1 else ''}{combined}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _test_batches(trainer: L.Trainer) -> list[int]:
    """Number of test batches of each task; 1 where its loader has no length."""
    return [int(number) if isfinite(number) else 1 for number in trainer.num_test_batches]
