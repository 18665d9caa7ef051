"""Checks of a `Trainer` before the first step: options with which tasks would not be learned or tested correctly.

check_run        every stage: callbacks, strategy, source of the data
check_fit        limits and lengths of training
check_validation validation after each training or epoch, for options that need it
check_start      training that is over already
check_double     devices that the gate cannot compute on
check_schedule   schedules that do not fit a task
check_learned    every task that is tested was learned
"""

from collections.abc import Mapping
from operator import length_hint
from typing import Any

import lightning as L
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import strategies
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from supsup_lightning.data import TaskDataModule, TaskSequence
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import ByNumber, offer

_TUNING = (
    "takes the callbacks away that begin and finish tasks, so it cannot run here; set {option} yourself, by comparing "
    "runs of a task or two, and make a new Trainer without it"
)
# Callbacks that do not work with tasks, and the reason.
_REFUSED: dict[type[L.Callback], str] = {
    lightning_callbacks.EarlyStopping: (
        "would end the whole run with the task that it watches. A task ends early with data.patience (together with "
        "data.epochs_per_task); leave EarlyStopping out"
    ),
    lightning_callbacks.LearningRateFinder: _TUNING.format(option="the optimizer's lr"),
    lightning_callbacks.BatchSizeFinder: _TUNING.format(option="data.batch_size"),
    lightning_callbacks.WeightAveraging: (
        "averages scores over tasks, and no mask that is kept is made of the average; leave it out"
    ),
    lightning_callbacks.StochasticWeightAveraging: (
        "averages scores over tasks, and no mask that is kept is made of the average; leave it out"
    ),
    lightning_callbacks.ModelPruning: (
        "would prune scores, which are no weights; mask.rule=topk with mask.sparsity says how many weights are off"
    ),
    lightning_callbacks.GradientAccumulationScheduler: (
        "goes by the epoch of the run, so that tasks would be trained in different ways; use "
        "Trainer(accumulate_grad_batches=...)"
    ),
    lightning_callbacks.BaseFinetuning: (
        "freezes and thaws layers by the epoch of the run, and the network is frozen throughout; leave it out"
    ),
}
_SHARDED = (strategies.FSDPStrategy, strategies.DeepSpeedStrategy, strategies.ModelParallelStrategy)
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches")
_LOOPS = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop"}


def check_run(trainer: Any, stage: str) -> None:
    """Raise `ConfigurationError` for callbacks and strategies that do not work with tasks, and data without tasks."""
    trainer._checkpoint_connector._loaded_checkpoint = {}  # a rejected checkpoint would be loaded now
    check_callbacks(trainer)
    check_strategy(trainer)
    if stage == "predict":
        return
    task_data(trainer, stage)
    if stage == "test" and not trainer.limit_test_batches:
        raise ConfigurationError(f"Trainer(limit_test_batches={trainer.limit_test_batches}) tests nothing; raise it.")
    begin = [callback for callback in trainer.callbacks if getattr(callback, "begins_tasks", False)]
    if stage == "fit" and len(begin) != 1:
        raise ConfigurationError(
            f"{'No callback begins' if not begin else f'{len(begin)} callbacks begin'} and finish tasks: give the "
            "Trainer the callbacks of `model.task_callbacks(data)`, once "
            "(or supsup_lightning.callbacks.TaskBoundary, in scenario NNs TaskDiscovery)."
        )


