import lightning as L
import pytest
import torch
from torch.utils.data import TensorDataset

from supsup_lightning import (
    GG,
    GNS,
    GNU,
    ContinualDataModule,
    ContinualModule,
    Given,
    LeNet,
    OneShot,
    PermutedDigits,
    PermutedMNIST,
    SupSup,
)
from supsup_lightning.callbacks import TaskBoundary
from supsup_lightning.data import DataModuleSequence, Datasets, Digits, Mixed, Split, Whole
from supsup_lightning.errors import ConfigurationError, DataError, TrainingDiverged
from supsup_lightning.report.metrics import TaskAccuracy
from tests.conftest import digits_lenet, first_losses, fit, random_images, random_method


class Record(L.Callback):
    """Keeps the losses, and the logits of task 0 after each task."""

    def __init__(self, images):
        self.images = images
        self.losses = []
        self.logits = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            self.logits.append(pl_module.method(self.images, 0))


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({}, [4.81669, 4.260407, 3.699783, 2.86435]),
        ({"rule": "topk", "sparsity": 0.5}, [4.961874, 3.96529, 3.129582, 2.07839]),
    ],
    ids=["threshold", "topk"],
)
def test_golden_loss_of_four_steps(options, golden):
    """Any change of these numbers is a change of the method: of its initialisation, gradients, data or optimizer."""
    assert first_losses(digits_lenet(**options), lr=1.0) == pytest.approx(golden, rel=1e-4)


@pytest.mark.parametrize("allocation", ["uniform", "erdos_renyi"])
def test_topk_learns_at_exactly_its_sparsity(allocation, tmp_path):
    data = PermutedDigits(num_tasks=1, steps_per_task=150)
    method = digits_lenet(rule="topk", sparsity=0.6, allocation=allocation)
    module, trainer = fit(method, data, folder=tmp_path, scenario=GG, inference=Given())
    trainer.test(module, data, verbose=False)
    assert module.test_accuracy.compute()[0, 0] > 0.85
    assert method.sparsity().item() == pytest.approx(0.6, abs=1e-3)


