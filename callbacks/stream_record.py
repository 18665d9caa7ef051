"""Records the true task of each training batch beside the task that it trained, for reports."""

from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L

from supsup_lightning.report.metrics import TaskAssignment

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


class Stretch(NamedTuple):
    """Consecutive batches of one true task that trained the same task of the learner.

    Attributes:
        first: step of the stream.
        true_task: the stream's number.
        task: the learner's number.
    """

    first: int
    true_task: int
    task: int


class RecordStream(L.Callback):
    """Records which task of the learner each batch of an unannounced stream trained.

    Attributes:
        stretches: all of them, in order.
        num_steps: batches so far.
    """

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self.num_steps = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "ContinualModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the true task of the batch."""
        data = trainer.datamodule
        step = data.step(trainer.current_epoch, batch_idx)
        true, task = data.true_task(step), pl_module.method.live.task
        if not self.stretches or self.stretches[-1][1:] != (true, task):
            self.stretches.append(Stretch(step, true, task))
        self.num_steps = step + 1

    def assignment(self) -> TaskAssignment:
        """Agreement between the learner's tasks and the true ones."""
        metric = TaskAssignment()
        ends = [*(stretch.first for stretch in self.stretches[1:]), self.num_steps]
        for stretch, end in zip(self.stretches, ends, strict=True):
            metric.update(stretch.task, stretch.true_task, batches=end - stretch.first)
        return metric

    def state_dict(self) -> dict[str, Any]:
        """Into checkpoints."""
        return {
            "stretches": [tuple(stretch) for stretch in self.stretches],
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.stretches = [Stretch(*stretch) for stretch in state_dict["stretches"]]
        self.num_steps = state_dict["num_steps"]


def record_of_stream(trainer: L.Trainer) -> RecordStream | None:
    """The trainer's `RecordStream`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, RecordStream)), None)
