"""Pictures of a finished run."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from supsup_lightning import figures
from supsup_lightning.callbacks.evaluation import accuracy_matrix


class DrawFigures(L.Callback):
    """Draws ``accuracy_matrix.png`` after the final test, and hands it to Weights & Biases where that listens.

    Args:
        folder: where pictures go.
    """

    def __init__(self, *, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, in the first process."""
        matrix = accuracy_matrix(trainer)
        if not trainer.is_global_zero or matrix is None:
            return
        path = figures.accuracy_matrix(matrix, self.folder / "accuracy_matrix.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("accuracy_matrix", [str(path)])
