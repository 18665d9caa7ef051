"""Pictures of a finished run."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from supsup_lightning.callbacks.evaluation import evaluation_of
from supsup_lightning.callbacks.recovery import recovery_of
from supsup_lightning.callbacks.stream_record import record_of_stream
from supsup_lightning.callbacks.task_discovery import discovery_of
from supsup_lightning.report import plots


class DrawFigures(L.Callback):
    """Draws pictures after the final test, and logs them to Weights & Biases if it is in use.

    ``accuracy_matrix.png``; of a stream that announces no task also ``stream.png``; where masks come out of a Hopfield
    memory also ``recovery.png``.

    Args:
        folder: where pictures go.
    """

    def __init__(self, *, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the pictures in the first process."""
        if not trainer.is_global_zero:
            return
        paths = []
        if (evaluation := evaluation_of(trainer)) is not None:
            paths.append(plots.accuracy_matrix(evaluation.matrix, self.folder / "accuracy_matrix.png"))
        record, discovery = record_of_stream(trainer), discovery_of(trainer)
        if record is not None and discovery is not None and record.stretches:
            path = self.folder / "stream.png"
            paths.append(plots.stream(record.stretches, discovery.decisions, num_steps=record.num_steps, path=path))
        recovered = recovery_of(trainer)
        if recovered is not None and recovered.traces:
            paths.append(plots.recovery(recovered.traces, path=self.folder / "recovery.png"))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for path in paths:
                    logger.log_image(path.stem, [str(path)])
