"""Writes the results of an evaluation: a test of finished masks, without training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from supsup_lightning.callbacks.results import WriteResults
from supsup_lightning.checks.trainer_checks import LIMITS
from supsup_lightning.cli import optimized_metric
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.runs import stopping

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

# What results.json says of a stream of unannounced tasks as it was in training, and of trainings that ended early.
_OF_STREAM = ("num_combinations", "combination_bytes", "adjusted_rand_index", "assignment_accuracy", "learned_as")
_OF_TRAINING = ("tasks_at_once", *(name for name in LIMITS if name != "limit_test_batches"))


class WriteEvaluation(WriteResults):
    """Writes results.json and the matrix of an evaluation, and nothing of the run that it tests.

    Numbers of the training are those of the run. Forgetting, backward transfer and average incremental accuracy are
    null: they need earlier tests of the same kind, which there are none of.

    Args:
        folder: where results go.
        shown_folder: the folder's name later on.
        run: what results.json says of the run itself.
        of_run: results of the run.
        bank_path: the masks.
        evaluation: entry ``evaluation`` of results.json.
        identity: digests of the configuration and of the data files.
        optimized_metric: number of results.json that is repeated as such.
    """

    def __init__(
        self,
        *,
        folder: Path,
        shown_folder: Path,
        run: Mapping[str, Any],
        of_run: Mapping[str, Any],
        bank_path: Path,
        evaluation: Mapping[str, Any],
        identity: Mapping[str, Any],
        optimized_metric: str = optimized_metric.DEFAULT,
    ) -> None:
        super().__init__(folder=folder, run=run, optimized_metric=optimized_metric)
        self.shown_folder = shown_folder
        self.of_run = of_run
        self.evaluation = evaluation
        self.identity = identity
        self._bank_path = bank_path

    @property
    def bank_path(self) -> Path:
        """Path of the run's mask bank."""
        return self._bank_path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the tasks are those that the masks were learned for.

        Raises:
            ConfigurationError: there are more tasks than the run learned.
            MismatchError: a task has another number of classes.
        """
        data, learned = trainer.datamodule, self.of_run["num_classes"]
        first = self.of_run.get("first_task", 0)
        if data.task_shard is not None and data.task_numbers != range(first, first + len(learned)):
            raise ConfigurationError(
                f"data.num_tasks={data.num_tasks} makes other shards: the run learned tasks {first} to "
                f"{first + len(learned) - 1}; leave it out."
            )
        if len(data.task_numbers) > len(learned):
            raise ConfigurationError(
                f"data.num_tasks={data.num_tasks} is more than the {len(learned)} tasks that the run learned; use "
                f"data.num_tasks={len(learned)}, or fewer."
            )
        for task, (number, before) in enumerate(zip(data.num_classes[first:], learned, strict=False), start=first):
            if number != before:
                raise MismatchError(
                    f"Task {task} has {number} classes in these data, and had {before} when its mask was learned; "
                    "evaluate on data with the same classes."
                )

    def on_exception(self, *_: Any) -> None:
        """Do nothing: what was written is left out as a whole."""

    def on_test_batch_end(self, *arguments: Any) -> None:
        """Stop the clock, and the test on SIGTERM."""
        super().on_test_batch_end(*arguments)
        stopping.raise_if_asked()

    def completed(self, result: dict[str, Any], module: "ContinualModule") -> dict[str, Any]:
        """Return the results with the numbers of the run's training, and what was evaluated."""
        run, num_tasks = self.of_run, result["num_tasks"]
        kept = (*_OF_STREAM, *_OF_TRAINING, *module.method.details())
        return {
            **result,
            **{name: run[name] for name in kept if name in run},
            **_validation(run, num_tasks=num_tasks, same_data=not self.evaluation["other_data"]),
            **_first(run, "epochs_per_task_trained", num_tasks),
            "num_classes": result["num_classes"][:num_tasks],
            "average_incremental_accuracy": None,
            "forgetting": None,
            "backward_transfer": None,
            **_seconds(run, num_tasks=num_tasks),
            "identity": dict(self.identity),
            "evaluation": dict(self.evaluation),
        }

    def _save_bank(self, trainer: L.Trainer, module: "ContinualModule") -> None:
        """Do nothing: the masks are in the run's bank."""


def _validation(run: Mapping[str, Any], *, num_tasks: int, same_data: bool) -> dict[str, Any]:
    """Validation accuracies of the run for the tested tasks; null if the test is of other data."""
    per_task: Sequence[float | None] | None = run.get("validation_accuracy_per_task") if same_data else None
    if per_task is None:
        return {"validation_accuracy": None, "validation_accuracy_per_task": None}
    if num_tasks == run["num_tasks"]:
        average = run["validation_accuracy"]
    else:
        known = [value for value in per_task[:num_tasks] if value is not None]
        average = round(sum(known) / len(known), 6) if known else None
    return {"validation_accuracy": average, "validation_accuracy_per_task": list(per_task[:num_tasks])}


def _seconds(run: Mapping[str, Any], *, num_tasks: int) -> dict[str, Any]:
    """Times of the run's training of the tested tasks."""
    per_task = run["seconds_per_task"]
    whole = num_tasks == run["num_tasks"]
    return {
        "train_seconds": run["train_seconds"] if whole else round(sum(per_task[:num_tasks]), 3),
        "seconds_per_task": per_task[:num_tasks],
    }


def _first(run: Mapping[str, Any], name: str, num_tasks: int) -> dict[str, Any]:
    return {name: run[name][:num_tasks]} if name in run else {}
