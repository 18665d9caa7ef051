"""What a user's Trainer may do to tasks: it works in their sense, or is refused before the first step."""

import logging
from math import cos, pi

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from supsup_lightning import (
    GG,
    GNU,
    NNS,
    ContinualDataModule,
    ContinualModule,
    Given,
    LowerBound,
    OneShot,
    PermutedDigits,
    SupSup,
    Unannounced,
)
from supsup_lightning.callbacks import EvaluateSeenTasks
from supsup_lightning.checks.trainer_checks import check_run, shortened
from supsup_lightning.data import CropFlip, Digits, Split
from supsup_lightning.data.augment import name_of
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.report import task_table
from supsup_lightning.schedules import constant


def make_data(num_tasks=2, steps=5, **options) -> ContinualDataModule:
    length = {} if "epochs_per_task" in options else {"steps_per_task": steps}
    return PermutedDigits(num_tasks=num_tasks, **{"batch_size": 32, **length, **options})


def make_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 10))


def make_model(scenario=GG, *, method=SupSup, network=None, **options) -> ContinualModule:
    torch.manual_seed(0)
    inference = Given() if scenario is GG else OneShot("entropy", images="batch")
    return ContinualModule(method(network or make_network()), scenario=scenario, inference=inference, **options)


def make_trainer(model, data, *callbacks, folder, task_callbacks=None, **options) -> L.Trainer:
    checkpoints = any(isinstance(callback, lightning_callbacks.Checkpoint) for callback in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        callbacks=[*(model.task_callbacks(data) if task_callbacks is None else task_callbacks), *callbacks],
        accelerator="cpu",
        **{
            "max_epochs": data.num_epochs,
            "reload_dataloaders_every_n_epochs": 1,
            "default_root_dir": folder,
            "enable_checkpointing": checkpoints,
            **quiet,
            **options,
        },
    )


def trained(data, *callbacks, folder, scenario=GG, method=SupSup, **options) -> tuple[ContinualModule, L.Trainer]:
    model = make_model(scenario, method=method)
    trainer = make_trainer(model, data, *callbacks, folder=folder, **options)
    trainer.fit(model, data)
    return model, trainer


class Stop(L.Callback):
    """Asks to stop, or breaks off, after so many optimizer steps."""

    def __init__(self, step: int, *, error: type[BaseException] | None = None) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            if self.error is not None:
                raise self.error
            trainer.should_stop = True


class Rates(L.Callback):
    """Learning rate of each step."""

    def __init__(self) -> None:
        self.rates = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


