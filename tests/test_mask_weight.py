"""Scores of gate and masks summed: against loops, in files and checkpoints, and the weight that auto takes."""

import copy

import pytest
import torch

from supsup_lightning import ContinualDataModule, ContinualModule, DataModuleSequence, Discriminant
from supsup_lightning.data import Digits, Split
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.gate.gate import WEIGHTS
from supsup_lightning.inference.objectives import entropy
from supsup_lightning.scenario import NNS
from tests.conftest import StopAfter, digits_lenet, fit
from tests.test_discriminant import _Shuffled

AUTO = {"candidates": 3, "mask_weight": "auto", "regularisation": 10.0}  # so much that posteriors are unsure


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five tasks of two digits, trained so shortly that gate and masks differ."""
    return fit(digits_lenet(), _split(), folder=tmp_path_factory.mktemp("mix"), inference=_asking())[0].eval()


@torch.no_grad()
def scores(method, images):
    """Log posteriors and entropies in units of the task's own validation images, ``(images, k)`` each."""
    gate, data = method.gate, _split()
    data.setup()
    posterior = gate.discriminant(method.tasks).log_posterior_of_tasks(gate.features(method, images))
    columns = []
    for task in method.tasks.tolist():
        known = torch.cat([own for own, _ in data.each_image(task, half="validation")])
        own = entropy(method(known, task), 2).double()
        columns.append(((own.mean() - entropy(method(images, task), 2)) / own.std(correction=0)).float())
    return posterior, torch.stack(columns, 1)


def slow(posterior, confidence, weight, candidates):
    """The best task of each row among the gate's candidates, one by one."""
    found = []
    for one, other in zip(posterior.tolist(), confidence.tolist(), strict=True):
        named = sorted(range(len(one)), key=lambda task: -one[task])[:candidates]
        found.append(max(named, key=lambda task: one[task] + weight * other[task]))
    return found


@pytest.mark.parametrize("weight", [0.5, 3.0, 100.0])
def test_single_images_as_in_a_loop(trained, weight):
    images = _test_images()
    posterior, confidence = scores(trained.method, images)
    found = _asking(mask_weight=weight)(trained.method, images, 2).tolist()
    assert found == slow(posterior, confidence, weight, 3)
    if weight > 1:
        assert found != posterior.argmax(1).tolist()


def test_several_images_add_posteriors_and_scores(trained):
    images = _test_images()
    prior = trained.method.gate.discriminant(trained.method.tasks).log_prior_of_tasks()
    answers = []
    for group in images.split(4):
        posterior, confidence = scores(trained.method, group)
        together = ((posterior - prior).sum(0) + prior).unsqueeze(0), confidence.sum(0, keepdim=True)
        found = _asking(mask_weight=20.0, images="batch")(trained.method, group, 2).unique().tolist()
        assert found == slow(*together, 20.0, 3)
        answers.append(found[0] == together[0].argmax())
    assert not all(answers)


def test_weight_0_is_the_discriminant_and_tries_no_mask(trained, monkeypatch):
    images, method = _test_images(), trained.method
    alone = Discriminant("hidden", classes="discriminant", regularisation=10.0).predict(method, images, 2)
    monkeypatch.setattr(type(method), "forward", None)
    both = _asking(mask_weight=0, classes="discriminant").predict(method, images, 2)
    assert all(torch.equal(*pair) for pair in zip(alone, both, strict=True))


def test_the_table_counts_what_the_validation_images_find(trained):
    data, gate = _split(), trained.method.gate
    data.setup()
    images = torch.cat(
        [own for own, _ in data.each_image(4, half="validation")]
    )  # of the last task: all masks are there
    posterior, confidence = scores(trained.method, images)
    expected = [slow(posterior, confidence, weight, 3).count(4) for weight in WEIGHTS]
    assert gate.mask_rows.read(4, "found").tolist() == expected
    assert len({*expected}) > 1
    assert gate.mask_rows.read(4, "images").tolist() == [len(images)]
    first = gate.mask_rows.read(0, "found").tolist()
    assert first == gate.mask_rows.read(0, "images").tolist() * len(WEIGHTS)  # nothing to be taken for


def test_auto_takes_the_least_of_the_best_weights(trained):
    method = copy.deepcopy(trained.method)
    table = method.gate.mask_rows
    images = _test_images()
    for totals, place in (([3, 5, 1, 5], 1), ([9, 9, 9, 9], 0), ([0, 1, 2, 3], 3)):
        table.found = torch.zeros_like(table.found)
        table.found[2, : len(totals)] = torch.tensor(totals)
        by_number = _asking(mask_weight=WEIGHTS[place])(method, images, 2)
        assert torch.equal(_asking()(method, images, 2), by_number)