def check_strategy(trainer: Any) -> None:
    """Raise `ConfigurationError` for strategies that shard parameters, or that do not return what was learned."""
    strategy = trainer.strategy
    if isinstance(strategy, _SHARDED):
        raise ConfigurationError(
            f"Trainer(strategy={type(strategy).__name__}) cuts parameters into pieces, and a mask lies over whole "
            "ones; use strategy=ddp."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigurationError(
            f"Trainer(strategy=ddp_{strategy.launcher._start_method}) trains in copies of this process, of which the "
            "weights alone come back: not the epoch that was reached, nor accuracies, nor what callbacks hold. Use "
            "trainer.strategy=ddp, which starts whole programs, or one device (in a notebook, devices=1)."
        )


def check_callbacks(trainer: Any) -> None:
    """Raise `ConfigurationError` for callbacks that do not work with tasks."""
    for callback in trainer.callbacks:
        for kind, why in _REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigurationError(f"The callback {type(callback).__name__} {why}.")


def task_data(trainer: Any, stage: str | None = None) -> TaskDataModule:
    """Return the trainer's data module. Raises `ConfigurationError` if it has no tasks, or a stage uses other data."""
    data: Any = trainer.datamodule
    if stage in _LOOPS:
        # With loaders passed directly, `trainer.datamodule` is that of an earlier call.
        given = getattr(trainer, _LOOPS[stage])._data_source.instance
        data = data if isinstance(given, L.LightningModule) else given
    if not isinstance(data, TaskDataModule):
        raise ConfigurationError(
            f"The Trainer's data ({type(data).__name__}) know no tasks; give it a ContinualDataModule: "
            f"trainer.{stage or 'fit'}(model, data). (DataModuleSequence makes tasks of ordinary LightningDataModules.)"
        )
    return data


def check_fit(trainer: Any, kind: type, wanted: str) -> None:
    """Raise `ConfigurationError` if the trainer would skip, cut or repeat a part of the tasks.

    Args:
        trainer: trainer about to start.
        kind: class of data that the callback needs.
        wanted: description of that class, and the alternative, for the message.
    """
    check_callbacks(trainer)
    data = task_data(trainer, "fit")
    if not isinstance(data, kind):
        raise ConfigurationError(f"This callback needs {wanted}; got {type(data).__name__}.")
    if trainer.fast_dev_run:
        raise ConfigurationError(
            f"Trainer(fast_dev_run={trainer.fast_dev_run}) ends within the first task; for a quick run of all use "
            f"limit_train_batches={int(trainer.fast_dev_run)} and limit_test_batches={int(trainer.fast_dev_run)}, or "
            "fewer tasks (data.num_tasks)."
        )
    epochs = data.num_epochs
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise ConfigurationError(
            f"Trainer(reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs}) would train "
            "every task on the first task's data; set it to 1."
        )
    if trainer.max_epochs != epochs:
        raise ConfigurationError(f"Trainer(max_epochs={trainer.max_epochs}) must be data.num_epochs, here {epochs}.")
    if trainer.max_steps != -1:
        raise ConfigurationError(
            f"Trainer(max_steps={trainer.max_steps}) would end a task half way; use data.steps_per_task instead."
        )
    if not trainer.limit_train_batches:
        raise ConfigurationError(
            f"Trainer(limit_train_batches={trainer.limit_train_batches}) trains nothing; give a number of batches from "
            "1 on, or a share of them."
        )
    if not isinstance(data, TaskSequence) and is_limit(trainer.limit_train_batches):
        option = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
        raise ConfigurationError(
            f"Trainer({option}={getattr(trainer, option)}) would leave out parts of the stream, and tasks with them; "
            "shorten the tasks instead (data.steps_per_task)."
        )


def check_validation(trainer: Any, *, option: str, every_epoch: bool) -> None:
    """Raise `ConfigurationError` if validation accuracy would be missing at the end of a training, or of an epoch.

    Args:
        trainer: trainer about to start.
        option: option that needs the accuracy, for the message.
        every_epoch: whether it is needed after each epoch, not only after the last one of a training.
    """
    data: Any = trainer.datamodule
    every, needed = trainer.check_val_every_n_epoch, 1 if every_epoch else data.epochs_per_task
    if not trainer.limit_val_batches or every is None or needed % every or trainer.val_check_interval != 1.0:
        raise ConfigurationError(
            f"{option} goes by validation images at the end of each {'epoch' if every_epoch else 'training'}, but the "
            f"Trainer validates every {every} epochs of {data.epochs_per_task}, on limit_val_batches="
            f"{trainer.limit_val_batches}, with val_check_interval={trainer.val_check_interval}; leave these as they "
            "are by default."
        )
    without = next((task for task in data.task_numbers if length_hint(data.val_loader(task), 1) == 0), None)
    if without is not None:
        raise ConfigurationError(
            f"{option} goes by validation images, and task {without} has none; leave the option out, or give it some."
        )


def check_validate(data: TaskDataModule, method: Method) -> None:
    """Raise `ConfigurationError` if `Trainer.validate` cannot work with these data or this method."""
    if not isinstance(data, TaskSequence):
        raise ConfigurationError(
            f"{type(data).__name__} has no validation images, as their task would have to be known; use trainer.test."
        )
    if not isinstance(method, ByNumber):
        raise ConfigurationError(
            f"trainer.validate gives the task, and {type(method).__name__} does not offer {offer(ByNumber)}; use "
            "trainer.test."
        )


def check_start(trainer: Any, network: nn.Module) -> None:
    """Raise `ConfigurationError` for a training that is over, and for layers that cannot run on this device.

    Args:
        trainer: trainer about to train, after it has restored a checkpoint, if any.
        network: network on its device.
    """
    data = task_data(trainer, "fit")
    if trainer.ckpt_path is None and trainer.current_epoch >= data.num_epochs:
        raise ConfigurationError(
            f"Training is over: this Trainer has run all {data.num_epochs} epochs of data.num_epochs. To test, call "
            "trainer.test(model, data); to train anew, make a new model and a new Trainer."
        )
    if trainer.strategy.root_device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in network.modules()):
        raise ConfigurationError(
            "Trainer(sync_batchnorm=True) needs GPUs, and this run is on CPUs; leave it out (masks then depend on the "
            "number of processes)."
        )


