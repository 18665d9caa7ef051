"""Times a run, and writes down what it found."""

import logging
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from rich.console import Console

from supsup_lightning import report
from supsup_lightning.callbacks.evaluation import evaluation_of
from supsup_lightning.callbacks.recovery import recovery_of
from supsup_lightning.callbacks.stream_record import record_of_stream
from supsup_lightning.callbacks.task_boundary import boundary_of
from supsup_lightning.errors import SaveError
from supsup_lightning.files import set_aside
from supsup_lightning.module import ContinualModule
from supsup_lightning.trainer_checks import shortened

logger = logging.getLogger(__name__)


class WriteResults(L.Callback):
    """Writes the mask bank when training ends or breaks off, and after the final test results.json and the matrix.

    Args:
        folder: the output directory.
        run: what results.json says of the run itself: the names of scenario, data, network, method; the seed.
    """

    def __init__(self, *, folder: str | Path, run: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.run = dict(run or {})
        self.seconds: dict[int, float] = {}  # of training, by task
        self.test_seconds: list[float] = []
        self._started = 0.0
        self._training_began = False

    @property
    def bank_path(self) -> Path:
        """Of the mask bank."""
        return self.folder / "mask_bank.safetensors"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set aside what an earlier run of the same directory left; a resumed run goes on with it."""
        self._training_began = True
        if trainer.is_global_zero and trainer.ckpt_path is None:
            for name in ("results.json", "accuracy_matrix.csv", "mask_bank.safetensors", "checkpoints/last.ckpt"):
                set_aside(self.folder / name)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop the clock after an epoch's last batch, so that validation and evaluation do not count."""
        if trainer.is_last_batch:
            _wait_for_accelerator()
            evaluation = evaluation_of(trainer)
            seconds = perf_counter() - self._started - (evaluation.seconds if evaluation is not None else 0.0)
            for task, share in trainer.datamodule.true_tasks(trainer.current_epoch).items():
                self.seconds[task] = self.seconds.get(task, 0.0) + share * seconds

    def on_train_end(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """Write the bank."""
        self._save_bank(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: ContinualModule, exception: BaseException) -> None:
        """Keep the finished masks of a training that broke off."""
        finished = len(pl_module.method.tasks)
        if finished and self._training_began:
            try:
                self._save_bank(trainer, pl_module)
            except SaveError as error:  # what broke the training off is what the user has to hear of
                logger.warning("%s", error)
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            resumable = trainer.checkpoint_callback is not None and (self.folder / "checkpoints" / "last.ckpt").exists()
            then = "resume=true goes on from there" if resumable else "there is no checkpoint yet to go on from"
            Console().print(f"stopped; {finished} finished tasks are kept, and {then}")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the times of an earlier test."""
        self.test_seconds.clear()

    def on_test_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._started = perf_counter()

    def on_test_batch_end(self, *_: Any) -> None:
        """Stop the clock."""
        _wait_for_accelerator()
        self.test_seconds.append(perf_counter() - self._started)

    def on_test_end(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """Write results.json and accuracy_matrix.csv, tell the loggers, and print the table."""
        skipped = torch.tensor(trainer.datamodule.num_skipped(), device=pl_module.device)
        skipped = trainer.strategy.reduce(skipped, reduce_op="sum")
        if not trainer.is_global_zero:
            return
        assert pl_module.test_accuracy is not None
        self._save_bank(trainer, pl_module)
        num_tasks = len(pl_module.test_accuracy.images)
        evaluation, record, recovered = evaluation_of(trainer), record_of_stream(trainer), recovery_of(trainer)
        if evaluation is not None:
            matrix = evaluation.matrix
        else:
            matrix = torch.full((num_tasks, num_tasks), torch.nan, dtype=torch.float64)
            matrix[-1] = pl_module.test_accuracy.compute()[0].cpu()
        result = report.results(
            run=self.run,
            scenario=pl_module.scenario,
            method=pl_module.method,
            accuracy=pl_module.test_accuracy,
            matrix=matrix,
            seconds_per_task=[self.seconds[task] for task in sorted(self.seconds)],
            inference_ms_per_batch=1000 * sum(self.test_seconds) / len(self.test_seconds),
            model_bytes=self.bank_path.stat().st_size,
            num_classes=pl_module.num_classes,
            skipped_images=int(skipped),
            stream=None if record is None else report.stream(pl_module, record.assignment()),
            recovery=None if recovered is None else recovered.results(),
        )
        boundary = boundary_of(trainer)
        result |= shortened(trainer, {} if boundary is None else boundary.patience.finished)
        report.write_matrix(self.folder / "accuracy_matrix.csv", matrix)
        report.write_json(self.folder / "results.json", result)  # last: its presence says that the run is complete
        for listener in trainer.loggers:
            numbers = {f"result/{key}": value for key, value in result.items() if isinstance(value, (int, float))}
            listener.log_metrics(numbers, step=trainer.global_step)
        console = Console()
        console.print(report.table(result, accuracy=pl_module.test_accuracy, method=pl_module.method))
        for remark in report.remarks(result):
            console.print(remark, style="yellow")
        console.print(f"results in {self.folder}", soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """The times go into checkpoints."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The times come back from a checkpoint."""
        self.seconds = state_dict["seconds"]

    def _save_bank(self, trainer: L.Trainer, module: ContinualModule) -> None:
        if trainer.is_global_zero:
            module.method.save(self.bank_path)


def _wait_for_accelerator() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