# Schedules.


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 40),
        ({"limit_train_batches": 10}, 10),
        ({"limit_train_batches": 0.25}, 10),
        ({"overfit_batches": 10}, 10),
        ({"limit_train_batches": 11, "accumulate_grad_batches": 3}, 4),
    ],
)
def test_the_cosine_ends_at_0_at_the_length_that_the_trainer_leaves(options, steps, tmp_path):
    rates = Rates()
    data = make_data(2, 40)
    _, trainer = trained(data, rates, folder=tmp_path, **options)
    assert trainer.global_step == 2 * steps
    whole = [1e-3 * 0.5 * (1 + torch.tensor(step / steps * torch.pi).cos().item()) for step in range(steps)]
    batches = len(rates.rates) // 2
    assert sorted({*rates.rates[:batches]}, reverse=True) == pytest.approx(whole, abs=1e-9)
    assert rates.rates[batches:] == rates.rates[:batches]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_of_scores_are_clipped_as_torch_clips_them(algorithm, tmp_path):
    class Clip(L.Callback):
        """Clips by hand."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            scores = pl_module.method.trainable()
            if algorithm == "norm":
                nn.utils.clip_grad_norm_(scores, 1e-3)
            else:
                nn.utils.clip_grad_value_(scores, 1e-5)

    by_hand, _ = trained(make_data(), Clip(), folder=tmp_path)
    options = {"gradient_clip_val": 1e-3 if algorithm == "norm" else 1e-5, "gradient_clip_algorithm": algorithm}
    model, _ = trained(make_data(), folder=tmp_path, **options)
    assert torch.equal(model.method.live.values, by_hand.method.live.values)
    unclipped, _ = trained(make_data(), folder=tmp_path)
    assert not torch.equal(model.method.live.values, unclipped.method.live.values)


def test_overfitting_repeats_the_same_batches(tmp_path):
    class Batches(L.Callback):
        def __init__(self):
            self.sums = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.sums.append(batch[0].double().sum().item())

    batches = Batches()
    trained(make_data(1, epochs_per_task=2), batches, folder=tmp_path, overfit_batches=3)
    assert batches.sums[:3] == batches.sums[3:]
    batches.sums.clear()
    trained(make_data(1, epochs_per_task=2), batches, folder=tmp_path, limit_train_batches=3)
    assert batches.sums[:3] != batches.sums[3:]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda optimizer, steps: ReduceLROnPlateau(optimizer), "ReduceLROnPlateau needs a metric"),
        (lambda optimizer, steps: OneCycleLR(optimizer, 0.1, total_steps=4), "total_steps=4 of the 5 steps"),
        (lambda optimizer, steps: OneCycleLR(optimizer, 0.1), "The schedule's options do not work"),
    ],
)
def test_schedules_that_do_not_fit_a_task_are_refused(schedule, message, tmp_path):
    data, model = make_data(), make_model(schedule=schedule)
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(model, data, folder=tmp_path).fit(model, data)


def test_an_optimizer_of_matrices_is_refused(tmp_path):
    """The weights of several layers in one row are no matrix."""
    data, model = make_data(), make_model(optimizer=lambda parameters: torch.optim.Muon(parameters, lr=0.1))
    with pytest.raises(ConfigurationError, match="The optimizer's options do not work: Muon only supports 2D"):
        make_trainer(model, data, folder=tmp_path).fit(model, data)


def test_a_cycle_as_long_as_the_task_works(tmp_path):
    data = make_data()
    model = make_model(schedule=lambda optimizer, steps: OneCycleLR(optimizer, 0.1, total_steps=steps))
    make_trainer(model, data, folder=tmp_path).fit(model, data)
    assert model.method.tasks.tolist() == [0, 1]


# Refused before training.

REFUSED = [
    ({"fast_dev_run": True}, "fast_dev_run=True.* limit_train_batches=1 and limit_test_batches=1"),
    ({"max_steps": 7}, "max_steps=7.* data.steps_per_task"),
    ({"max_epochs": 3}, "max_epochs=3.* data.num_epochs, here 2"),
    ({"max_epochs": -1}, "max_epochs=-1.* data.num_epochs, here 2"),
    ({"reload_dataloaders_every_n_epochs": 0}, "reload_dataloaders_every_n_epochs=0"),
    ({"limit_train_batches": 0}, "limit_train_batches=0.* trains nothing"),
    ({"limit_train_batches": 0.01}, "limit_train_batches=0.01.* 5 batches of task 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[next(iter(options)) for options, _ in REFUSED])
def test_options_that_would_spoil_tasks_are_refused(options, message, tmp_path):
    data, model = make_data(), make_model()
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(model, data, folder=tmp_path, **options).fit(model, data)
    assert not len(model.method.tasks)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: lightning_callbacks.EarlyStopping("val/accuracy", mode="max"), "data.patience"),
        (lambda: lightning_callbacks.StochasticWeightAveraging(1e-2), "averages scores"),
        (lambda: lightning_callbacks.EMAWeightAveraging(), "averages scores"),
        (lambda: lightning_callbacks.ModelPruning("l1_unstructured"), "mask.sparsity"),
        (lambda: lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 2}), "accumulate_grad_batches"),
        (lambda: lightning_callbacks.BackboneFinetuning(), "frozen throughout"),
        (lambda: lightning_callbacks.LearningRateFinder(), "takes the callbacks away"),
        (lambda: lightning_callbacks.BatchSizeFinder(), "takes the callbacks away"),
    ],
)
def test_callbacks_that_do_not_go_with_tasks_are_refused(callback, message, tmp_path):
    data, model = make_data(), make_model()
    model.lr = 1e-3
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(model, data, callback(), folder=tmp_path).fit(model, data)


@pytest.mark.parametrize(
    "strategy", ["ddp_spawn", "ddp_fork_find_unused_parameters_true", DDPStrategy(start_method="fork")]
)
def test_copies_of_the_process_are_refused(strategy, tmp_path):
    """Only the weights come back from them. Asked of one process, as the command line does."""
    data, model = make_data(), make_model()
    trainer = make_trainer(model, data, folder=tmp_path, strategy=strategy, devices=2)
    with pytest.raises(ConfigurationError, match=r"strategy=ddp_(spawn|fork)\) .* trainer.strategy=ddp"):
        check_run(trainer, "fit")


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_the_tuner_is_refused_with_its_reason(search, tmp_path):
    data, model = make_data(), make_model()
    model.lr = 1e-3
    tuner = Tuner(make_trainer(model, data, folder=tmp_path))
    with pytest.raises(ConfigurationError, match="takes the callbacks away that begin and finish tasks"):
        getattr(tuner, search)(model, datamodule=data)
    assert data.batch_size == 32


def test_the_task_callbacks_are_given_once(tmp_path):
    data, model = make_data(), make_model()
    once = model.task_callbacks(data)
    with pytest.raises(ConfigurationError, match="No callback begins .* once"):
        make_trainer(model, data, folder=tmp_path, task_callbacks=[]).fit(model, data)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `TaskBoundary`"):  # Lightning's own
        make_trainer(model, data, folder=tmp_path, task_callbacks=[*once, *once])


def test_loaders_in_place_of_the_data_module_are_refused(tmp_path):
    data, model = make_data(), make_model()
    loader = DataLoader(TensorDataset(torch.zeros(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64)), batch_size=32)
    trainer = make_trainer(model, data, folder=tmp_path)
    with pytest.raises(ConfigurationError, match=r"\(DataLoader\) know no tasks"):
        trainer.fit(model, train_dataloaders=loader)
    trainer.fit(model, data)
    with pytest.raises(ConfigurationError, match=r"\(DataLoader\) know no tasks"):  # not task 0, as it was taken for
        trainer.test(model, dataloaders=loader)
    with pytest.raises(ConfigurationError, match="limit_test_batches=0"):
        make_trainer(model, data, folder=tmp_path, limit_test_batches=0).test(model, data)


@pytest.mark.parametrize("option", ["limit_train_batches", "overfit_batches"])
def test_an_unannounced_stream_is_not_cut(option, tmp_path):
    data, model = Unannounced(make_data()), make_model(NNS)
    with pytest.raises(ConfigurationError, match=f"{option}=3.* leave out parts of the stream"):
        make_trainer(model, data, folder=tmp_path, **{option: 3}).fit(model, data)


# Options that change nothing.


@pytest.mark.parametrize(
    "options",
    [
        {"barebones": True},
        {"detect_anomaly": True},
        {"num_sanity_val_steps": 0},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"limit_val_batches": 0},
        {"use_distributed_sampler": False, "sync_batchnorm": True, "min_epochs": 1, "min_steps": 3},
        {"inference_mode": False, "deterministic": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_masks_do_not_depend_on_how_a_trainer_watches(options, tmp_path, reference):
    data = make_data()
    if options.get("barebones"):
        options = {**options, "logger": None, "enable_progress_bar": None, "enable_model_summary": None}
        options |= {"enable_checkpointing": None}
    model, trainer = trained(data, folder=tmp_path, **options)
    assert torch.equal(model.method.bank.packed, reference.method.bank.packed)
    trainer.test(model, data, verbose=False)
    assert not model.test_accuracy.compute().isnan().any()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> ContinualModule:
    """Two tasks of five steps."""
    return trained(make_data(), folder=tmp_path_factory.mktemp("reference"))[0]


# Training that was stopped.


def test_whoever_asks_to_stop_waits_for_the_end_of_the_epoch(tmp_path, reference):
    """A mask is never that of half a task, and the same Trainer goes on to the same masks."""
    data = make_data()
    model, trainer = trained(data, Stop(2), folder=tmp_path)
    assert model.method.tasks.tolist() == [0]
    assert trainer.global_step == 5
    with pytest.raises(ConfigurationError, match="Task 1 of data.num_tasks=2 was never learned"):
        trainer.test(model, data, verbose=False)
    trainer.fit(model, data)
    assert torch.equal(model.method.bank.packed, reference.method.bank.packed)


def test_the_same_trainer_goes_on_with_the_same_data_alone(tmp_path):
    """Tasks of another seed would join those there are, as one model of no seed."""
    model, trainer = trained(make_data(3), Stop(5), folder=tmp_path)
    assert model.method.tasks.tolist() == [0]
    with pytest.raises(MismatchError, match=r"What this Trainer has trained so far .* data\.seed=0 there, 1 here"):
        trainer.fit(model, make_data(3, seed=1))
    trainer.fit(model, make_data(3))
    assert model.method.tasks.tolist() == [0, 1, 2]


def test_time_that_is_over_leaves_whole_tasks_and_a_checkpoint_that_goes_on(tmp_path, reference):
    data = make_data()
    checkpoints = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    model, _ = trained(data, checkpoints, folder=tmp_path, max_time={"seconds": 0})
    assert model.method.tasks.tolist() in ([], [0])  # asked before the first step, or within it
    model, _ = trained(data, Stop(2), ModelCheckpoint(tmp_path, filename="last"), folder=tmp_path)
    resumed = make_model()
    last = max(tmp_path.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    make_trainer(resumed, data, folder=tmp_path).fit(resumed, data, ckpt_path=str(last))
    assert torch.equal(resumed.method.bank.packed, reference.method.bank.packed)


def test_an_unannounced_stream_stops_between_epochs(tmp_path):
    data = Unannounced(make_data(2, 12), steps_per_epoch=6)
    model, trainer = trained(data, Stop(2), folder=tmp_path, scenario=NNS)
    assert trainer.global_step == 6
    with pytest.raises(ConfigurationError, match="of data.num_tasks=2 .* never learned"):
        trainer.test(model, data, verbose=False)
    trainer.fit(model, data)
    assert trainer.global_step == 24
    trainer.test(model, data, verbose=False)


def test_a_task_of_several_epochs_goes_on_from_a_checkpoint_alone(tmp_path):
    data = make_data(1, epochs_per_task=3, batch_size=512)
    model, trainer = trained(data, Stop(2), folder=tmp_path)
    with pytest.raises(ConfigurationError, match="stopped within task 0, .*ckpt_path"):
        trainer.fit(model, data)


# Cells run again.


def test_a_cell_that_is_run_again_says_what_is_over(tmp_path):
    data = make_data()
    model, trainer = trained(data, folder=tmp_path)
    with pytest.raises(ConfigurationError, match="Training is over: .* make a new model and a new Trainer"):
        trainer.fit(model, data)
    with pytest.raises(ConfigurationError, match="Tasks 0 to 1 are finished, .* trained again"):
        make_trainer(model, data, folder=tmp_path).fit(model, data)
    trainer.test(model, data, verbose=False)
    assert not model.test_accuracy.compute().isnan().any()


@pytest.mark.parametrize("scenario", [GG, GNU])
def test_tasks_that_were_never_learned_are_named(scenario, tmp_path):
    data, model = make_data(3), make_model(scenario)
    trainer = make_trainer(model, data, folder=tmp_path)
    for ask in (trainer.test, trainer.validate):
        with pytest.raises(ConfigurationError, match="Tasks 0 to 2 of data.num_tasks=3 were never learned"):
            ask(model, data, verbose=False)
    two = make_data(2)
    model, trainer = trained(two, folder=tmp_path, scenario=scenario)
    with pytest.raises(ConfigurationError, match="Task 2 of data.num_tasks=3 was never learned"):
        trainer.test(model, data, verbose=False)
    assert len(trainer.test(model, make_data(1), verbose=False)) == 1  # fewer are fine


def test_the_test_shows_each_task_its_own_accuracy(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    data = make_data(3, 20)
    model, trainer = trained(data, folder=tmp_path)
    capsys.readouterr()
    results = trainer.test(model, data)
    accuracy = model.test_accuracy.compute()[0]
    assert len({*accuracy.tolist()}) == 3  # otherwise this says nothing
    assert [result["test/accuracy"] for result in results] == [pytest.approx(accuracy.mean().item())] * 3
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("│")]
    shown = [tuple(cell.strip() for cell in line.strip("│ ").split("│")) for line in printed]
    assert shown == [
        *((str(task), f"{own:.4f}") for task, own in enumerate(accuracy)),
        ("all", f"{accuracy.mean():.4f}"),
    ]
    task_table.show(torch.rand(2, 2500), found=True)
    assert len(capsys.readouterr().out.splitlines()) < 60


def test_an_accuracy_matrix_and_its_last_row_are_of_the_same_images(tmp_path):
    data = make_data(2, 20)
    model, trainer = trained(data, folder=tmp_path, limit_test_batches=1)
    trainer.test(model, data, verbose=False)
    assert model.test_accuracy.images.tolist() == [32, 32]
    matrix = next(c for c in trainer.callbacks if isinstance(c, EvaluateSeenTasks)).matrix
    assert matrix[0, 0] == matrix[1, 0]  # GG: nothing is forgotten
    assert shortened(trainer, {}) == {"limit_test_batches": 1}


def test_validation_by_itself_asks_every_task(tmp_path, reference):
    data = make_data()
    trainer = make_trainer(reference, data, folder=tmp_path)
    result = trainer.validate(reference, data, verbose=False)
    by_task = reference.validation_accuracy.compute()[0]
    for task in range(2):
        images, labels = next(iter(data.val_loader(task)))
        with torch.no_grad():
            right = reference.method.eval()(images, task).argmax(1) == labels
        assert by_task[task] == right.double().mean()
    assert result[0]["val/accuracy"] == pytest.approx(by_task.mean().item())


def test_prediction_by_itself_takes_the_test_images_or_any_others(tmp_path):
    data = make_data()
    model, trainer = trained(data, folder=tmp_path, scenario=GNU)
    predicted = trainer.predict(model, data)
    assert len(predicted) == 2
    assert sum(len(labels) for _, labels in predicted[0]) == len(data._task(0).test)
    tasks, labels = make_trainer(model, data, folder=tmp_path).predict(
        model, DataLoader(torch.zeros(7, 1, 8, 8), batch_size=7)
    )[0]
    assert len(tasks) == len(labels) == 7


# Checkpoints.


@pytest.mark.parametrize("scenario", [GG, GNU])
def test_the_best_checkpoint_is_refused_and_changes_nothing(scenario, tmp_path):
    torch.manual_seed(0)
    data = make_data(3, 20)
    best = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max", save_top_k=-1)
    model, trainer = trained(data, best, folder=tmp_path, scenario=scenario)
    before = trainer.test(model, data, verbose=False)
    best.best_model_path = str(next(tmp_path.glob("epoch=0*.ckpt")))
    for ask in (trainer.test, trainer.predict):
        with pytest.raises(ConfigurationError, match="before tasks 1 to 2 of the model .* leave ckpt_path out"):
            ask(model, datamodule=data, ckpt_path="best")
    assert model.method.tasks.tolist() == [0, 1, 2]
    assert trainer.test(model, data, verbose=False) == before
    fresh = make_model(scenario)
    with pytest.raises(ConfigurationError, match="Tasks 1 to 2 of data.num_tasks=3 were never learned"):
        make_trainer(fresh, data, folder=tmp_path).test(fresh, data, ckpt_path=best.best_model_path)


@pytest.mark.parametrize("method", [SupSup, LowerBound])
@pytest.mark.parametrize(("length", "step"), [({"steps": 10}, 14), ({"epochs_per_task": 2, "batch_size": 256}, 9)])
def test_a_checkpoint_from_within_an_epoch_goes_on_to_the_same_masks_or_is_refused(
    length, step, method, tmp_path, caplog
):
    whole = trained(make_data(2, **length), folder=tmp_path, method=method)[0].method
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    with pytest.raises(RuntimeError):
        trained(make_data(2, **length), every, Stop(step + 1, error=RuntimeError), folder=tmp_path, method=method)
    data, model = make_data(2, **length), make_model(method=method)
    trainer = make_trainer(model, data, folder=tmp_path)
    path = str(tmp_path / f"step={step}.ckpt")
    if method is LowerBound:
        with pytest.raises(
            ConfigurationError, match="within an epoch .*in task . at its step .* LowerBound cannot begin"
        ):
            trainer.fit(model, data, ckpt_path=path)
        return
    with caplog.at_level(logging.WARNING):
        trainer.fit(model, data, ckpt_path=path)
    assert "within an epoch; the task is trained again from its first step" in caplog.text
    assert torch.equal(model.method.bank.packed, whole.bank.packed)
    assert torch.equal(model.method.bank.statistics, whole.bank.statistics)


def test_a_checkpoint_of_an_epochs_last_step_loses_no_task(tmp_path, reference):
    """Lightning takes the epoch for finished, and the task in training would never be."""
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    with pytest.raises(RuntimeError):
        trained(make_data(), every, Stop(6, error=RuntimeError), folder=tmp_path)
    data, model = make_data(), make_model()
    make_trainer(model, data, folder=tmp_path).fit(model, data, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert torch.equal(model.method.bank.packed, reference.method.bank.packed)


def test_what_an_exception_leaves_goes_on_by_itself(tmp_path, reference):
    rescue = lightning_callbacks.OnExceptionCheckpoint(tmp_path)
    rescue.teardown = lambda *_: None  # as after a kill
    with pytest.raises(RuntimeError):
        trained(make_data(), rescue, Stop(7, error=RuntimeError), folder=tmp_path)
    model, _ = trained(make_data(), lightning_callbacks.OnExceptionCheckpoint(tmp_path), folder=tmp_path)
    assert torch.equal(model.method.bank.packed, reference.method.bank.packed)


def test_a_run_goes_on_with_the_options_that_it_began_with(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    trained(make_data(), Stop(2), checkpoint, folder=tmp_path)
    for options, message in (
        ({"limit_train_batches": 3}, "trainer.limit_train_batches=1.0 there, 3 batches here"),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val=None there, 1.0 here"),
        ({"precision": "bf16-mixed"}, "trainer.precision=32-true there, bf16-mixed here"),
    ):
        data, model = make_data(), make_model()
        trainer = make_trainer(model, data, folder=tmp_path, **options)
        with pytest.raises(MismatchError, match=message):
            trainer.fit(model, data, ckpt_path=str(tmp_path / "last.ckpt"))
    for training, message in (
        ({"optimizer": lambda scores: Adam(scores, lr=1e-2, betas=(0.9, 0.99))}, "optimizer.lr=0.001 there, 0.01 here"),
        ({"optimizer": lambda scores: SGD(scores, lr=0.1)}, "optimizer.kind=Adam there, SGD here"),
        ({"schedule": constant}, "schedule at step 1 0.9045 of the learning rate there, 1 here"),
    ):
        data, model = make_data(), make_model(**training)
        with pytest.raises(MismatchError, match=message):
            make_trainer(model, data, folder=tmp_path).fit(model, data, ckpt_path=str(tmp_path / "last.ckpt"))
        assert not len(model.method.tasks)
    other = ContinualDataModule(Split(Digits(), classes_per_task=5), steps_per_task=5, batch_size=32)
    other_model = make_model()
    with pytest.raises(MismatchError, match="data.stream=Permuted there, Split here"):
        make_trainer(other_model, other, folder=tmp_path).fit(other_model, other, ckpt_path=str(tmp_path / "last.ckpt"))


def test_masks_alone_are_tested_and_not_trained_on(tmp_path, reference):
    trained(make_data(), ModelCheckpoint(tmp_path, filename="x", save_weights_only=True), folder=tmp_path)
    data, model = make_data(), make_model()
    trainer = make_trainer(model, data, folder=tmp_path)
    with pytest.raises(ConfigurationError, match="holds the masks alone .*save_weights_only=True"):
        trainer.fit(model, data, ckpt_path=str(tmp_path / "x.ckpt"))
    assert not len(model.method.tasks)
    trainer.test(model, data, ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
    assert torch.equal(model.method.bank.packed, reference.method.bank.packed)


def test_an_optimizer_is_compared_by_what_it_does(tmp_path, reference):
    trained(make_data(), Stop(2), ModelCheckpoint(tmp_path, filename="last"), folder=tmp_path)
    data = make_data()
    model = make_model(
        optimizer=lambda scores: Adam(scores, lr=0.001, betas=[0.9, 0.99], fused=True),
        schedule=lambda optimizer, steps: LambdaLR(optimizer, lambda step: 0.5 * (1 + cos(pi * step / steps))),
    )
    make_trainer(model, data, folder=tmp_path).fit(model, data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert torch.equal(model.method.bank.packed, reference.method.bank.packed)


def test_the_first_tasks_of_a_run_that_broke_off_are_tested_by_themselves(tmp_path, reference):
    trained(make_data(3), Stop(7), ModelCheckpoint(tmp_path, filename="last"), folder=tmp_path)
    data, model = make_data(2), make_model()
    trainer = make_trainer(model, data, folder=tmp_path)
    tested = trainer.test(model, data, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert tested == make_trainer(reference, data, folder=tmp_path).test(reference, data, verbose=False)
    other = make_data(2, seed=1)
    with pytest.raises(MismatchError, match="data.seed=0 there, 1 here"):
        trainer.test(model, other, ckpt_path=str(tmp_path / "last.ckpt"))
    with pytest.raises(MismatchError, match="data.num_tasks=3 there, 2 here"):  # to train on is another run
        trainer.fit(make_model(), data, ckpt_path=str(tmp_path / "last.ckpt"))


def test_options_are_compared_by_what_they_mean(tmp_path):
    for spellings in ((None, "none"), (CropFlip(), "crop_flip")):
        assert len({name_of(option) for option in spellings}) == 1
    data = make_data(augment="none")
    state = {**data.state_dict(), "augment": "NoneType"}  # as written by an older notebook
    state |= {"num_classes": tuple(state["num_classes"]), "validation_share": 0.05}
    make_data().load_state_dict(state)
    with pytest.raises(MismatchError, match="data.augment=crop_flip there, none here"):
        data.load_state_dict({**state, "augment": "crop_flip"})
    in_yaml = SupSup(make_network(), rule="topk", sparsity=0, seed=0)
    in_python = SupSup(make_network(), rule="topk", sparsity=0.0, seed=0)
    in_yaml.load_state_dict(in_python.state_dict())
