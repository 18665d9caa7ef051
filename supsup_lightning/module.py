"""The LightningModule: a method over one frozen network, and an inference that finds its tasks."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from supsup_lightning import callbacks, optimization, planning
from supsup_lightning.checks import compatibility, network_trial, trainer_checks
from supsup_lightning.checks.checkpoint_checks import check_checkpoint
from supsup_lightning.checks.trainer_checks import task_data
from supsup_lightning.checks.untouched import in_mode
from supsup_lightning.data import TaskDataModule
from supsup_lightning.data.inputs import Inputs, prepared
from supsup_lightning.data.naming import AboutData, numbered
from supsup_lightning.discovery import Discovery
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.inference import Discriminant, Inference, automatic
from supsup_lightning.inference.inference import differentiable
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import RecoversMasks, TrainsOn
from supsup_lightning.methods.transforms import copies
from supsup_lightning.optimization import (
    MakeOptimizer,
    MakeSchedule,
    add_task_dimension,
    check_same,
    checked,
    default_coefficient_optimizer,
    default_optimizer,
    described,
)
from supsup_lightning.recipe import merging, prediction
from supsup_lightning.recipe.contents import recipe_of
from supsup_lightning.report import task_table
from supsup_lightning.report.metrics import TaskAccuracy, TaskConfusion
from supsup_lightning.runs import checkpoints
from supsup_lightning.runs.loggers import keep_going
from supsup_lightning.scenario import GNU, Scenario
from supsup_lightning.schedules import cosine, inverse_sqrt

logger = logging.getLogger(__name__)


class ContinualModule(L.LightningModule):
    """Training, validation, test and prediction steps; `TaskBoundary` begins and finishes tasks.

    Args:
        method: the network with its tasks, `SupSup` for example.
        inference: how the task of test images is found; by default `automatic`.
        scenario: what is revealed when; the inference has to fit it.
        optimizer: a function of the trainable parameters, called afresh for each task.
        schedule: a function of the optimizer and the steps of a task, None where they are not known; a task starts it
            afresh. By default `cosine`, or `inverse_sqrt` where the steps are not known.
        coefficient_optimizer: as ``optimizer``, for tasks that are combinations of masks.

    Raises:
        ConfigurationError: an inference that the scenario has no use for, or that needs what the scenario hides.
    """

    def __init__(
        self,
        method: Method,
        *,
        inference: Inference | None = None,
        scenario: Scenario = GNU,
        optimizer: MakeOptimizer = default_optimizer,
        schedule: MakeSchedule | None = None,
        coefficient_optimizer: MakeOptimizer = default_coefficient_optimizer,
    ) -> None:
        super().__init__()
        self.method = method
        self.inference = automatic(scenario) if inference is None else inference
        self.scenario = scenario
        self.make_optimizer = optimizer
        self.make_coefficient_optimizer = coefficient_optimizer
        self.make_schedule = schedule or (cosine if scenario.task_known_in_training else inverse_sqrt)
        self.num_classes: tuple[int, ...] = ()  # of each task; known once there is data
        self.output_size = 0  # likewise
        self.inputs: Inputs | None = None  # likewise
        self.about_data: AboutData | None = None  # likewise: what a file of the tasks says of the data of training
        self.accuracies: dict[str, dict[int, float]] = {}  # by the half of the data and the task, for that file
        self.true_tasks: dict[int, int] = {}  # if tasks are discovered: whose images each has learned; for scores alone
        self.validated_tasks: tuple[int, ...] = ()  # those in training, or all where `Trainer.validate` is called
        self.tested_tasks: range = range(0)  # in the order of the test loaders
        self.validation_accuracy: TaskAccuracy | None = None  # of the validated tasks, in their order
        self.finished_answers: network_trial.FinishedAnswers | None = None  # watched in training
        self.test_accuracy: TaskAccuracy | None = None
        self.test_confusion: TaskConfusion | None = None  # None if the task is given
        self.described_training: dict[str, Any] | None = None  # optimizer and schedule, for checkpoints
        self._shows_by_task = False
        self._loaded: dict[str, Any] = {}  # a state, until the method has taken its own
        self.register_load_state_dict_post_hook(_take_loaded)
        if isinstance(self.inference, Discriminant):
            self.inference.give_gate(self.method)
        # A bank grows between steps, in every process alike: DDP must not broadcast the buffers that it began with.
        self._ddp_params_and_buffers_to_ignore = [
            f"method.{name}" for name, _ in method.named_buffers() if not name.startswith("network.")
        ]
        self._trained_on: dict[str, Any] = {}  # options of the data of the last fit
        compatibility.check_parts(self.scenario, self.inference, self.method)

    # Set-up: everything that can be wrong is found before the first step.

    def setup(self, stage: str) -> None:
        """Check that network, data and inference fit one another.

        Raises:
            ConfigurationError: a network that does not take the images or has fewer outputs than there are classes; an
                objective that needs superfluous outputs without any; one image to decide where the batch has to.
        """
        checkpoints.prepare(self.trainer, stage)
        for listener in self.trainer.loggers:
            keep_going(listener)
        trainer_checks.check_run(self.trainer, stage)
        if stage == "predict":
            return
        data = task_data(self.trainer, stage)
        compatibility.check_announcement(self.scenario, data)
        compatibility.check_shard(self.method, data)
        if stage == "validate":
            trainer_checks.check_validate(data, self.method)
        if stage == "fit" or len(data.num_classes) > len(self.num_classes):  # tested on some of its tasks, it keeps all
            self.num_classes = tuple(data.num_classes)
        example = data.example().to(self.method.live.values.device)  # `self.device` is where the model will be
        if stage == "fit" or self.about_data is None:
            self._tell_about(data, example)
        elif self.inputs is None:
            self.inputs = self.about_data.inputs
        self.output_size = network_trial.output_size_of(self.method, data, example)
        compatibility.check_outputs(self.inference, self.method, data, output_size=self.output_size)
        if stage == "fit" and self.trainer.is_global_zero and isinstance(self.method, RecoversMasks):
            self.method.check_num_tasks(data.num_tasks)
        network_trial.check_superposition(self.method, self.inference, example)
        if self.method.gate is not None:
            trainer_checks.check_double(self.trainer)
            self.method.gate.choose_features(self.method, example, keeps_neighbours=data.keeps_neighbours)

    def _tell_about(self, data: TaskDataModule, example: Tensor) -> None:
        """Remember what the data say of themselves, and what was known of tasks before ``data.first_task``."""
        inputs = Inputs(tuple(example.shape[1:]), example.dtype, data.normalisation())
        told = AboutData(inputs, data.raw_images(), data.describe_tasks())
        self.about_data = told.after(self.about_data, first_task=data.first_task)
        self.inputs = self.about_data.inputs

    def on_fit_start(self) -> None:
        """Check that the network can be trained as it is to be, where it is to be."""
        trainer_checks.check_start(self.trainer, self.method.network)
        if not self.training:
            logger.warning("The model was in evaluation mode, where a test that broke off has left it; it trains now.")
            self.train()
        data = self.trainer.datamodule
        self.num_classes = tuple(data.num_classes)  # a checkpoint of fewer tasks has fewer
        self._tell_about(data, data.example())  # likewise
        self.described_training = self._described()
        if self._trained_on and self.trainer.current_epoch and self.trainer.ckpt_path is None:  # in the same Trainer
            data.check_trained_on(self._trained_on, "What this Trainer has trained so far")
        self._trained_on = data.state_dict()
        self.finished_answers = network_trial.before_training(
            self.method, self.inference, self.trainer, num_classes=max(self.num_classes)
        )

    def configure_optimizers(self) -> Any:
        """A fresh optimizer and schedule over one task."""
        combining = isinstance(self.method, TrainsOn) and self.method.combining
        make = self.make_coefficient_optimizer if combining else self.make_optimizer
        return optimization.for_task(self.trainer, self.method, make, self.make_schedule)

    def _described(self) -> dict[str, Any]:
        steps = self.trainer.datamodule.optimizer_steps(0)
        return described(self.make_optimizer, self.make_schedule, self.method.trainable(), steps=steps)

    def plan_training(self, data: L.LightningDataModule, *, accelerator: str = "auto") -> None:
        """Agree with the data on how tasks are trained: how often each, and how many at once; before the `Trainer` is.

        Logs how much memory several tasks at once will take, and decides ``data.tasks_at_once=auto``.

        Args:
            data: to be trained on.
            accelerator: of the `Trainer`, for ``auto``; `task_callbacks` takes a GPU where there is one.

        Raises:
            ConfigurationError: several tasks at once where the method or the scenario has one after another.
        """
        planning.plan(self.method, data, make_optimizer=checked(self.make_optimizer), accelerator=accelerator)

    def task_callbacks(self, data: L.LightningDataModule, *, discovery: Discovery | None = None) -> list[L.Callback]:
        """The callbacks that a `Trainer` needs for this module, and the evaluation of tasks seen so far.

        Args:
            data: to be trained on.
            discovery: how tasks are found that nothing announces (scenario NNs); by default `AccuracyDiscovery`.
        """
        self.plan_training(data)
        return callbacks.needed_for(self.scenario, self.inference, discovery=discovery)

    # Steps.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Skip the epoch of a task that has ended early."""
        return -1 if getattr(self.trainer.datamodule, "task_is_over", False) else None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Cross-entropy over all outputs, superfluous ones included, under the masks of the tasks in training.

        Each image comes with its transformed copies where superfluous outputs learn these (`Method.transforms`).

        Of several tasks, in a batch ``(tasks, batch, ...)``, the losses are summed, so that each has the gradient that
        it has by itself.
        """
        images, labels = batch
        if labels.ndim == 1:  # one task
            images, labels = images.unsqueeze(0), labels.unsqueeze(0)
        if batch_idx == 0:
            self._show_in_bar(self.method.live.tasks[0])
        learned = labels
        if self.method.transforms:
            images, learned = copies(images, labels, self.method.transforms, num_classes=max(self.num_classes))
        logits = self.method.forward_live(images)
        loss = cross_entropy(logits.flatten(0, 1), learned.flatten()) * len(learned)
        logits = logits[:, : labels.shape[1]]  # of the images themselves
        # Each `self.log` costs about as much as the rest of Lightning's loop, so only where a logger takes the value.
        every = self.trainer.log_every_n_steps
        if self.trainer.loggers and every and (self.global_step + 1) % every == 0:
            mean = loss.detach() / len(labels)
            accuracy = self.batch_accuracy(logits, labels)
            self.log_dict({"train/loss": mean, "train/accuracy": accuracy}, batch_size=labels.numel())
        return {"loss": loss, "logits": logits.detach(), "labels": labels}

    def batch_accuracy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Accuracy on a training batch, ``()``: logits ``(tasks, batch, output_size)``, labels ``(tasks, batch)``."""
        by_task = zip(logits, labels, self.method.live.tasks, strict=True)
        return torch.stack([(self.classes(own, task) == right).float().mean() for own, right, task in by_task]).mean()

    def on_validation_start(self) -> None:
        """Reset the counts."""
        alone = self.trainer.state.fn == "validate"
        self.validated_tasks = tuple(task_data(self.trainer).task_numbers) if alone else self.method.live.tasks
        self.validation_accuracy = TaskAccuracy(len(self.validated_tasks)).to(self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count, for a task that is given, the validation images that are predicted right."""
        if self.trainer.sanity_checking:  # before training, when no task has begun
            return
        assert self.validation_accuracy is not None
        images, labels = batch
        task = self.validated_tasks[dataloader_idx] if self.validated_tasks else self.method.live.task
        right = self.classes(self.method(images, task), task) == labels
        self.validation_accuracy.update(dataloader_idx, right=right, found=torch.ones_like(right))

    def on_validation_epoch_end(self) -> None:
        """Log the average over the validated tasks that have validation images."""
        if self.trainer.sanity_checking:
            return
        assert self.validation_accuracy is not None
        accuracy, _ = self.validation_accuracy.compute().float()
        if not accuracy.isnan().all():
            self.log("val/accuracy", accuracy.nanmean(), sync_dist=True)  # the same in every process

    def on_validation_end(self) -> None:
        """After `Trainer.validate`, show the accuracy of each task."""
        if self.trainer.state.fn == "validate":
            self._show_by_task(self.validation_accuracy, first_task=self.validated_tasks[0], found=False)

    def on_test_start(self) -> None:
        """Reset the counts."""
        data = task_data(self.trainer)
        self.tested_tasks = data.task_numbers
        self.test_accuracy = TaskAccuracy(len(self.tested_tasks), first_task=self.tested_tasks.start).to(self.device)
        self.test_confusion = None
        if not self.scenario.task_known_at_inference:
            self.test_confusion = TaskConfusion().to(self.device)
            # A process without images has rows of the same shape as the others, which `torch.distributed` needs.
            self.test_confusion.update(0, torch.empty(0, dtype=torch.int64, device=self.device))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Count correct predictions by the rules of the scenario; the loader tells the true task."""
        assert self.test_accuracy is not None
        task = self.tested_tasks[dataloader_idx]
        if batch_idx == 0:
            self._show_in_bar(task)
        right, found = self.evaluate(batch, task=task, accuracy=self.test_accuracy, confusion=self.test_confusion)
        return {"right": right, "found": found}

    def on_test_epoch_end(self) -> None:
        """Log the averages over tasks; all processes take part, as their counts are summed."""
        assert self.test_accuracy is not None
        accuracy, found = self.test_accuracy.compute().float()
        if self.scenario.task_known_in_training:  # else tasks have numbers of their own
            tested = dict(zip(self.tested_tasks, accuracy.tolist(), strict=True))
            self.accuracies["test"] = {**self.accuracies.get("test", {}), **tested}
        self.log_dict({"test/accuracy": accuracy.mean(), "test/task_found": found.mean()}, sync_dist=True)
        if self.test_confusion is not None:
            self.test_confusion.compute()  # in every process; kept for callbacks of the first

    def on_test_end(self) -> None:
        """Show the accuracy of each task, in place of Lightning's repeated averages."""
        first = self.tested_tasks.start
        self._show_by_task(self.test_accuracy, first_task=first, found=not self.scenario.task_known_at_inference)

    # Here, as an error after the change of mode would leave the module in evaluation mode.

    def on_validation_model_eval(self) -> None:
        """Check, before `Trainer.validate`, that there are tasks to validate."""
        if self.trainer.state.fn == "validate":
            self._before_evaluation(self.trainer.validate_loop)
        super().on_validation_model_eval()

    def on_test_model_eval(self) -> None:
        """Check that there are tasks to test."""
        self._before_evaluation(self.trainer.test_loop)
        super().on_test_model_eval()

    def _before_evaluation(self, loop: Any) -> None:
        """Raise `ConfigurationError` for tasks that were never learned; take the printing from Lightning."""
        trainer_checks.check_learned(
            task_data(self.trainer), {*self.method.tasks.tolist()}, epoch=self.trainer.current_epoch
        )
        self._shows_by_task, loop.verbose = loop.verbose and self.trainer.is_global_zero, False

    def _show_by_task(self, accuracy: TaskAccuracy | None, *, first_task: int, found: bool) -> None:
        assert accuracy is not None
        values = accuracy.compute()  # in every process
        if self._shows_by_task:
            task_table.show(values, first_task=first_task, found=found)

    def _show_in_bar(self, task: int) -> None:
        """Lightning's own bars name the loader, or the epoch, alone."""
        self.trainer.progress_bar_metrics["task"] = task  # to log it would cost something in each step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Task and label of each image, as `infer`."""
        return self.infer(batch[0] if isinstance(batch, (tuple, list)) else batch)

    # What the steps are made of; callbacks and notebooks use these as well.

    def evaluate(
        self,
        batch: tuple[Tensor, Tensor],
        *,
        task: int,
        accuracy: TaskAccuracy,
        confusion: TaskConfusion | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict one test batch of ``task`` as the scenario has it, and count.

        Returns:
            Which images are predicted right, and whose task is found, both ``(batch,)`` bool.
        """
        images, labels = batch
        if not len(labels):
            return (torch.empty(0, dtype=torch.bool, device=labels.device),) * 2
        if self.scenario.task_known_at_inference:
            found = torch.ones_like(labels, dtype=torch.bool)
            right = self.classes(self.method(images, task), task) == labels
        else:
            tasks, predicted = self._infer(images)
            if not self.scenario.task_known_in_training:  # tasks have the learner's own numbers
                tasks = tasks.new_tensor([self.true_tasks.get(own, -1) for own in tasks.tolist()])
            if confusion is not None:
                confusion.update(task, tasks)
            found = tasks == task
            right = predicted == labels
            if not self.scenario.labels_shared:
                right &= found
        accuracy.update(task, right=right, found=found)
        return right, found

    @torch.no_grad()
    def infer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Find the task of images, then their classes.

        Args:
            images: ``(batch, *shape)``, prepared as the data module prepares them; or bytes (uint8), where all that it
                does is to normalise them.

        Returns:
            Task and label of each image, both ``(batch,)`` int64; the task is -1 where its number cannot be told, and
            both are -1 for inputs of no task, where the inference looks for them.

        Raises:
            ConfigurationError: an inference that finds no task, or no finished task to find.
            DataError: images of another type or shape than those of training, or with NaN or infinite values.
        """
        if not self.num_classes or not len(self.method.tasks):
            raise ConfigurationError("There is no finished task to infer; train first, or load a mask bank.")
        images = prepared(images, self.inputs, self.method.network)
        return self._infer(images.to(self.device))

    @differentiable
    def _infer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Infer without checking the images, as loaders have checked those of a test."""
        if not len(images):
            return (torch.empty(0, dtype=torch.int64, device=self.device),) * 2
        with in_mode(self, training=False):
            tasks, logits = self.inference.predict(self.method, images, max(self.num_classes))
            labels = torch.empty_like(tasks)
            for task in tasks.unique().tolist():
                # Where an inference does not know the task by number, neither does it know how many classes that has.
                known = task if self.inference.numbers_tasks else -1
                labels[tasks == task] = self.classes(logits[tasks == task], known)
            if self.inference.finds_unknown:
                labels[tasks == -1] = -1
        return tasks, labels

    def classes(self, logits: Tensor, task: int) -> Tensor:
        """Predicted classes ``(batch,)`` from logits ``(batch, output_size)``, among the classes of the task."""
        return logits[:, : self.num_classes_of(task)].argmax(1)

    def num_classes_of(self, task: int) -> int:
        """Number of classes of a task; of the task with most of them, where tasks have no number."""
        known = self.scenario.task_known_in_training and task >= 0
        return self.num_classes[task] if known else max(self.num_classes)

    @torch.no_grad()
    def predict(self, images: Any, *, task: Any = None, together: bool = False) -> prediction.Prediction:
        """Name the task and the class of each image of a mixed batch.

        Each image decides by itself which task it is of, whatever ``inference.images`` says, unless they are
        ``together``.

        Args:
            images: prepared floats ``(batch, *shape)``; bytes ``(batch, channels, height, width)``; a PIL image of any
                size and mode, or the path of one; or a list of these. Raw images are prepared as in training.
            task: number of the task of all images, or of each, where it is known; needed in scenario GG.
            together: all images are of one task, which ``inference.images`` of them decide.

        Raises:
            ConfigurationError: no finished task, a task that is needed or unknown, or ``together`` without effect.
            DataError: images that are not of the kind of training, or raw ones that cannot be prepared as there.
        """
        return prediction.predict(self, images, task=task, together=together)

    def name_of_task(self, task: int) -> str:
        """Name of a task, as the data of training have it."""
        known = self.about_data is not None and task < len(self.about_data.tasks)
        return self.about_data.tasks[task].name if known else numbered(task, 0).name  # type: ignore[union-attr]

    def name_of_class(self, task: int, label: int) -> str:
        """Name of a class of a task; where the task is -1, of a class that has the same name in all tasks."""
        tasks = () if self.about_data is None else self.about_data.tasks
        if not 0 <= task < len(tasks):
            tasks = tasks if len({each.classes for each in tasks}) == 1 else ()
            task = 0
        return tasks[task].classes[label] if tasks and label < len(tasks[task].classes) else str(label)

    def save(self, path: str | Path) -> None:
        """Write the finished tasks, and all that `supsup_lightning.load` needs to predict with them.

        ``method.load`` and ``method.merge`` read the file, too.

        Raises:
            SaveError: the file system refuses the file. The old one is kept.
        """
        self.method.save(path, recipe=recipe_of(self))

    def merge(self, path: str | Path) -> None:
        """Add the finished tasks of a file, trained elsewhere on the same network, with their names and accuracies.

        Raises:
            MismatchError: it was made with another network, seed or rule, or for other inputs.
            KeyError: a task is in both and differs. Nothing is merged then.
        """
        merging.merge(self, path)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "ContinualModule":
        """Lightning's, of a file that is checked first, and of which tensors, numbers and text alone are read."""
        options = {"weights_only": True, **kwargs}
        if not checkpoints.is_local(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **options)
        with checkpoints.reading(checkpoint_path):
            checkpoints.WholeCheckpoints().load_checkpoint(checkpoint_path, weights_only=options["weights_only"])
            return super().load_from_checkpoint(checkpoint_path, *args, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the options of optimizer and schedule."""
        if self.described_training is not None:
            checkpoint["training"] = self.described_training

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what the trainer cannot go on from, or test, before any of it is loaded."""
        if self._trainer is None:
            return
        check_checkpoint(self._trainer, self.method, checkpoint)
        add_task_dimension(checkpoint, self.method.live.values)
        if self._trainer.state.fn == "fit" and "training" in checkpoint:  # older ones have none
            check_same(checkpoint["training"], self._described())

    # What is needed to infer, and no tensor holds.

    def get_extra_state(self) -> dict[str, Any]:
        """State for `state_dict`."""
        inputs = None if self.inputs is None else self.inputs.state()
        about = None if self.about_data is None else self.about_data.state()
        return {
            "num_classes": self.num_classes,
            "inputs": inputs,
            "true_tasks": self.true_tasks,
            "about_data": about,
            "accuracies": self.accuracies,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `state_dict`, once the method has not refused the rest of it."""
        self._loaded = state


def _take_loaded(module: ContinualModule, _: Any) -> None:
    if module._loaded:
        module.num_classes = module._loaded["num_classes"]
        module.true_tasks = dict(module._loaded.get("true_tasks", {}))
        if module._loaded.get("inputs") is not None:  # older checkpoints have none
            module.inputs = Inputs.of(module._loaded["inputs"])
        if module._loaded.get("about_data") is not None:  # likewise
            module.about_data = AboutData.of(module._loaded["about_data"])
        module.accuracies = dict(module._loaded.get("accuracies", {}))
    module._loaded = {}
