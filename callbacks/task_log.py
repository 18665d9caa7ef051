"""Tells the loggers about each task, and about all tasks after each number of them."""

import json
import logging
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import Logger

from supsup_lightning.callbacks.evaluation import evaluation_of
from supsup_lightning.callbacks.results import WriteResults
from supsup_lightning.errors import SaveError
from supsup_lightning.files import replacing
from supsup_lightning.runs import tracking
from supsup_lightning.runs.tracking import LEARNED, TASK

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

logger = logging.getLogger(__name__)


class LogTasks(L.Callback):
    """Logs numbers of each task over its number, and the accuracy of all tasks over how many were learned.

    When a task is finished: ``task/validation_accuracy``, ``task/seconds`` of training, and ``task/bytes`` that are
    kept for all tasks so far. After the final test: ``task/accuracy`` and, where the task is hidden, ``task/found``.
    For each evaluated row of the accuracy matrix: ``learned/accuracy``, the mean over the tasks learned so far.

    A task is logged once the checkpoint that holds its numbers is written. A resumed run logs what is missing, so that
    no logger gets two values for one task.

    Args:
        folder: output directory, where a hidden file says what is logged; None for none, so that loggers other than W&B
            get the numbers of finished tasks again from a resumed run, unchanged.
    """

    def __init__(self, *, folder: str | Path | None = None) -> None:
        self.note = None if folder is None else Path(folder) / ".logged.json"
        self.kept_bytes: dict[int, int] = {}  # after each finished task
        self._resumed = False
        self._noted: dict[str, list[int]] = {}  # by kind of logger: tasks and rows of the matrix that it has had
        self._num_tasks = self._num_rows = 0  # that this process has come to

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out what an interrupted run has logged; a checkpoint, if there is one, is loaded afterwards."""
        if stage == "fit":
            self.kept_bytes, self._resumed, self._num_tasks, self._num_rows = {}, False, 0, 0
            self._noted = self._read_note()

    def on_train_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Log the counts of weights; forget what another run in this directory has logged."""
        if not trainer.is_global_zero:
            return
        self._resumed = trainer.ckpt_path is not None
        if not self._resumed and self.note is not None:
            self._noted = {}
            self.note.unlink(missing_ok=True)
        if trainer.loggers:
            counts = tracking.weight_counts(pl_module.method)
            for listener in trainer.loggers:
                tracking.define_axes(listener)
                tracking.log_once(listener, counts)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Log the tasks that the epoch before has finished; Lightning writes its checkpoint after all other hooks."""
        self._log_finished(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Count the bytes of finished tasks, for the checkpoint."""
        new = [task for task in pl_module.method.tasks.tolist() if task not in self.kept_bytes]
        if new and pl_module.scenario.task_known_in_training:
            self.kept_bytes |= dict.fromkeys(new, sum(pl_module.method.kept_bytes().values()))

    def on_train_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Log the last tasks."""
        self._log_finished(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Log the last tasks, if the run was interrupted after its last checkpoint."""
        if trainer.is_global_zero:
            for listener in trainer.loggers:
                tracking.define_axes(listener)
        self._log_finished(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Log the accuracy of each task in the final test, and the accuracy matrix as a table."""
        if not trainer.is_global_zero or not trainer.loggers:
            return
        self._log_rows(trainer)
        assert pl_module.test_accuracy is not None
        results = _results_of(trainer)
        # Without announced tasks, none is finished before the end.
        seconds = {} if results is None or pl_module.scenario.task_known_in_training else results.seconds
        tested = pl_module.tested_tasks
        for task, (accuracy, found) in zip(tested, pl_module.test_accuracy.compute().T.tolist(), strict=True):
            values = {"task/accuracy": accuracy}
            if not pl_module.scenario.task_known_at_inference:
                values["task/found"] = found
            if task in seconds:
                values["task/seconds"] = seconds[task]
            self._log(trainer, values, TASK, task)
        evaluation = evaluation_of(trainer)
        cells = [] if evaluation is None else tracking.matrix_cells(evaluation.matrix, first_task=tested.start)
        for listener in trainer.loggers:
            columns = ("tasks_learned", "task", "accuracy")
            tracking.log_table(listener, "accuracy_matrix", columns=columns, rows=cells)
            if pl_module.test_confusion is not None:
                columns = ("task", "inferred_task", "images")
                rows = pl_module.test_confusion.compute().tolist()
                tracking.log_table(listener, "task_confusion", columns=columns, rows=rows)
            listener.save()

    def state_dict(self) -> dict[str, Any]:
        """Bytes after each finished task, for checkpoints."""
        return {"kept_bytes": self.kept_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint, of which there may be the test alone to run."""
        self.kept_bytes = state_dict["kept_bytes"]
        self._resumed = True

    def _log_finished(self, trainer: L.Trainer, module: "ContinualModule") -> None:
        """Log the finished tasks and evaluated rows that are not logged yet, in the first process."""
        if not trainer.is_global_zero or not trainer.loggers:
            return
        before = self._num_tasks, self._num_rows
        if module.scenario.task_known_in_training:
            results = _results_of(trainer)
            known: dict[str, Mapping[int, float]] = {"task/bytes": self.kept_bytes}
            if results is not None:
                known |= {"task/validation_accuracy": results.validation, "task/seconds": results.seconds}
            for task in module.method.tasks.tolist()[self._num_tasks :]:
                values = {name: by_task[task] for name, by_task in known.items() if task in by_task}
                self._log(trainer, values, TASK, task)
                self._num_tasks += 1
        self._log_rows(trainer)
        if before != (self._num_tasks, self._num_rows):
            for listener in trainer.loggers:
                listener.save()  # CSV files keep their last rows in memory otherwise
            self._write_note(trainer)

    def _log_rows(self, trainer: L.Trainer) -> None:
        """Log the mean of each row of the accuracy matrix that is not logged yet."""
        evaluation = evaluation_of(trainer)
        if evaluation is None:
            return
        for row in range(self._num_rows, len(evaluation.matrix)):
            if not evaluation.matrix[row].isnan().all():
                mean = evaluation.matrix[row].nanmean().item()
                self._log(trainer, {"learned/accuracy": mean}, LEARNED, row + 1)
                self._num_rows = row + 1

    def _log(self, trainer: L.Trainer, values: Mapping[str, float], axis: str, number: int) -> None:
        for listener in trainer.loggers:
            before = self._logged_before(listener)
            new = {
                name: value
                for name, value in values.items()
                if value == value and number not in before.get(name, ())  # NaN: without images
            }
            if new:
                tracking.log_on_axis(listener, new, axis=axis, number=number, step=trainer.global_step)

    def _logged_before(self, listener: Logger) -> Mapping[str, Container[int]]:
        """Numbers on the axis for which a logger of a resumed run has a value already, by the name of the value."""
        if not self._resumed:
            return {}
        if hasattr(listener, "logged_before"):  # W&B, which loses its last seconds when a run is killed
            return listener.logged_before
        tasks, rows = self._noted.get(type(listener).__name__, (0, 0))
        names = ("task/bytes", "task/validation_accuracy", "task/seconds")
        return {**dict.fromkeys(names, range(tasks)), "learned/accuracy": range(rows + 1)}

    def _read_note(self) -> dict[str, list[int]]:
        if self.note is None or not self.note.exists():
            return {}
        try:
            return {
                str(kind): [int(tasks), int(rows)] for kind, (tasks, rows) in json.loads(self.note.read_text()).items()
            }
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning("%s is damaged (%s): finished tasks are logged again, unchanged.", self.note, error)
            return {}

    def _write_note(self, trainer: L.Trainer) -> None:
        if self.note is None:
            return
        noted = self._noted | {
            type(listener).__name__: [self._num_tasks, self._num_rows] for listener in trainer.loggers
        }
        try:
            with replacing(self.note) as temporary:
                temporary.write_text(json.dumps(noted))
        except SaveError as error:  # of loggers alone
            logger.warning("%s A resumed run may log tasks again, unchanged.", error)


def _results_of(trainer: L.Trainer) -> WriteResults | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, WriteResults)), None)