def test_training_is_reproducible_and_old_tasks_keep_their_logits_bit_for_bit(tmp_path):
    runs = []
    for _ in range(2):
        torch.manual_seed(torch.seed())  # the state of the global generator must not matter
        data = PermutedDigits(num_tasks=3, steps_per_task=30)
        module = ContinualModule(digits_lenet())
        record = Record(random_images(20))
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=3,
            reload_dataloaders_every_n_epochs=1,
            callbacks=[*module.task_callbacks(data), record],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data)
        runs.append((record, module.method.bank.packed))
        assert torch.equal(record.logits[0], record.logits[1])
        assert torch.equal(record.logits[0], record.logits[2])
    assert runs[0][0].losses == runs[1][0].losses
    assert len(runs[0][0].losses) == 90
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_notebook_lines_learn_and_find_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning's default logger and checkpoints go there
    data = PermutedDigits(num_tasks=3, steps_per_task=150)
    model = ContinualModule(digits_lenet(), inference=OneShot("superfluous", images="batch"))
    trainer = L.Trainer(
        callbacks=model.task_callbacks(data), max_epochs=data.num_epochs, reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(model, data)
    logged = trainer.test(model, data)[0]
    accuracy, found = model.test_accuracy.compute()
    assert logged == {"test/accuracy": pytest.approx(accuracy.mean()), "test/task_found": pytest.approx(1.0)}
    assert accuracy.mean() > 0.9
    assert found.mean() == 1
    images, labels = next(iter(data.test_loader(1)))
    tasks, predicted = model.infer(images)
    assert tasks.tolist() == [1] * 128
    assert (predicted == labels).float().mean() > 0.85


def test_scenarios_count_as_they_say():
    """Three tasks whose network always answers class 0 of task 1."""
    method = random_method(3)
    images, labels = random_images(4), torch.tensor([0, 0, 1, 1])

    class AlwaysOne(OneShot):
        def decide(self, method, images, num_classes):
            return torch.tensor(1)

    def counts(scenario, inference, task):
        module = ContinualModule(method, inference=inference, scenario=scenario)
        module.num_classes = (2, 2, 2)
        module.classes = lambda logits, task: torch.zeros(len(logits), dtype=torch.int64)
        accuracy = TaskAccuracy(3)
        module.evaluate((images, labels), task=task, accuracy=accuracy)
        return tuple(accuracy.compute()[:, task].tolist())

    assert counts(GG, Given(), 0) == (0.5, 1)
    assert counts(GNS, AlwaysOne(), 0) == (0.5, 0)  # the class is enough
    assert counts(GNU, AlwaysOne(), 0) == (0, 0)  # the task has to be right, too
    assert counts(GNU, AlwaysOne(), 1) == (0.5, 1)


def test_infer_mixed_batches_and_leaves_the_mode_alone():
    method = random_method(4)
    module = ContinualModule(method, inference=OneShot(images="each"))
    module.num_classes = (10,) * 4
    images = random_images(12)
    module.train()
    tasks, labels = module.infer(images)
    assert module.training
    assert len(tasks.unique()) > 1
    expected = [
        method(image, task)[:, :10].argmax().item() for image, task in zip(images.split(1), tasks.tolist(), strict=True)
    ]
    assert labels.tolist() == expected


def test_a_checkpoint_with_seven_masks_loads_into_a_fresh_module(tmp_path):
    data = PermutedDigits(num_tasks=7, steps_per_task=3)
    module, trainer = fit(digits_lenet(), data, folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "seven.ckpt")
    state = torch.load(tmp_path / "seven.ckpt", weights_only=True)["state_dict"]
    fresh = ContinualModule(digits_lenet(), inference=OneShot())
    fresh.load_state_dict(state)
    assert len(fresh.method.bank) == 7
    images = random_images(9)
    assert all(torch.equal(a, b) for a, b in zip(fresh.infer(images), module.eval().infer(images), strict=True))


@pytest.mark.parametrize(
    ("scenario", "inference", "message"),
    [
        (GG, OneShot(), "scenario=gg the task is known .* use inference=given"),
        (GNU, Given(), "scenario=gnu the task is hidden .* use inference=discriminant, one_shot"),
        (GNS, Given(), "scenario=gns the task is hidden"),
    ],
)
def test_an_inference_that_does_not_fit_the_scenario_is_refused(scenario, inference, message):
    with pytest.raises(ConfigurationError, match=message):
        ContinualModule(random_method(0), scenario=scenario, inference=inference)


@pytest.mark.parametrize(
    ("method", "inference", "message"),
    [
        (
            lambda: SupSup(LeNet(output_size=5, input_shape=(1, 8, 8))),
            OneShot(),
            "output_size=5 is smaller than the 10",
        ),
        (
            lambda: SupSup(LeNet(output_size=10, input_shape=(1, 8, 8))),
            OneShot("superfluous"),
            "network.output_size=10 and the tasks have 10 classes",
        ),
        (
            lambda: SupSup(LeNet(output_size=20)),
            OneShot(),
            r"LeNet does not take inputs of shape \[1, 8, 8\] .* data.input_shape=\[1, 8, 8\]",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_training(method, inference, message, tmp_path):
    data = PermutedDigits(num_tasks=1, steps_per_task=1)
    with pytest.raises(ConfigurationError, match=message):
        fit(method(), data, folder=tmp_path, inference=inference)


@pytest.mark.parametrize("change", [lambda images: images[..., :7], lambda images: (images * 9).long()])
def test_inputs_of_another_kind_in_a_later_task_are_refused_before_training(change, tmp_path):
    labels = torch.arange(40) % 2
    images = torch.rand(40, 1, 8, 8)
    sets = [TensorDataset(part, labels) for part in (images, change(images))]
    modules = [L.LightningDataModule.from_datasets(part, test_dataset=part, batch_size=8) for part in sets]
    for data in (
        ContinualDataModule(Mixed([Whole(Datasets(part, part)) for part in sets]), steps_per_task=1, batch_size=8),
        DataModuleSequence(modules, num_classes=2, steps_per_task=1),
    ):
        method = SupSup(LeNet(output_size=20, input_shape=(1, 8, 8)))
        with pytest.raises(ConfigurationError, match="as task 1 has them .*Bring the images of all tasks to one"):
            fit(method, data, folder=tmp_path)
        assert not len(method.bank)


def test_output_size_equal_to_the_classes_is_fine_with_entropy(tmp_path):
    data = PermutedDigits(num_tasks=2, steps_per_task=2)
    method = SupSup(LeNet(output_size=10, input_shape=(1, 8, 8)))
    module, _ = fit(method, data, folder=tmp_path, inference=OneShot("entropy"))
    assert len(module.method.bank) == 2


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1e37, TrainingDiverged, "The loss became (nan|inf) in task 1 at its step 7.*Lower the learning rate"),
        (float("nan"), DataError, "images of the batch in task 1 at its step 7 hold a NaN"),
    ],
)
def test_a_diverging_loss_stops_with_task_and_step_and_keeps_finished_tasks(value, error, message, tmp_path):
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 7:
                batch[0].fill_(value)

    data = PermutedDigits(num_tasks=3, steps_per_task=20)
    module = ContinualModule(digits_lenet())
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[*module.task_callbacks(data), Poison()],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(error, match=message):
        trainer.fit(module, data)
    assert module.method.tasks.tolist() == [0]


def test_a_trainer_that_would_mix_up_tasks_is_refused(tmp_path):
    data = PermutedDigits(num_tasks=2, steps_per_task=2)
    for options, message in (
        ({"max_epochs": 2}, "reload_dataloaders_every_n_epochs=0"),
        ({"max_epochs": 1, "reload_dataloaders_every_n_epochs": 1}, r"max_epochs=1\) must be data.num_epochs, here 2"),
    ):
        module = ContinualModule(digits_lenet())
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            callbacks=[TaskBoundary()],
            default_root_dir=tmp_path,
            **options,
        )
        with pytest.raises(ConfigurationError, match=message):
            trainer.fit(module, data)


