"""Pictures of a finished run."""

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L

from supsup_lightning.callbacks.evaluation import evaluation_of
from supsup_lightning.callbacks.recovery import recovery_of
from supsup_lightning.callbacks.stream_record import record_of_stream
from supsup_lightning.callbacks.task_discovery import discovery_of
from supsup_lightning.report import drawing, plots
from supsup_lightning.runs import tracking

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


class DrawFigures(L.Callback):
    """Draws pictures after the final test, and shows them to W&B and TensorBoard.

    ``accuracy_matrix.png``; ``task_confusion.png`` if the task is hidden in the test; ``stream.png`` if it is hidden in
    training; ``recovery.png`` if masks come from a Hopfield memory.

    Args:
        folder: where pictures go.
    """

    def __init__(self, *, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_test_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Draw the pictures in the first process."""
        if not trainer.is_global_zero:
            return
        figures = {}
        if (evaluation := evaluation_of(trainer)) is not None:
            first_task = pl_module.tested_tasks.start
            figures["accuracy_matrix"] = plots.accuracy_matrix(evaluation.matrix, first_task=first_task)
        if pl_module.test_confusion is not None:
            counts = pl_module.test_confusion.compute().cpu().numpy()
            tested = pl_module.tested_tasks
            figures["task_confusion"] = plots.task_confusion(counts, num_tasks=len(tested), first_task=tested.start)
        record, discovery = record_of_stream(trainer), discovery_of(trainer)
        if record is not None and discovery is not None and record.stretches:
            figures["stream"] = plots.stream(record.stretches, discovery.decisions, num_steps=record.num_steps)
        recovered = recovery_of(trainer)
        if recovered is not None and recovered.traces:
            figures["recovery"] = plots.recovery(recovered.traces)
        paths = [drawing.save(figure, self.folder / f"{name}.png") for name, figure in figures.items()]
        for logger in trainer.loggers:
            for path in paths:
                tracking.log_picture(logger, path, step=trainer.global_step)
