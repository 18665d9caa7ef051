"""Checks of a checkpoint before it is loaded: its kind, its data, its tasks, and its place in training."""

import logging
from collections.abc import Mapping
from typing import Any

from supsup_lightning.checks.trainer_checks import named
from supsup_lightning.data import TaskDataModule, TaskSequence
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from supsup_lightning.methods import Method

logger = logging.getLogger(__name__)


def check_checkpoint(trainer: Any, method: Method, checkpoint: dict[str, Any]) -> None:
    """Check a checkpoint before any of it is loaded, so that an error changes nothing.

    A checkpoint written within an epoch continues from the start of its task, which makes the same mask.

    Raises:
        MismatchError: the checkpoint was made with another kind of data.
        ConfigurationError: it lacks tasks that the model has, or training cannot continue from it.
        DataError: the file is no checkpoint of a model.
    """
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise DataError("The checkpoint holds no state_dict of a model; take one that a Trainer has written.")
    data, fitting = trainer.datamodule, trainer.state.fn == "fit"
    if isinstance(data, TaskDataModule) and type(data).__qualname__ not in checkpoint:
        raise MismatchError(
            f"The checkpoint was not made with a {type(data).__name__}, so nothing says that its tasks are those of "
            "the data; use the data module that it was made with."
        )
    if isinstance(data, TaskDataModule):
        data.load_state_dict(checkpoint[type(data).__qualname__])  # Lightning loads it after the model
        if fitting:
            _check_added_tasks(data, method, state.get("_extra_state"))
    if fitting and "optimizer_states" not in checkpoint:
        raise ConfigurationError(
            "The checkpoint holds the masks alone (ModelCheckpoint(save_weights_only=True)), from which training "
            "cannot go on; resume from a checkpoint that was written without it."
        )
    if not fitting:
        _check_tasks(method, checkpoint)
    elif isinstance(data, TaskSequence) and "loops" in checkpoint:
        _to_start_of_task(data, method, checkpoint)


def _check_added_tasks(data: TaskDataModule, method: Method, stored: Any) -> None:
    """Check the tasks that a checkpoint lacks.

    Args:
        data: data of all tasks.
        method: method to train.
        stored: the module's extra state, with the numbers of classes of the checkpoint's tasks.

    Raises:
        MismatchError: an earlier task has another number of classes.
        ConfigurationError: an added task changes what earlier tasks would have learned.
    """
    before = tuple(stored.get("num_classes") or ()) if isinstance(stored, Mapping) else ()
    if not before or len(before) >= len(data.num_classes):
        return
    if before != tuple(data.num_classes[: len(before)]):
        raise MismatchError(
            f"The checkpoint is of tasks with {list(before)} classes, and the first {len(before)} tasks here have "
            f"{list(data.num_classes[: len(before)])}. Use the same, or start afresh."
        )
    if method.transforms and max(before) != max(data.num_classes):
        raise ConfigurationError(
            f"method.superfluous has outputs for the copies of {max(before)} classes in the checkpoint, and an added "
            f"task has {max(data.num_classes)}: earlier tasks would have learned other outputs. Start afresh with all "
            "tasks."
        )


def _check_tasks(method: Method, checkpoint: Mapping[str, Any]) -> None:
    kept = [value for name, value in checkpoint["state_dict"].items() if name.endswith(".tasks")]
    there = {task for tasks in kept for task in tasks.tolist()}
    missing = sorted({*method.tasks.tolist()} - there)
    if kept and missing:
        raise ConfigurationError(
            f"The checkpoint (after epoch {checkpoint['epoch']}) is of a moment before {named(missing).lower()} of the "
            'model had been learned. ckpt_path="best" has no meaning where accuracy is that of one task after another: '
            "leave ckpt_path out, as the model has the masks of all tasks. (An earlier checkpoint loads into a new "
            "model, and tests with data of as many tasks.)"
        )


def _to_start_of_task(data: TaskSequence, method: Method, checkpoint: dict[str, Any]) -> None:
    """Set Lightning's counts in a checkpoint from within an epoch to those of the start of its task."""
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_progress"]["current"]
    if progress["started"] == progress["processed"]:
        return
    epoch, batch = progress["processed"], loops["epoch_loop.batch_progress"]["current"]["completed"]
    if not method.begins_anew:
        raise ConfigurationError(
            f"The checkpoint was written within an epoch ({data.place(epoch, batch)}), and {type(method).__name__} "
            "cannot begin a task again, as tasks overwrite one another's weights; resume from a checkpoint of an "
            "epoch's end, as ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True) writes them."
        )
    over = checkpoint.get("callbacks", {}).get("TaskBoundary", {}).get("over")
    start = epoch if over else epoch - epoch % data.epochs_per_task
    if not over:
        logger.warning(
            "The checkpoint was written %s, within an epoch; the task is trained again from its first step, to the "
            "same mask.",
            data.place(epoch, batch),
        )
    for part in loops["epoch_progress"].values():
        part.update(dict.fromkeys(part, start))
    for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        for part, counts in loops[name].items():
            if isinstance(counts, dict):
                counts.update(dict.fromkeys(counts, 0 if part == "current" else counts["completed"]))
        loops[name]["is_last_batch"] = False
