"""Inference by the gate: found tasks, files, resumed runs, other methods, and options that are refused."""

import copy
import itertools

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from supsup_lightning import (
    BatchEnsemble,
    ContinualDataModule,
    ContinualModule,
    DataModuleSequence,
    Discriminant,
    LeNet,
    OneShot,
    PermutedDigits,
    SupSup,
)
from supsup_lightning.data import Digits, Split
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.gate import Gate
from supsup_lightning.gate.features import KINDS
from supsup_lightning.gate.gate import NAMERS
from supsup_lightning.scenario import GG, GNS, NNS
from tests.conftest import StopAfter, digits_lenet, fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five tasks of two digits, whose single images the gate tells apart."""
    folder = tmp_path_factory.mktemp("gate")
    return (*fit(digits_lenet(), _split(), folder=folder, inference=Discriminant()), folder)


def test_it_finds_tasks_that_look_alike(trained):
    module, trainer, _ = trained
    trainer.test(module, _split(), verbose=False)
    accuracy, found = module.test_accuracy.compute().float()
    assert found.mean() > 0.93
    assert accuracy.mean() > 0.92
    images, labels = next(iter(_split().test_loader(3)))
    tasks, named = module.infer(images)
    assert (tasks == 3).float().mean() > 0.9
    assert (named == labels).float().mean() > 0.85


def test_masks_do_not_depend_on_the_gate(trained, tmp_path):
    module, _, _ = trained
    plain, _ = fit(digits_lenet(), _split(), folder=tmp_path, inference=OneShot())
    assert torch.equal(plain.method.bank.packed, module.method.bank.packed)


def test_a_bank_file_predicts_as_the_run_did(trained, tmp_path):
    module, _, _ = trained
    module.method.save(tmp_path / "bank.safetensors")
    images, _ = next(iter(_split().test_loader(1)))
    for inference in (Discriminant(), Discriminant("convolution")):
        other = ContinualModule(digits_lenet(), inference=inference)
        other.method.load(tmp_path / "bank.safetensors")
        other.num_classes = module.num_classes
        assert all(torch.equal(*pair) for pair in zip(other.infer(images), module.infer(images), strict=True))
        other.method.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bank.safetensors").read_bytes()
    data, wrong = _split(), ContinualModule(digits_lenet(), inference=Discriminant("projection"))
    data.setup()
    wrong.method.gate.choose_features(wrong.method, data.example(), keeps_neighbours=True)
    with pytest.raises(MismatchError, match=r"features .*projection"):
        wrong.method.load(tmp_path / "bank.safetensors")
    without = ContinualModule(digits_lenet(), inference=OneShot())
    without.method.load(tmp_path / "bank.safetensors")
    assert torch.equal(without.method.bank.packed, module.method.bank.packed)
    assert "gate" in module.method.kept_bytes()
    assert "gate" not in without.method.kept_bytes()


def test_a_resumed_run_ends_with_the_same_bytes(trained, tmp_path):
    module, _, _ = trained
    checkpoint = tmp_path / "half.ckpt"
    half = [StopAfter(1, checkpoint)]
    fit(digits_lenet(), _split(), folder=tmp_path, inference=Discriminant(), callbacks=half)
    resumed, _ = fit(digits_lenet(), _split(), folder=tmp_path, inference=Discriminant(), checkpoint=checkpoint)
    for name, value in module.method.kept().items():
        assert torch.equal(resumed.method.kept()[name], value), name
    loaded = ContinualModule.load_from_checkpoint(
        checkpoint, method=digits_lenet(), inference=Discriminant(), weights_only=True
    )
    assert loaded.method.gate.description == module.method.gate.description
    assert len(loaded.method.gate.sums) == 4


def test_banks_trained_apart_join_their_sums(trained, tmp_path):
    module, _, _ = trained
    whole = module.method
    whole.save(tmp_path / "whole.safetensors")
    halves = []
    for half, removed in enumerate([(0, 1, 2), (3, 4)]):
        method = ContinualModule(digits_lenet(), inference=Discriminant(per_task=False)).method
        method.load(tmp_path / "whole.safetensors")
        for task in removed:
            method.bank.remove(task)
        method.save(tmp_path / f"{half}.safetensors")
        halves.append(method)
    first = halves[0]
    assert len(first.tasks) == 2
    assert len(first.gate.sums) == 10
    with pytest.raises(MismatchError, match="would count them twice"):
        first.merge(tmp_path / "1.safetensors")
    assert len(first.tasks) == 2


@pytest.mark.parametrize("images", [1, 5, "batch"])
def test_several_images_decide_together(trained, images):
    module, _, _ = trained
    together = ContinualModule(module.method, inference=Discriminant(images=images))
    together.num_classes = module.num_classes
    batch, _ = next(iter(_split().test_loader(4)))
    gate = module.method.gate
    number = len(batch) if images == "batch" else images
    log_posterior = gate.discriminant(module.method.tasks).log_posterior_of_tasks(gate.features(module.method, batch))
    prior = gate.discriminant(module.method.tasks).log_prior_of_tasks()
    expected = (log_posterior[:number].sum(0) - (number - 1) * prior).argmax()
    assert set(together.infer(batch)[0].tolist()) == {int(module.method.tasks[expected])}


@pytest.mark.parametrize("classes", NAMERS)
def test_who_names_the_class(trained, classes):
    module, _, _ = trained
    naming = ContinualModule(module.method, inference=Discriminant(classes=classes))
    naming.num_classes = module.num_classes
    batch, _ = next(iter(_split().test_loader(2)))
    tasks, labels = naming.infer(batch)
    gate = module.method.gate
    log_posterior = gate.discriminant(module.method.tasks).log_posterior(gate.features(module.method, batch))
    for row, task in enumerate(tasks.tolist()):
        by_mask = module.method(batch, task)[row, :2].log_softmax(0)
        own = log_posterior[row, gate.sums.tasks == task]
        ways = {"mask": by_mask, "discriminant": own, "both": by_mask + own}
        assert labels[row] == ways[classes].argmax()


def test_auto_keeps_what_was_better_on_validation_images(trained):
    module, _, _ = trained
    gate = module.method.gate
    for task in range(5):
        accuracies = gate.rows.read(task, "accuracies").tolist()
        assert all(0.8 < accuracy <= 1 for accuracy in accuracies)
        assert gate.best_namer(task) == NAMERS[accuracies.index(max(accuracies))]


def test_files_without_what_both_name_are_read(trained, tmp_path):
    module, _, _ = trained
    gate = module.method.gate
    kept = gate.kept()
    older = {**kept, "rows.accuracies": kept["rows.accuracies"][:, :2].clone()}
    found = Gate().read(older, gate.identity()["gate"], "the file")
    assert torch.equal(found.rows.get_buffer("accuracies")[:, :2], older["rows.accuracies"])
    assert {found.best_namer(task) for task in range(5)} <= {"mask", "discriminant"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("auto", "pretrained")])
def test_every_kind_of_features_finds_permuted_digits(kind, tmp_path):
    data = PermutedDigits(num_tasks=3, steps_per_task=10)
    module, trainer = fit(digits_lenet(), data, folder=tmp_path, inference=Discriminant(kind))
    trainer.test(module, data, verbose=False)
    assert module.test_accuracy.compute()[1].float().mean() > 0.9


def test_a_module_of_ones_own_and_pretrained_weights(tmp_path):
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU())
    module, _ = fit(digits_lenet(), _split(), folder=tmp_path / "own", inference=Discriminant(own))
    assert module.method.gate.sums.num_features == 50
    method = SupSup(LeNet(output_size=20, input_shape=(1, 8, 8)), weights="keep")
    module, _ = fit(method, _split(), folder=tmp_path / "keep", inference=Discriminant())
    assert module.method.gate.description["kind"] == "pretrained"
    assert module.method.gate.sums.num_features == 100


def test_methods_without_masks_use_it(tmp_path):
    method = BatchEnsemble(LeNet(output_size=10, input_shape=(1, 8, 8)))
    module, trainer = fit(method, _split(), folder=tmp_path, inference=Discriminant(), scenario=GNS)
    trainer.test(module, _split(), verbose=False)
    assert module.test_accuracy.compute()[1].float().mean() > 0.9


def test_data_modules_of_ones_own(tmp_path):
    images, labels = torch.randn(2, 50, 1, 8, 8), torch.arange(50) % 2
    modules = [_Shuffled(own + 3 * labels.view(-1, 1, 1, 1), labels) for own in images]
    sequence = DataModuleSequence(modules, num_classes=2, steps_per_task=10)
    module, _ = fit(digits_lenet(), sequence, folder=tmp_path, inference=Discriminant("hidden"))
    gate = module.method.gate
    assert gate.sums.counts.tolist() == [25] * 4  # each image once, whatever the number of steps
    for task in range(2):
        own = gate.features(module.method, modules[task].data.tensors[0]).double()
        means = torch.stack([own[labels == label].mean(0) for label in range(2)])
        torch.testing.assert_close(gate.sums.means[gate.sums.tasks == task], means)


def test_options_are_refused():
    with pytest.raises(ConfigurationError, match=r"inference.features='hiden'.*hidden"):
        ContinualModule(digits_lenet(), inference=Discriminant("hiden"))
    with pytest.raises(ConfigurationError, match=r"inference.regularisation=-1"):
        Discriminant(regularisation=-1)
    with pytest.raises(ConfigurationError, match=r"inference.images=0"):
        Discriminant(images=0)
    with pytest.raises(ConfigurationError, match=r"inference.classes='neither'"):
        Discriminant(classes="neither")
    with pytest.raises(ConfigurationError, match="nothing for Discriminant to find"):
        ContinualModule(digits_lenet(), inference=Discriminant(), scenario=GG)
    data = _split()
    data.setup()
    for kind, reason in (("pretrained", "method.weights=signed_constant"), ("hidden", "num_features=7 has no effect")):
        module = ContinualModule(
            digits_lenet(), inference=Discriminant(kind, num_features=None if reason[0] == "m" else 7)
        )
        with pytest.raises(ConfigurationError, match=reason):
            module.method.gate.choose_features(module.method, data.example(), keeps_neighbours=True)


def test_tasks_that_were_trained_without_it_are_named(tmp_path):
    plain, _ = fit(digits_lenet(), _split(), folder=tmp_path, inference=OneShot())
    module = ContinualModule(plain.method, inference=Discriminant("hidden"))
    module.num_classes = plain.num_classes
    data = _split()
    data.setup()
    module.method.gate.choose_features(module.method, data.example(), keeps_neighbours=True)
    with pytest.raises(ConfigurationError, match="no sums of the finished tasks 0, 1, 2, 3, 4"):
        module.infer(data.example())


def test_another_inference_keeps_the_sums_or_is_refused(trained):
    module, _, _ = trained
    images, _ = next(iter(_split().test_loader(1)))
    method = copy.deepcopy(module.method)
    other = ContinualModule(method, inference=Discriminant("convolution", regularisation=0.1, classes="mask"))
    other.num_classes = module.num_classes
    assert method.gate.regularisation == 0.1
    assert len(method.gate.sums) == 10
    assert (other.infer(images)[0] == 1).float().mean() > 0.8
    other.inference = Discriminant()
    assert all(torch.equal(*pair) for pair in zip(other.infer(images), module.infer(images), strict=True))
    for wrong in (Discriminant("projection"), Discriminant(num_features=7), Discriminant(per_task=True)):
        with pytest.raises(MismatchError, match="use the options of training"):
            ContinualModule(method, inference=wrong)
        other.inference = wrong
        with pytest.raises(MismatchError, match="use the options of training"):
            other.infer(images)
    fresh = digits_lenet()
    ContinualModule(fresh, inference=Discriminant("projection"))
    ContinualModule(fresh, inference=Discriminant(per_task=True))
    assert fresh.gate.sums.per_task
    assert fresh.gate.kind == "auto"


def test_a_file_without_sums_leaves_none(trained, tmp_path):
    module, _, _ = trained
    ContinualModule(digits_lenet(), inference=OneShot()).method.save(tmp_path / "none.safetensors")
    method = copy.deepcopy(module.method)
    method.load(tmp_path / "none.safetensors")
    assert not len(method.gate.sums)
    assert not len(method.gate.rows)


def test_checkpoints_with_and_without_sums(trained, tmp_path, caplog):
    module, _, _ = trained
    without = ContinualModule(digits_lenet(), inference=OneShot())
    with pytest.raises(MismatchError, match="trained with another inference. Make the model with that one"):
        ContinualModule(digits_lenet()).load_state_dict(without.state_dict())
    without.load_state_dict(module.state_dict())
    assert "sums for inference=discriminant, which are left out" in caplog.text
    assert torch.equal(without.method.bank.packed, module.method.bank.packed)
    assert without.method.gate is None


def test_a_loader_without_an_end_is_taken_for_an_epoch(tmp_path):
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    sequence = DataModuleSequence([_Endless(images, labels)], num_classes=2, steps_per_task=5)
    module, _ = fit(digits_lenet(), sequence, folder=tmp_path, inference=Discriminant("projection"))
    assert module.method.gate.sums.counts.tolist() == [20, 20]


def test_layers_that_the_network_does_not_call_give_no_features():
    method = SupSup(_WithHead())
    gate = ContinualModule(method, inference=Discriminant("hidden")).method.gate
    gate.choose_features(method, torch.rand(2, 4), keeps_neighbours=False)
    assert gate.description["layers"] == ["last"]
    assert gate.features(method, torch.rand(3, 4)).shape == (3, 5)


def _split() -> ContinualDataModule:
    return ContinualDataModule(Split(Digits(), classes_per_task=2), steps_per_task=40)


class _Shuffled(L.LightningDataModule):
    def __init__(self, images, labels):
        super().__init__()
        self.data = TensorDataset(images, labels)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=16, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.data, batch_size=16)


class _Endless(_Shuffled):
    def train_dataloader(self):
        return DataLoader(_Repeated(*self.data.tensors), batch_size=8)


class _Repeated(IterableDataset):
    def __init__(self, images, labels):
        self.pairs = [*zip(images, labels, strict=True)]

    def __iter__(self):
        return itertools.cycle(self.pairs)


class _WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.auxiliary, self.last = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, inputs):
        return self.last(self.first(inputs).relu())


def test_inputs_of_no_task_are_unknown(trained):
    module, _, _ = trained
    asking = ContinualModule(module.method, inference=Discriminant(unknown=0.05))
    asking.num_classes = module.num_classes
    draw = torch.Generator().manual_seed(0)
    tasks, labels = asking.infer(5 * torch.randn(100, 1, 8, 8, generator=draw))
    assert (tasks == -1).all()
    assert (labels == -1).all()
    known = torch.cat([batch for task in range(5) for batch, _ in _split().test_loader(task)])
    refused = (asking.infer(known)[0] == -1).float().mean()
    assert 0.005 < refused < 0.3  # there are 14 validation images per task
    accepted = asking.infer(known)[0]
    assert torch.equal(accepted[accepted >= 0], module.infer(known)[0][accepted >= 0])
    gate, quantiles = module.method.gate, module.method.gate.rows.read(2, "distances")
    mean = gate.discriminant(module.method.tasks).mean_distances()[2]
    found = gate.furthest(module.method.tasks, refused=0.05)[2].item()
    assert found == pytest.approx(quantiles[95].item() * mean, rel=1e-5)


def test_unknown_needs_single_images_and_a_share():
    with pytest.raises(ConfigurationError, match=r"inference.unknown=5 is a share"):
        Discriminant(unknown=5)
    with pytest.raises(ConfigurationError, match=r"inference.images=each with it, not batch"):
        Discriminant(unknown=0.05, images="batch")
    with pytest.raises(ConfigurationError, match=r"scenario=nns no task has validation images.*unknown=null"):
        ContinualModule(digits_lenet(), inference=Discriminant(unknown=0.05), scenario=NNS)


def test_unknown_needs_validation_images(tmp_path):
    images, labels = torch.randn(50, 1, 8, 8), torch.arange(50) % 2
    sequence = DataModuleSequence([_Shuffled(images, labels)], num_classes=2, steps_per_task=5)
    module, trainer = fit(digits_lenet(), sequence, folder=tmp_path, inference=Discriminant("hidden", unknown=0.1))
    with pytest.raises(ConfigurationError, match="task 0 had none"):
        trainer.test(module, sequence, verbose=False)


def test_a_run_that_refuses_unknown_inputs_resumes(trained, tmp_path):
    checkpoint, asking = tmp_path / "half.ckpt", Discriminant(unknown=0.05)
    fit(digits_lenet(), _split(), folder=tmp_path, inference=asking, callbacks=[StopAfter(1, checkpoint)])
    resumed, _ = fit(digits_lenet(), _split(), folder=tmp_path, inference=asking, checkpoint=checkpoint)
    assert torch.equal(resumed.method.bank.packed, trained[0].method.bank.packed)
    assert resumed.method.gate.rows.tasks.tolist() == [0, 1, 2, 3, 4]
