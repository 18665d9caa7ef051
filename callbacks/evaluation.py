"""Accuracy of all tasks learned so far, as learning goes on."""

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from supsup_lightning.checks.trainer_checks import task_data
from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.data.tasks import limited
from supsup_lightning.errors import ConfigurationError, as_whole
from supsup_lightning.report.metrics import TaskAccuracy

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


class EvaluateSeenTasks(L.Callback):
    """Fills the accuracy matrix: one row at each listed number of tasks, and the last row from the final test.

    In a stream that announces no task, a row is filled when a task's first block ends, with the masks as they were
    last committed; the learner does not notice.

    Args:
        eval_at: numbers of learned tasks after which all of them are tested, or as soon after as tasks that are trained
            at once are finished; ``all`` for after every task, which makes the cost quadratic in the number of tasks.

    Attributes:
        matrix: ``(tasks, tasks)`` float64: row ``n - 1`` after learning ``n`` tasks, one column per task; NaN where not
            evaluated. Of a part of the tasks (``data.task_shard``), its own tasks alone.
        seconds: what this has taken in the current epoch.
        task_found: share of images whose task was found, mean over tasks, when tasks were last tested in training.
    """

    def __init__(self, *, eval_at: Sequence[int] | str = "all") -> None:
        counts = [] if eval_at == "all" else eval_at
        if not isinstance(counts, Sequence) or not all((as_whole(count) or 0) >= 1 for count in counts):
            raise ConfigurationError(
                f"eval_at={eval_at!r} must be a list of numbers of learned tasks, from 1 on, such as [10,100], or all."
            )
        self.eval_at = eval_at
        self.matrix = torch.empty(0, 0, dtype=torch.float64)
        self.seconds = 0.0
        self.task_found: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create an empty matrix, unless a checkpoint or training has filled one."""
        if stage == "predict":
            return
        num_tasks = len(task_data(trainer, stage).task_numbers)
        if stage == "fit" and trainer.current_epoch == 0:
            self.matrix = self.matrix[:0, :0]  # of another training with the same callback
        if len(self.matrix) != num_tasks:
            self.matrix = torch.full((num_tasks, num_tasks), torch.nan, dtype=torch.float64)

    def on_train_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Fill the row of the last task before tasks were added, which only the final test had filled."""
        data = trainer.datamodule
        if trainer.ckpt_path is None or not pl_module.scenario.task_known_in_training:
            return
        times, epoch = data.timetable, trainer.current_epoch
        if epoch and times.ends_task(epoch - 1):
            learned = times.tasks(epoch - 1)
            if self.matrix[learned[-1] - times.first_task].isnan().all():
                self._evaluate(trainer, pl_module, range(times.first_task, learned[-1] + 1), new=len(learned))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restart the clock."""
        self.seconds = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "ContinualModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In an unannounced stream, test the tasks seen so far when the first block of a task ends."""
        data = trainer.datamodule
        if not pl_module.scenario.task_known_in_training:
            self._evaluate(trainer, pl_module, data.tasks_seen(data.step(trainer.current_epoch, batch_idx)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Test all finished tasks when a task ends."""
        data, epoch = trainer.datamodule, trainer.current_epoch
        if pl_module.scenario.task_known_in_training and data.timetable.ends_task(epoch):
            learned = data.timetable.tasks(epoch)
            tasks = range(data.task_numbers.start, learned[-1] + 1)
            self._evaluate(trainer, pl_module, tasks, new=len(learned))

    def _evaluate(self, trainer: L.Trainer, module: "ContinualModule", tasks: Collection[int], *, new: int = 1) -> None:
        """Test these tasks if ``eval_at`` lists their number, or a number that the ``new`` ones have passed."""
        passed = range(len(tasks) - new + 1, len(tasks) + 1)
        listed = self.eval_at == "all" or any(count in passed for count in self.eval_at)
        if not listed or not 0 < len(tasks) < len(trainer.datamodule.task_numbers) or not len(module.method.tasks):
            return
        started = perf_counter()
        with trainer.precision_plugin.test_step_context():  # as in the final test
            limit = trainer.limit_test_batches  # as in the final test
            accuracy, found = evaluate_tasks(module, trainer.datamodule, tasks, limit=limit).compute()
        self.matrix[len(tasks) - 1] = accuracy.cpu()
        self.task_found = found.nanmean().item()
        self.seconds += perf_counter() - started

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the matrix to the tested tasks if only the first tasks of a checkpoint are tested."""
        num_tasks = len(task_data(trainer, "test").task_numbers)
        self.matrix = self.matrix[:num_tasks, :num_tasks]

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Store the final test as the last row."""
        assert pl_module.test_accuracy is not None
        accuracy, _ = pl_module.test_accuracy.compute()
        self.matrix[-1] = accuracy.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Filled rows of the matrix; for thousands of tasks, the empty ones would be most of a checkpoint."""
        filled = (~self.matrix.isnan().all(1)).nonzero().flatten()
        return {"num_tasks": len(self.matrix), "filled": filled, "rows": self.matrix[filled]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the matrix from a checkpoint."""
        if "matrix" in state_dict:  # of older checkpoints
            stored = state_dict["matrix"]
            rows, filled = stored, torch.arange(len(stored))
        else:
            rows, filled = state_dict["rows"], state_dict["filled"]
        before = state_dict.get("num_tasks", rows.shape[1])
        num_tasks = max(before, len(self.matrix))  # more, if tasks were added
        self.matrix = torch.full((num_tasks, num_tasks), torch.nan, dtype=torch.float64)
        self.matrix[filled, :before] = rows


def evaluation_of(trainer: L.Trainer) -> EvaluateSeenTasks | None:
    """The trainer's `EvaluateSeenTasks`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, EvaluateSeenTasks)), None)


@torch.no_grad()
def evaluate_tasks(module: "ContinualModule", data: Any, tasks: Iterable[int], *, limit: float = 1.0) -> TaskAccuracy:
    """Test these tasks with the masks that there are now, by the rules of the module's scenario.

    Args:
        module: with its finished tasks.
        data: with their test images.
        tasks: to be tested.
        limit: of test batches, as a trainer's ``limit_test_batches``.
    """
    tested = data.task_numbers
    accuracy = TaskAccuracy(len(tested), first_task=tested.start).to(module.device)
    with in_mode(module, training=False):
        for task in tasks:
            loader = data.test_loader(task)
            for batch in islice(loader, None if limit == 1.0 and type(limit) is float else limited(len(loader), limit)):
                module.evaluate(batch, task=task, accuracy=accuracy)
    return accuracy
