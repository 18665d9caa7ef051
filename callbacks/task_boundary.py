"""Where one task ends and the next begins."""

import lightning as L
import torch

from supsup_lightning.data import TaskSequence
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.module import ContinualModule, task_data
from supsup_lightning.seeding import derive_seed


class TaskBoundary(L.Callback):
    """Begins and finishes tasks, each with a fresh optimizer and schedule; the one place that knows of boundaries.

    All it needs is the trainer's epoch, so it has no state and a resumed run goes on where the checkpoint stands.
    """

    def setup(self, trainer: L.Trainer, pl_module: ContinualModule, stage: str) -> None:
        """Raise `ConfigurationError` where the trainer would not serve each task its own data."""
        if stage == "fit":
            wanted = "data that say where a task begins; others need scenario=nns, with TaskDiscovery in its place"
            check_trainer(trainer, TaskSequence, wanted)
            trials = pl_module.method.trials_per_task
            if trainer.datamodule.trials_per_task != trials:
                raise ConfigurationError(
                    f"The method trains each task {trials} times, so data.trials_per_task must be {trials} before the "
                    "Trainer is made; `model.plan_training(data)` sets it."
                )
            if trainer.datamodule.tasks_at_once != pl_module.method.tasks_at_once:
                raise ConfigurationError(
                    f"data.tasks_at_once={trainer.datamodule.tasks_at_once} has to be known before the Trainer is "
                    "made; `model.plan_training(data)` sees to that."
                )
            if trials > 1:
                _check_validation(trainer)
            if trainer.datamodule.tasks_at_once != 1:
                _check_independence(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """Where a run resumes within a task, make the schedule anew: it was made before the task was known."""
        if trainer.datamodule.begins_trial(trainer.current_epoch):
            return
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        states = [part.state_dict() for part in (*trainer.optimizers, *schedules)]
        trainer.strategy.setup_optimizers(trainer)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for part, state in zip((*trainer.optimizers, *schedules), states, strict=True):
            part.load_state_dict(state)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """Begin a task in its first epoch; in every epoch, seed what layers draw (dropout, say) from task and epoch."""
        data, epoch = trainer.datamodule, trainer.current_epoch
        tasks = data.tasks_of_epoch(epoch)
        pl_module.current_tasks = tuple(tasks)
        pl_module.validation_accuracy = None  # an earlier epoch's
        if data.begins_trial(epoch):
            pl_module.method.begin_tasks(tasks)
            if pl_module.method.begins_like_another and len(pl_module.method.tasks):
                images, _ = next(iter(data.train_loader(tasks[0], steps=slice(1))))
                # Each process sees a share of the batch, and all have to begin alike.
                pl_module.method.start_like(trainer.strategy.broadcast(pl_module.nearest_task(images)))
            trainer.strategy.setup_optimizers(trainer)
        torch.manual_seed(derive_seed(data.seed, "layers", epoch, trainer.global_rank))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ContinualModule) -> None:
        """Finish a task in its last epoch, and a trial, where there are several, in its own."""
        data, epoch = trainer.datamodule, trainer.current_epoch
        if data.trials_per_task > 1 and data.ends_trial(epoch):
            accuracy = trainer.callback_metrics["val/accuracy"].item()
            pl_module.method.finish_trial(data.tasks_of_epoch(epoch)[0], accuracy=accuracy)
        if data.ends_task(epoch):
            pl_module.method.finish_tasks(data.tasks_of_epoch(epoch))
            pl_module.current_tasks = ()


def _check_independence(trainer: L.Trainer, module: ContinualModule) -> None:
    """Raise `ConfigurationError` where tasks that are trained in the same step would change one another's masks."""
    at_once = trainer.datamodule.tasks_at_once
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_algorithm != "value":
        raise ConfigurationError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} clips the norm of all {at_once} tasks' gradients "
            "together; use gradient_clip_algorithm=value, or data.tasks_at_once=1."
        )
    if trainer.precision == "16-mixed":
        raise ConfigurationError(
            f"trainer.precision=16-mixed leaves out a step of all {at_once} tasks where one of them overflows; use "
            "bf16-mixed, or data.tasks_at_once=1."
        )
    trainer.datamodule.check_lengths()


def _check_validation(trainer: L.Trainer) -> None:
    """Raise `ConfigurationError` where a search would not find validation accuracy at the end of each training."""
    data, every = trainer.datamodule, trainer.check_val_every_n_epoch
    if not trainer.limit_val_batches or every is None or data.epochs_per_task % every:
        raise ConfigurationError(
            f"mask.sparsity=auto chooses by validation images at the end of each training, but the Trainer validates "
            f"every {every} epochs of {data.epochs_per_task}, on limit_val_batches={trainer.limit_val_batches}; leave "
            "both as they are by default."
        )
    without = next((task for task in range(data.num_tasks) if not len(data.val_loader(task))), None)
    if without is not None:
        raise ConfigurationError(
            f"mask.sparsity=auto chooses by validation images, and task {without} has none; give a number instead."
        )


def check_trainer(trainer: L.Trainer, kind: type, wanted: str) -> None:
    """Raise `ConfigurationError` where the trainer would not train on the data as they come.

    Args:
        trainer: about to start.
        kind: of data that the callback serves.
        wanted: the same in words, and what to do otherwise.
    """
    data = task_data(trainer)
    if not isinstance(data, kind):
        raise ConfigurationError(f"This callback needs {wanted}; got {type(data).__name__}.")
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
