"""Task boundaries: begins and finishes tasks in training."""

from collections.abc import Sequence
from operator import length_hint
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from supsup_lightning.checks.trainer_checks import check_fit, check_validation, named
from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.data import TaskSequence
from supsup_lightning.data.workers import seeded
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.inference import Discriminant, OneShot
from supsup_lightning.inference.consistency import measure
from supsup_lightning.methods import Method
from supsup_lightning.methods.patience import Patience
from supsup_lightning.methods.protocols import Searches, WarmStarts
from supsup_lightning.planning import trials_of
from supsup_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


class TaskBoundary(L.Callback):
    """Begins and finishes tasks, each with a fresh optimizer and schedule.

    All it needs is the trainer's epoch, so that a resumed run goes on where the checkpoint stands; with
    ``data.patience`` it also keeps a task's best epoch, and ends the task early.

    Attributes:
        patience: for each task.
    """

    begins_tasks = True

    def __init__(self) -> None:
        self.patience = Patience()

    def setup(self, trainer: L.Trainer, pl_module: "ContinualModule", stage: str) -> None:
        """Raise `ConfigurationError` if the trainer would not give each task its own data."""
        if stage == "fit":
            wanted = "data that say where a task begins; others need scenario=nns, with TaskDiscovery in its place"
            check_fit(trainer, TaskSequence, wanted)
            data, method = trainer.datamodule, pl_module.method
            trials = trials_of(method)
            if data.trials_per_task != trials:
                raise ConfigurationError(
                    f"The method trains each task {trials} times, so data.trials_per_task must be {trials} before the "
                    "Trainer is made; `model.plan_training(data)` sets it."
                )
            if data.tasks_at_once != method.live.rows:
                raise ConfigurationError(
                    f"data.tasks_at_once={data.tasks_at_once} has to be known before the Trainer is "
                    "made; `model.plan_training(data)` sees to that."
                )
            if trials > 1:
                check_validation(trainer, option="mask.sparsity=auto", every_epoch=False)
            if data.patience is not None:
                check_validation(trainer, option=f"data.patience={data.patience}", every_epoch=True)
            if method.transforms:
                _check_images_to_measure_on(data, "method.superfluous", "method.superfluous=idle")
            if getattr(pl_module.inference, "mask_weight", None) is not None:
                _check_images_to_measure_on(data, "inference.mask_weight", "inference.mask_weight=null")
            if data.tasks_at_once != 1:
                _check_independence(trainer, pl_module)
            if trainer.current_epoch == 0:
                self.patience = Patience()  # not another training's

    def on_fit_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Skip the remaining epochs of a task that had ended early when the run was interrupted."""
        trainer.datamodule.task_is_over = self.patience.over

    def on_train_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Rebuild the schedule if a run resumes within a task, as it was made before the task was known."""
        _check_tasks(trainer, pl_module, over=self.patience.over)
        if trainer.datamodule.timetable.begins_trial(trainer.current_epoch):
            return
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        states = [part.state_dict() for part in (*trainer.optimizers, *schedules)]
        trainer.strategy.setup_optimizers(trainer)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for part, state in zip((*trainer.optimizers, *schedules), states, strict=True):
            part.load_state_dict(state)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Begin a task in its first epoch; seed the random numbers of layers (dropout) by task and epoch."""
        data, epoch = trainer.datamodule, trainer.current_epoch
        stop_between_epochs(trainer)
        timetable, method = data.timetable, pl_module.method
        pl_module.validation_accuracy = None  # an earlier epoch's
        if timetable.begins_trial(epoch):
            tasks = timetable.tasks(epoch)
            self.patience.begin()
            method.begin_task(*tasks)
            if isinstance(method, WarmStarts) and method.begins_like_another and len(method.tasks):
                images, _ = next(iter(data.train_loader(tasks[0], steps=slice(1))))
                # Each process sees a share of the batch, and all have to begin alike.
                method.start_like(trainer.strategy.broadcast(_nearest_task(pl_module, images)))
            trainer.strategy.setup_optimizers(trainer)
        torch.manual_seed(derive_seed(data.seed, "layers", timetable.epoch_in_whole(epoch), trainer.global_rank))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: "ContinualModule") -> None:
        """Finish a task in its last epoch, or earlier by patience, and a trial in its last epoch."""
        data, epoch = trainer.datamodule, trainer.current_epoch
        trial_ends = data.timetable.ends_trial(epoch)
        if not self.patience.over:
            ends = trial_ends
            if data.patience is not None:
                trained = _trained(pl_module.method)
                ends |= self.patience.judge(_validated(pl_module), trained, patience=data.patience)
            if ends:
                self._end_trial(trainer, pl_module)
        if trial_ends:
            self.patience.begin()
        data.task_is_over = self.patience.over

    def _end_trial(self, trainer: L.Trainer, module: "ContinualModule") -> None:
        data, method = trainer.datamodule, module.method
        tasks = data.timetable.tasks(trainer.current_epoch)
        if data.patience is not None:
            accuracy = self.patience.end(tasks[0], _trained(method))
        elif data.trials_per_task > 1:
            accuracy = _validated(module)
        if data.trials_per_task > 1:
            assert isinstance(method, Searches)  # as `trials_of` says
            method.finish_trial(tasks[0], accuracy=accuracy)
        if data.timetable.is_last_trial(trainer.current_epoch):
            method.finish_task(*tasks)
            if method.gate is not None:
                _tell_gate(module, data, tasks)
            for task in tasks if method.transforms else ():
                with in_mode(module, training=False):
                    measure(method, data.val_loader(task), task=task, num_classes=max(module.num_classes))
            if isinstance(module.inference, Discriminant):
                _weigh_masks(module, module.inference, data, tasks)
            if module.finished_answers is not None:
                module.finished_answers.check()

    def state_dict(self) -> dict[str, Any]:
        """Best epoch of the task so far, for checkpoints; empty without ``data.patience``."""
        return self.patience.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.patience.load_state_dict(state_dict)


def _tell_gate(module: "ContinualModule", data: TaskSequence, tasks: Sequence[int]) -> None:
    """Add a finished task's training images to the gate, and judge it on its validation images."""
    gate = module.method.gate
    assert gate is not None
    relative = isinstance(module.inference, Discriminant) and module.inference.relative
    with in_mode(module, training=False), seeded(0):  # loaders of a user's own may draw; training must not notice
        if gate.needs_first_task:  # of all tasks, not of those that are trained: a part of them may lack it
            gate.prepare(data.each_image(0, half="training"))
        for task in tasks:
            num_classes = module.num_classes[task]
            gate.learn(module.method, task, data.each_image(task, half="training"), num_classes=num_classes)
            validation = data.each_image(task, half="validation")
            gate.judge(module.method, task, validation, num_classes=num_classes, relative=relative)