def test_without_the_boundary_callback_the_error_names_it(tmp_path):
    module = ContinualModule(digits_lenet())
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    with pytest.raises(ConfigurationError, match="model.task_callbacks"):
        trainer.fit(module, PermutedDigits(num_tasks=1, steps_per_task=1))


def test_infer_before_training_says_so():
    with pytest.raises(ConfigurationError, match="no finished task"):
        ContinualModule(random_method(0)).infer(random_images(2))


@pytest.mark.slow
def test_permuted_mnist_is_learned_and_told_apart(mnist_root, tmp_path):
    data = PermutedMNIST(root=mnist_root, num_tasks=3, steps_per_task=300)
    module, trainer = fit(SupSup(LeNet(output_size=100)), data, folder=tmp_path, inference=OneShot("superfluous"))
    trainer.test(module, data, verbose=False)
    accuracy, found = module.test_accuracy.compute()
    assert accuracy.mean() > 0.92
    assert found.mean() > 0.97


def test_a_resume_within_a_task_of_another_length_keeps_its_schedule_and_its_bits(tmp_path):
    def run(*, stop_in: int | None = None, resume: bool = False) -> torch.Tensor:
        class Stop(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == stop_in:
                    trainer.save_checkpoint(tmp_path / "last.ckpt")
                    raise KeyboardInterrupt

        # 4, 4 and 2 classes: the last task has fewer steps per epoch than the first
        data = ContinualDataModule(Split(Digits(), classes_per_task=4), epochs_per_task=3, batch_size=32)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 40), torch.nn.BatchNorm1d(40))
        torch.manual_seed(0)
        torch.nn.init.normal_(network[1].bias)
        module = ContinualModule(SupSup(network), scenario=GG, inference=Given())
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=data.num_epochs,
            reload_dataloaders_every_n_epochs=1,
            callbacks=[*module.task_callbacks(data), Stop()],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
        )
        try:
            trainer.fit(module, data, ckpt_path=tmp_path / "last.ckpt" if resume else None)
        except (KeyboardInterrupt, SystemExit):
            assert stop_in is not None
        return module.method.bank

    whole = run()
    run(stop_in=6)  # after the first of the last task's three epochs
    resumed = run(resume=True)
    assert len(resumed) == 3
    assert torch.equal(resumed.packed, whole.packed)
    assert torch.equal(resumed.statistics, whole.statistics)
