"""Gate and masks together: one names the candidates, the other decides among them; against loops over single images."""

import pytest
import torch

from supsup_lightning import PSP, BatchEnsemble, ContinualDataModule, ContinualModule, Discriminant, LeNet
from supsup_lightning.data import Digits, Split
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.inference.objectives import OBJECTIVES, entropy
from supsup_lightning.inference.one_shot import confidence_gain
from supsup_lightning.scenario import GNS
from tests.conftest import DIGITS, digits_lenet, fit

OPTIONS = {"gate": {}, "masks": {"candidates_by": "masks"}, "gradient": {"candidates_by": "gradient"}}


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    """Five tasks of two digits, trained so shortly that gate and masks differ."""
    folder = tmp_path_factory.mktemp("shortlist")
    return fit(digits_lenet(), _split(), folder=folder, inference=Discriminant("hidden"))[0].method.eval()


@pytest.fixture(scope="module")
def images():
    """Some images of each task, and noise."""
    data = _split()
    data.setup()
    parts = [next(iter(data.test_loader(task)))[0][:12] for task in range(5)]
    return torch.cat([*parts, torch.randn(20, *DIGITS, generator=torch.Generator().manual_seed(0))])


@torch.no_grad()
def first_and_second(method, images, objective, by):
    """Scores that name the candidates and scores that decide, ``(images, k)`` each; higher is better."""
    gate = method.gate
    posterior = gate.discriminant(method.tasks).log_posterior_of_tasks(gate.features(method, images))
    confidence = -torch.stack([objective(method(images, task), 2) for task in range(5)], 1)
    if by == "gate":
        return posterior, confidence
    if by == "masks":
        return confidence, posterior
    return torch.stack([confidence_gain(method, image, 2, objective) for image in images.split(1)]), posterior


def slow(first, second, candidates):
    """The best task of each row, one by one."""
    found = []
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        named = sorted(range(len(one)), key=lambda task: -one[task])[:candidates]
        found.append(max(named, key=lambda task: other[task]))
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("by", OPTIONS)
def test_single_images_as_in_a_loop(method, images, by, name):
    first, second = first_and_second(method, images, OBJECTIVES[name], by)
    answers = []
    for candidates in (2, 3, 5):
        inference = Discriminant("hidden", candidates=candidates, objective=name, **OPTIONS[by])
        answers.append(inference(method, images, 2).tolist())
        assert answers[-1] == slow(first, second, candidates)
        assert inference.predict(method, images, 2)[0].tolist() == answers[-1]
    assert answers[0] != first.argmax(1).tolist()
    assert answers[0] != answers[2]


@pytest.mark.parametrize("by", OPTIONS)
@pytest.mark.parametrize("number", [3, "batch"])
def test_several_images_decide_together(method, images, by, number):
    deciding = images[30 : 33 if number == 3 else None]
    first, second = first_and_second(method, deciding, entropy, by)
    prior = method.gate.discriminant(method.tasks).log_prior_of_tasks()
    together = [
        ((scores - prior).sum(0) + prior if posterior else scores.mean(0)).unsqueeze(0)
        for scores, posterior in ((first, by == "gate"), (second, by != "gate"))
    ]
    found = Discriminant("hidden", candidates=2, images=number, **OPTIONS[by])(method, images[30:], 2)
    assert found.tolist() == slow(*together, 2) * len(images[30:])


def test_a_task_passes_once_over_all_images_that_it_is_tried_for(method, images, monkeypatch):
    passes = []
    forward = type(method).forward
    monkeypatch.setattr(type(method), "forward", lambda self, x, task: passes.append(len(x)) or forward(self, x, task))
    Discriminant("hidden", candidates=2)(method, images, 2)
    assert len(passes) <= 5
    assert sum(passes) == 2 * len(images)


def test_removed_tasks_keep_the_numbers_of_the_others(method, images, tmp_path):
    method.save(tmp_path / "bank.safetensors")
    fewer = ContinualModule(digits_lenet(), inference=Discriminant("hidden")).method.eval()
    fewer.load(tmp_path / "bank.safetensors")
    fewer.bank.remove(1)
    found = Discriminant("hidden", candidates=2)(fewer, images, 2)
    assert set(found.tolist()) <= {0, 2, 3, 4}
    assert len(found.unique()) > 2


def test_options_without_effect_or_what_they_need_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"inference.objective=entropy has no effect .*candidates=1"):
        Discriminant(objective="entropy")
    with pytest.raises(ConfigurationError, match=r"inference.candidates_by=masks has no effect .*candidates=1"):
        Discriminant(candidates_by="masks")
    with pytest.raises(ConfigurationError, match=r"inference.candidates_by='gates'"):
        Discriminant(candidates=2, candidates_by="gates")
    with pytest.raises(ConfigurationError, match=r"inference.candidates=0"):
        Discriminant(candidates=0)
    with pytest.raises(ConfigurationError, match=r"inference.objective='sure'"):
        Discriminant(candidates=2, objective="sure")
    narrow = LeNet(output_size=2, input_shape=DIGITS)
    with pytest.raises(ConfigurationError, match=r"objective=superfluous needs outputs beyond the classes"):
        fit(
            type(digits_lenet())(narrow),
            _split(),
            folder=tmp_path,
            inference=Discriminant(candidates=2, objective="superfluous"),
        )
    with pytest.raises(ConfigurationError, match=r"inference.objective=consistency .*method.superfluous=rotations"):
        ContinualModule(digits_lenet(), inference=Discriminant(candidates=2, objective="consistency"))
    psp = PSP(LeNet(output_size=10, input_shape=DIGITS))
    with pytest.raises(ConfigurationError, match=r"needs a superposition of the finished tasks.*PSP"):
        ContinualModule(psp, inference=Discriminant(candidates=2, candidates_by="gradient"), scenario=GNS)


def test_methods_without_masks_have_candidates(tmp_path):
    method = BatchEnsemble(LeNet(output_size=10, input_shape=DIGITS))
    inference = Discriminant("hidden", candidates=2)
    module, trainer = fit(method, _split(), folder=tmp_path, inference=inference, scenario=GNS)
    trainer.test(module, _split(), verbose=False)
    assert module.test_accuracy.compute()[1].float().mean() > 0.3


def _split() -> ContinualDataModule:
    return ContinualDataModule(Split(Digits(), classes_per_task=2), steps_per_task=15)