def _weigh_masks(module: "ContinualModule", inference: Discriminant, data: TaskSequence, tasks: Sequence[int]) -> None:
    """Measure what ``inference.mask_weight`` needs of finished tasks, if that is given."""
    with in_mode(module, training=False), seeded(0):
        for task in tasks:
            batches = data.each_image(task, half="validation")
            inference.measure(module.method, batches, task=task, num_classes=max(module.num_classes))


def boundary_of(trainer: L.Trainer) -> TaskBoundary | None:
    """The trainer's `TaskBoundary`, if it has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, TaskBoundary)), None)


def _trained(method: Method) -> list[Tensor]:
    """Everything that training changes, except the optimizer's state."""
    return [method.live.values, method.live.statistics]


def _validated(module: "ContinualModule") -> float:
    """Validation accuracy of the epoch, the same in all processes."""
    assert module.validation_accuracy is not None
    return module.validation_accuracy.compute()[0].float().nanmean().item()


@torch.no_grad()
def _nearest_task(module: "ContinualModule", images: Tensor) -> int:
    """Finished task that inference finds for most of these images ``(batch, *shape)``.

    The module's own inference decides, or one gradient of the entropy if that finds no tasks.
    """
    inference = module.inference if module.inference.finds_task else OneShot("entropy", images="batch")
    with in_mode(module, training=False):
        found = inference(module.method, images.to(module.device), max(module.num_classes))
    return int(found.mode().values)


def stop_between_epochs(trainer: L.Trainer) -> None:
    """Delay a request to stop (max_time, a Timer, any callback) to the end of the current epoch.

    In the middle of it, a half-trained mask would be taken for a finished one, and no checkpoint could go on.
    """
    trainer.fit_loop.min_epochs = max(trainer.fit_loop.min_epochs or 0, trainer.current_epoch + 1)


def _check_tasks(trainer: L.Trainer, module: "ContinualModule", *, over: bool) -> None:
    """Raise `ConfigurationError` if finished tasks would be trained again, or earlier tasks are missing."""
    data, epoch = trainer.datamodule, trainer.current_epoch
    first = data.timetable.tasks(epoch)[0]
    finished = {*module.method.tasks.tolist()}
    again = [task for task in range(first + over, data.task_numbers.stop) if task in finished]
    if again:
        raise ConfigurationError(
            f"{named(again)} {'is' if len(again) == 1 else 'are'} finished, with a mask in the bank, and would be "
            "trained again. To test, call trainer.test(model, data); to train anew, make a new model and a new "
            "Trainer; to go on, resume from a checkpoint (ckpt_path); to add tasks to those of a bank, give the data "
            f"first_task={len(finished)}."
        )
    part = data.task_shard is not None or data.first_task > 0
    missing = [task for task in range(data.task_numbers.start if part else 0, first) if task not in finished]
    remedy = "start afresh with a new model and a new Trainer"
    if data.first_task and not any(task < data.first_task for task in finished):  # some may have been removed
        missing = [*range(data.first_task)]
        remedy = "load the bank with the tasks before data.first_task (method.load), or leave out data.first_task"
    if missing:
        raise ConfigurationError(
            f"Training is to go on with task {first}, and {named(missing).lower()} before it "
            f"{'was' if len(missing) == 1 else 'were'} never finished; {remedy}."
        )
    if trainer.ckpt_path is None and not data.timetable.begins_trial(epoch) and not over:
        raise ConfigurationError(
            f"Training was stopped within task {first}, and a Trainer does not keep what the optimizer needs to go on; "
            "resume from a checkpoint (ckpt_path)."
        )


def _check_images_to_measure_on(data: TaskSequence, option: str, remedy: str) -> None:
    """Raise `ConfigurationError` if a task has no validation image to measure its score on, as an option asks for."""
    without = next((task for task in data.task_numbers if length_hint(data.val_loader(task), 1) == 0), None)
    if without is not None:
        raise ConfigurationError(
            f"{option} measures each task's score on its validation images, and task {without} has none; "
            f"raise data.validation_share, or use {remedy}."
        )


def _check_independence(trainer: L.Trainer, module: "ContinualModule") -> None:
    """Raise `ConfigurationError` if tasks trained in the same step would change one another's masks."""
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