def test_files_checkpoints_and_removed_tasks_keep_the_table(trained, tmp_path):
    method = trained.method
    method.save(tmp_path / "bank.safetensors")
    other = ContinualModule(digits_lenet(), inference=_asking()).method.eval()
    other.load(tmp_path / "bank.safetensors")
    images = _test_images()
    assert torch.equal(_asking()(other, images, 2), _asking()(method, images, 2))
    resumed, _ = fit(digits_lenet(), _split(), folder=tmp_path, inference=_asking(), checkpoint=_half(tmp_path))
    resumed.method.save(tmp_path / "resumed.safetensors")
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "bank.safetensors").read_bytes()
    other.bank.remove(1)
    other.gate.remove(1)
    assert other.gate.mask_rows.tasks.tolist() == [0, 2, 3, 4]
    assert 1 not in _asking()(other, images, 2).tolist()
    joined = ContinualModule(digits_lenet(), inference=_asking()).method
    joined.gate.merge(method.gate, tasks={0, 3})
    assert joined.gate.mask_rows.tasks.tolist() == [0, 3]


def test_banks_and_checkpoints_without_the_table_load_and_say_so(trained, tmp_path):
    plain, _ = fit(digits_lenet(), _split(), folder=tmp_path, inference=Discriminant("hidden"))
    assert torch.equal(plain.method.bank.packed, trained.method.bank.packed)
    assert not any("mask_rows" in name for name in plain.method.kept())
    state = {name: value for name, value in plain.method.state_dict().items() if "mask_rows" not in name}
    older = ContinualModule(digits_lenet(), inference=_asking()).method
    older.load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"mask_weight=auto needs .* task 0 was trained without"):
        _asking()(older, _test_images(), 2)
    with pytest.raises(ConfigurationError, match=r"measured by entropy; use the objective of training"):
        _asking(objective="superfluous")(trained.method, _test_images(), 2)


def test_options_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"mask_weight=1.0 has no effect with inference.candidates=1"):
        Discriminant(mask_weight=1.0)
    with pytest.raises(ConfigurationError, match=r"mask_weight=auto needs inference.candidates_by=gate"):
        Discriminant(candidates=2, candidates_by="masks", mask_weight="auto")
    for wrong in (-1, True, "some", float("nan")):
        with pytest.raises(ConfigurationError, match=r"neither a number from 0 on, nor auto"):
            Discriminant(candidates=2, mask_weight=wrong)
    with pytest.raises(ConfigurationError, match=r"scenario=nns no task has validation images.*mask_weight=null"):
        ContinualModule(digits_lenet(), inference=_asking(), scenario=NNS)
    sequence = DataModuleSequence(
        [_Shuffled(torch.randn(50, 1, 8, 8), torch.arange(50) % 2)], num_classes=2, steps_per_task=5
    )
    with pytest.raises(ConfigurationError, match=r"mask_weight measures .* task 0 has none"):
        fit(digits_lenet(), sequence, folder=tmp_path, inference=_asking())


def test_consistency_and_unknown_inputs_go_with_it(tmp_path):
    method = digits_lenet(superfluous="rotations")
    asking = _asking(objective="consistency", unknown=0.1)
    module, _ = fit(method, _split(), folder=tmp_path, inference=asking)
    table = module.eval().method.gate.mask_rows
    torch.testing.assert_close(table.get_buffer("scale"), torch.tensor([[0.0, 1.0]] * 5), atol=1e-4, rtol=1e-4)
    tasks = module.infer(_test_images())[0]
    assert -1 in tasks.tolist()
    assert (tasks >= 0).sum() > 30


def _half(folder):
    fit(digits_lenet(), _split(), folder=folder, inference=_asking(), callbacks=[StopAfter(1, folder / "half.ckpt")])
    return folder / "half.ckpt"


def _asking(**options) -> Discriminant:
    return Discriminant("hidden", **{**AUTO, **options})


def _test_images() -> torch.Tensor:
    data = _split()
    data.setup()
    return torch.cat([next(iter(data.test_loader(task)))[0][:16] for task in range(5)])


def _split() -> ContinualDataModule:
    return ContinualDataModule(Split(Digits(), classes_per_task=2), steps_per_task=15)
