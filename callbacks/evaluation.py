"""Accuracy of all tasks learned so far, as learning goes on."""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.metrics import TaskAccuracy
from supsup_lightning.module import ContinualModule, in_mode


class EvaluateSeenTasks(L.Callback):
    """Fills the accuracy matrix: a row at each listed number of tasks, and the last row from the final test.

    Args:
        eval_at: numbers of learned tasks after which all of them are tested; ``all`` for after every task,
            which makes the cost quadratic in the number of tasks.

    Attributes:
        matrix: ``(tasks, tasks)`` float64: row ``n - 1`` after learning ``n`` tasks, column a task; NaN where not
            evaluated.
    """

    def __init__(self, *, eval_at: Sequence[int] | str = "all") -> None:
        counts = [] if eval_at == "all" else eval_at
        if not isinstance(counts, Sequence) or not all(type(count) is int and count >= 1 for count in counts):
            raise ConfigurationError(
                f"eval_at={eval_at!r} must be a list of numbers of learned tasks, from 1 on, such as [10,100], or all."
            )
        self.eval_at = eval_at
        self.matrix = torch.empty(0, 0, dtype=torch.float64)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """An empty matrix, unless there is one from a checkpoint or from training."""
        num_tasks = trainer.datamodule.num_tasks
        if len(self.matrix) != num_tasks:
            self.matrix = torch.full((num_tasks, num_tasks), torch.nan, dtype=torch.float64)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """Test all finished tasks, if their number is listed."""
        data = trainer.datamodule
        learned = data.task_of_epoch(trainer.current_epoch) + 1
        listed = self.eval_at == "all" or learned in self.eval_at
        if data.ends_task(trainer.current_epoch) and listed and learned < data.num_tasks:
            with trainer.precision_plugin.test_step_context():  # as in the final test
                accuracy, _ = evaluate_tasks(pl_module, data, range(learned)).compute()
            self.matrix[learned - 1] = accuracy.cpu()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """The final test is the last row."""
        assert pl_module.test_accuracy is not None
        accuracy, _ = pl_module.test_accuracy.compute()
        self.matrix[-1] = accuracy.cpu()

    def state_dict(self) -> dict[str, Any]:
        """The matrix goes into checkpoints."""
        return {"matrix": self.matrix}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The matrix comes back from a checkpoint."""
        self.matrix = state_dict["matrix"]


def accuracy_matrix(trainer: L.Trainer) -> torch.Tensor | None:
    """The matrix of the trainer's `EvaluateSeenTasks`, if it has one."""
    return next((c.matrix for c in trainer.callbacks if isinstance(c, EvaluateSeenTasks)), None)


@torch.no_grad()
def evaluate_tasks(module: ContinualModule, data: Any, tasks: Iterable[int]) -> TaskAccuracy:
    """Test these tasks with the masks that there are now, by the rules of the module's scenario."""
    accuracy = TaskAccuracy(data.num_tasks).to(module.device)
    with in_mode(module, training=False):
        for task in tasks:
            for batch in data.test_loader(task):
                module.evaluate(batch, task=task, accuracy=accuracy)
    return accuracy
