"""Records how masks are recovered from a Hopfield memory, step by step and over the whole test."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.inference import HopfieldRecovery
from supsup_lightning.methods.protocols import RecoversMasks, require
from supsup_lightning.report import records
from supsup_lightning.report.metrics import RecoveryStatistics

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

# Of more, loggers would get a hundred curves and more.
_MOST_LOGGED_MASKS = 10


class RecordRecovery(L.Callback):
    """Counts test batches that recover their task's mask, and records each step for the first batch of a task.

    Writes ``recovery.csv``: task, step, energy, objective, and the distance to each stored mask. Tells the loggers
    the same by step, where there are more than ten masks with the distance to the task's own alone.

    Args:
        folder: where the file goes; None for none.

    Attributes:
        traces: of the first batch of each task, ``(steps + 1, 2 + tasks)``: energy, objective, and distances.
        statistics: over all batches.
    """

    def __init__(self, *, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.traces: dict[int, Tensor] = {}
        self.statistics: RecoveryStatistics | None = None

    def on_test_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Reset all counts."""
        self.traces.clear()
        self.statistics = RecoveryStatistics().to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: "ContinualModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch; keep each step of a task's first batch."""
        inference, method = pl_module.inference, require(pl_module.method, RecoversMasks)
        assert isinstance(inference, HopfieldRecovery)
        assert self.statistics is not None
        if inference.last is None or not len(batch[1]):
            return
        recovery, confidence = inference.last
        masks = method.reference_masks()  # (k, weights); none if they are unknown
        task = pl_module.tested_tasks[dataloader_idx]
        place = pl_module.method.tasks.tolist().index(task)
        own = recovery.distances(masks[place : place + 1])[:, 0] if len(masks) else None
        self.statistics.update(own, confidence=confidence)
        if task not in self.traces:
            values = torch.stack([recovery.energy, recovery.loss], dim=1)  # (steps + 1, 2)
            distances = recovery.distances(masks)
            self.traces[task] = torch.cat([values, distances.to(values.dtype)], dim=1).cpu()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Sum the counts over all processes."""
        assert self.statistics is not None
        self.statistics.compute()

    def on_test_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Write and log the recorded steps, in the first process."""
        if not trainer.is_global_zero:
            return
        if self.folder is not None:
            self._write(self.folder / "recovery.csv")
        for logger in trainer.loggers:
            for task, trace in self.traces.items():
                for step, row in enumerate(trace):
                    values = {"energy": row[0], "objective": row[1]}
                    distances = row[2:]
                    for mask in range(len(distances)) if len(distances) <= _MOST_LOGGED_MASKS else [task]:
                        values[f"distance_{mask}"] = distances[mask]
                    shown = {f"recovery/task_{task}/{name}": value.item() for name, value in values.items()}
                    logger.log_metrics(shown, step=step)

    def results(self) -> dict[str, Any] | None:
        """Counts of the last test; None before one."""
        return None if self.statistics is None else self.statistics.compute()

    def _write(self, path: Path) -> None:
        num_masks = max((trace.shape[1] - 2 for trace in self.traces.values()), default=0)
        columns = ("task", "step", "energy", "objective", *(f"distance_{mask}" for mask in range(num_masks)))
        rows = [
            (task, step, f"{energy:.3f}", f"{objective:.6f}", *map(int, distances))
            for task, trace in self.traces.items()
            for step, (energy, objective, *distances) in enumerate(trace.tolist())
        ]
        records.write_rows(path, columns, rows)


def recovery_of(trainer: L.Trainer) -> RecordRecovery | None:
    """The trainer's `RecordRecovery`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, RecordRecovery)), None)
