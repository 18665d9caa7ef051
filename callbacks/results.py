"""Times a run and writes its results."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from supsup_lightning.bank.digests import digest
from supsup_lightning.callbacks.evaluation import evaluation_of
from supsup_lightning.callbacks.recovery import recovery_of
from supsup_lightning.callbacks.stream_record import record_of_stream
from supsup_lightning.callbacks.task_boundary import boundary_of
from supsup_lightning.callbacks.task_discovery import discovery_of
from supsup_lightning.checks.trainer_checks import shortened, task_data
from supsup_lightning.cli import optimized_metric
from supsup_lightning.discovery.learner import Decision
from supsup_lightning.errors import SaveError
from supsup_lightning.files import set_aside
from supsup_lightning.methods.protocols import KnowsMasks
from supsup_lightning.report import incremental, records, summary
from supsup_lightning.report.metrics import TaskAccuracy
from supsup_lightning.runs import run_identity, tracking

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

logger = logging.getLogger(__name__)

TABLES = (
    *("accuracy_matrix.csv", "task_confusion.csv", "layers.csv", "stream.csv", "decisions.csv"),
    *("inference.csv", "recovery.csv"),  # written by RecordInference and RecordRecovery
)
# Entries of results.json that go with the bank where a logger keeps it.
_SAID_OF_BANK = (
    *("scenario", "data", "network", "method", "seed", "task_shard", "num_tasks", "num_masks"),
    *("average_accuracy", "task_inference_accuracy", "validation_accuracy", "sparsity", "mask_bytes_per_task"),
)


class WriteResults(L.Callback):
    """Writes the mask bank when training ends or fails, and results.json and the matrix after the final test.

    Args:
        folder: the output directory.
        run: what results.json says of the run itself: the names of scenario, data, network, method; the seed.
        optimized_metric: name of the number of results.json that is returned to a sweeper, or several names.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        run: Mapping[str, Any] | None = None,
        optimized_metric: str | Sequence[str] = optimized_metric.DEFAULT,
    ) -> None:
        self.folder = self.shown_folder = Path(folder)
        self.run = dict(run or {})
        self.optimized_metric = optimized_metric
        self.result: dict[str, Any] = {}  # of the final test, in the first process
        self.validation: dict[int, float] = {}  # accuracy of each finished task; NaN without validation images
        self.seconds: dict[int, float] = {}  # of training, by task
        self.test_seconds: list[float] = []
        self.given: TaskAccuracy | None = None  # of the final test, with the task given where it was hidden
        self._started = 0.0
        self._training_began = False
        self._saved = ""  # the digest of what is in the bank's file

    @property
    def bank_path(self) -> Path:
        """Path of the mask bank."""
        return self.folder / "mask_bank.safetensors"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rename the results of an earlier run in this directory, unless this run resumes it."""
        self._training_began = True
        if trainer.is_global_zero:
            fresh = trainer.ckpt_path is None
            # A run that goes on has results only if tasks are added to it.
            older = ("results.json", *TABLES, *(("mask_bank.safetensors", "checkpoints/last.ckpt") if fresh else ()))
            for name in older:
                set_aside(self.folder / name)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop the clock after the last batch of an epoch, so that validation and evaluation do not count."""
        if trainer.is_last_batch:
            _wait_for_accelerator()
            evaluation = evaluation_of(trainer)
            seconds = perf_counter() - self._started - (evaluation.seconds if evaluation is not None else 0.0)
            for task, share in trainer.datamodule.true_tasks(trainer.current_epoch).items():
                self.seconds[task] = self.seconds.get(task, 0.0) + share * seconds

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Keep the validation accuracy of finished tasks."""
        data, epoch = trainer.datamodule, trainer.current_epoch
        if pl_module.scenario.task_known_in_training and data.timetable.ends_task(epoch):
            tasks = data.timetable.tasks(epoch)
            self.validation |= dict(zip(tasks, validation_accuracies(trainer, pl_module, tasks), strict=True))

    def on_train_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Write the bank."""
        self._save_bank(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: "ContinualModule", exception: BaseException) -> None:
        """Write the finished masks of a training that failed."""
        finished = len(pl_module.method.tasks)
        if finished and self._training_began:
            try:
                self._save_bank(trainer, pl_module)
            except SaveError as error:  # what broke the training off is what the user has to hear of
                logger.warning("%s", error)
        if isinstance(exception, KeyboardInterrupt | SystemExit) and trainer.is_global_zero:
            resumable = trainer.checkpoint_callback is not None and (self.folder / "checkpoints" / "last.ckpt").exists()
            then = "resume=true goes on from there" if resumable else "there is no checkpoint yet to go on from"
            Console().print(f"stopped; {finished} finished tasks are kept, and {then}")

    def on_test_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Reset the times and counts of an earlier test."""
        self.test_seconds.clear()
        self.given = None
        if incremental.can_be_given(pl_module.method, pl_module.scenario):
            tested = task_data(trainer, "test").task_numbers
            self.given = TaskAccuracy(len(tested), first_task=tested.start).to(pl_module.device)

    def on_test_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._started = perf_counter()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: "ContinualModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop the clock; then predict with the task given, for the task-incremental accuracy."""
        _wait_for_accelerator()
        self.test_seconds.append(perf_counter() - self._started)
        if self.given is not None and len(batch[1]):
            with trainer.precision_plugin.test_step_context():  # as in the test step
                task = pl_module.tested_tasks[dataloader_idx]
                incremental.count_given(self.given, pl_module, batch, task=task, outputs=outputs)

    def completed(self, result: dict[str, Any], module: "ContinualModule") -> dict[str, Any]:
        """Return the results as they are written; a subclass may change them."""
        return result

    def on_test_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Write results.json and accuracy_matrix.csv, tell the loggers, and print the table."""
        skipped = torch.tensor(trainer.datamodule.num_skipped(), device=pl_module.device)
        skipped = trainer.strategy.reduce(skipped, reduce_op="sum")
        assert pl_module.test_accuracy is not None
        images = trainer.strategy.reduce(pl_module.test_accuracy.images.clone(), reduce_op="sum")
        given = None if self.given is None else self.given.compute()[0].cpu()
        if not trainer.is_global_zero:
            return
        self._save_bank(trainer, pl_module)
        data, num_tasks = trainer.datamodule, len(pl_module.test_accuracy.images)
        evaluation, record, recovered = evaluation_of(trainer), record_of_stream(trainer), recovery_of(trainer)
        if evaluation is not None:
            matrix = evaluation.matrix
        else:
            matrix = torch.full((num_tasks, num_tasks), torch.nan, dtype=torch.float64)
            matrix[-1] = pl_module.test_accuracy.compute()[0].cpu()
        result = summary.results(
            run={**self.run, **({"task_shard": data.task_shard} if data.task_shard else {})},
            first_task=data.task_numbers.start,
            scenario=pl_module.scenario,
            method=pl_module.method,
            accuracy=pl_module.test_accuracy,
            matrix=matrix,
            seconds_per_task=[self.seconds[task] for task in sorted(self.seconds)],
            inference_ms_per_batch=1000 * sum(self.test_seconds) / len(self.test_seconds),
            model_bytes=self.bank_path.stat().st_size,
            num_classes=[pl_module.num_classes[task] for task in data.task_numbers],
            skipped_images=int(skipped),
            stream=None if record is None else summary.stream(pl_module, record.assignment()),
            recovery=None if recovered is None else recovered.results(),
            validation=self.validation,
            identity=run_identity.summary(self.folder),
            class_incremental=incremental.entries(
                scenario=pl_module.scenario,
                inference=pl_module.inference,
                accuracy=pl_module.test_accuracy,
                matrix=matrix,
                images=images.cpu(),
                num_learned=len(pl_module.method.tasks),
                given=given,
            ),
        )
        boundary = boundary_of(trainer)
        result |= shortened(trainer, {} if boundary is None else boundary.patience.finished)
        result = self.completed(result, pl_module)
        name = self.optimized_metric if isinstance(self.optimized_metric, str) else [*self.optimized_metric]
        values = [result.get(each) for each in optimized_metric.names_of(name)]
        result["optimized_metric"] = {"name": name, "value": values[0] if isinstance(name, str) else values}
        self.result = result
        self._write_tables(trainer, pl_module, matrix)
        summary.write_json(self.folder / "results.json", result)  # last: its presence says that the run is complete
        for listener in trainer.loggers:
            listener.log_metrics(logged_numbers(result), step=trainer.global_step)
            tracking.log_bank(listener, self.bank_path, {key: result[key] for key in _SAID_OF_BANK if key in result})
        console = Console()
        console.print(summary.table(result, accuracy=pl_module.test_accuracy, method=pl_module.method))
        for remark in summary.remarks(result):
            console.print(remark, style="yellow")
        console.print(f"results in {self.shown_folder}", soft_wrap=True)

    def _write_tables(self, trainer: L.Trainer, module: "ContinualModule", matrix: Tensor) -> None:
        first = module.tested_tasks.start
        records.write_matrix(self.folder / "accuracy_matrix.csv", matrix, first_task=first)
        if module.test_confusion is not None:
            rows = module.test_confusion.compute().tolist()
            records.write_rows(self.folder / "task_confusion.csv", ("task", "inferred_task", "images"), rows)
        if isinstance(module.method, KnowsMasks) and (layers := module.method.layer_statistics()):
            records.write_rows(self.folder / "layers.csv", layers[0]._fields, layers)
        record, discovery = record_of_stream(trainer), discovery_of(trainer)
        if record is not None and discovery is not None:
            stretches = [*record.stretches, (record.num_steps, "", "")]  # the last row only ends the one before
            records.write_rows(self.folder / "stream.csv", ("first_step", "true_task", "task"), stretches)
            records.write_rows(self.folder / "decisions.csv", Decision._fields, discovery.decisions)

    def state_dict(self) -> dict[str, Any]:
        """Times and validation accuracies, for checkpoints."""
        return {"seconds": self.seconds, "validation": self.validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore times and validation accuracies from a checkpoint."""
        self.seconds = state_dict["seconds"]
        self.validation = state_dict.get("validation", {})  # absent from older ones

    def _save_bank(self, trainer: L.Trainer, module: "ContinualModule") -> None:
        if trainer.is_global_zero:
            if self.validation:
                module.accuracies["validation"] = {**module.accuracies.get("validation", {}), **self.validation}
            contents = digest([module.method.kept(), module.accuracies])
            if contents != self._saved or not self.bank_path.exists():
                module.save(self.bank_path)
                self._saved = contents


def validation_accuracies(trainer: L.Trainer, module: "ContinualModule", tasks: Sequence[int]) -> list[float]:
    """Validation accuracy of each task that ends with this epoch; NaN without validation images."""
    search = module.method.details().get("sparsity_search")
    if search is not None:  # the training that is kept need not be the last
        return [dict(search["tried"][str(task)])[search["chosen"][str(task)]] for task in tasks]
    boundary = boundary_of(trainer)
    if trainer.datamodule.patience is not None and boundary is not None:
        return [boundary.patience.finished[task][1] for task in tasks]
    counted = module.validation_accuracy
    return [float("nan")] * len(tasks) if counted is None else counted.compute()[0].tolist()


def logged_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a result for loggers; the seed is part of their configuration.

    >>> logged_numbers({"seed": 1, "num_tasks": 2, "forgetting": None, "limited": True})
    {'result/num_tasks': 2}
    """
    return {
        f"result/{key}": value
        for key, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "seed"
    }


def result_of(trainer: L.Trainer) -> dict[str, Any]:
    """Results of the trainer's `WriteResults`; empty without one, and in all processes but the first."""
    return next((callback.result for callback in trainer.callbacks if isinstance(callback, WriteResults)), {})


def _wait_for_accelerator() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