def check_double(trainer: Any) -> None:
    """Raise `ConfigurationError` for a device without float64, in which inference=discriminant sums."""
    device = trainer.strategy.root_device
    if device.type == "mps":
        raise ConfigurationError(
            f"inference=discriminant sums in float64, which {device} does not have; use trainer.accelerator=cpu, or "
            "another inference."
        )


def check_schedule(schedule: LRScheduler, steps: int | None) -> None:
    """Raise `ConfigurationError` for a schedule that would need a metric, or end before the task does."""
    if isinstance(schedule, ReduceLROnPlateau):
        raise ConfigurationError(
            "schedule=ReduceLROnPlateau needs a metric, and a task's schedule goes by its steps alone; use cosine, "
            "inverse_sqrt or constant, and data.patience to end a task that no longer gets better."
        )
    if isinstance(schedule, OneCycleLR) and steps is not None and schedule.total_steps < steps:
        raise ConfigurationError(
            f"schedule=OneCycleLR ends after total_steps={schedule.total_steps} of the {steps} steps of a task; take "
            "the number of steps that it is called with: lambda optimizer, steps: OneCycleLR(optimizer, "
            "total_steps=steps, ...)."
        )


def check_learned(data: TaskDataModule, learned: set[int], *, epoch: int) -> None:
    """Raise `ConfigurationError` for tasks that are to be tested and were never learned.

    Args:
        data: data to test on.
        learned: the finished tasks, by the numbers of the learner.
        epoch: epoch that training has reached in this Trainer; 0 if it did not train.
    """
    if isinstance(data, TaskSequence):
        missing = [task for task in data.task_numbers if task not in learned]
    elif not learned:
        missing = [*range(data.num_tasks)]
    else:  # the learner numbers tasks by itself, so the part of the stream that was served decides
        came = {task for past in range(epoch or data.num_epochs) for task in data.true_tasks(past)}
        missing = [task for task in range(data.num_tasks) if task not in came]
    if missing:
        raise ConfigurationError(
            f"{named(missing)} of data.num_tasks={data.num_tasks} {'was' if len(missing) == 1 else 'were'} never "
            "learned, so there is nothing to test; train to the end (trainer.fit, from a checkpoint if it was stopped: "
            "ckpt_path, or resume=true), or give data with learned tasks alone (data.num_tasks)."
        )


def named(tasks: list[int]) -> str:
    """Return a short text that names tasks.

    >>> named([3]), named([3, 4, 5, 9])
    ('Task 3', 'Tasks 3 to 5, 9')
    """
    runs: list[list[int]] = []
    for task in tasks:
        if runs and runs[-1][-1] == task - 1:
            runs[-1][1:] = [task]
        else:
            runs.append([task])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[1]}" for run in runs[:10]]
    return f"Task{'s' if len(tasks) > 1 else ''} {', '.join(shown)}{', ...' if len(runs) > 10 else ''}"


def is_limit(value: float) -> bool:
    """Whether a trainer's limit leaves batches out: 1 is one batch, and 1.0 all of them.

    >>> is_limit(1), is_limit(1.0), is_limit(0.0)
    (True, False, False)
    """
    return value is not None and (type(value) is int or value not in (0.0, 1.0))


def shortened(trainer: Any, finished: Mapping[int, tuple[int, float]]) -> dict[str, Any]:
    """Return the entries of results.json about batches or epochs that limits or patience left out.

    Args:
        trainer: trainer after the test.
        finished: `Patience.finished`.
    """
    limits = {name: getattr(trainer, name) for name in LIMITS if is_limit(getattr(trainer, name))}
    epochs = [finished[task][0] for task in sorted(finished)]
    return {**limits, **({"epochs_per_task_trained": epochs} if epochs else {})}
