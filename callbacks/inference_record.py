"""Records what an inference goes by, for the first test images of some tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.report import records

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

_MOST_TASKS = 10


class RecordInference(L.Callback):
    """Records what `Inference.evidence` says for every task: ``-dO/da`` at equal coefficients, or the log posterior.

    Up to ten tasks are recorded, evenly spaced, each with the images of its first test batch that decide for it: the
    first ``inference.images``, and the first one for ``each``. Inferences without evidence are not recorded.

    Writes ``inference.csv``: true task, task asked about, and the evidence (``gain`` or ``log_posterior``).

    Args:
        folder: where the file goes; None for none.

    Attributes:
        evidence: by true task, ``(k,)`` float, in the order of ``method.tasks``.
    """

    def __init__(self, *, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.evidence: dict[int, Tensor] = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier test."""
        self.evidence.clear()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: "ContinualModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the first batch of some tasks."""
        inference, method, images = pl_module.inference, pl_module.method, batch[0]
        every = -(-len(trainer.num_test_batches) // _MOST_TASKS)
        if batch_idx or dataloader_idx % every or pl_module.scenario.task_known_at_inference or not len(images):
            return
        if not inference.evidence_name:
            return
        several = getattr(inference, "images", "batch")
        number = {"each": 1, "batch": len(images)}.get(several, several)
        with torch.autocast(images.device.type, enabled=False):  # as for the inference itself
            deciding = images[:number].float() if images.is_floating_point() else images[:number]
            found = inference.evidence(method, deciding, max(pl_module.num_classes))
        self.evidence[pl_module.tested_tasks[dataloader_idx]] = found.cpu()

    def on_test_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Write the file, in the first process."""
        if trainer.is_global_zero and self.folder is not None and self.evidence:
            tasks = pl_module.method.tasks.tolist()
            rows = [
                (true, task, f"{value:.6g}")
                for true, gain in self.evidence.items()
                for task, value in zip(tasks, gain.tolist(), strict=True)
            ]
            name = pl_module.inference.evidence_name
            records.write_rows(self.folder / "inference.csv", ("task", "asked_about", name), rows)
