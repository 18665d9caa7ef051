import pytest
import torch

from supsup_lightning import GG, ContinualDataModule, Given, PermutedDigits, SupSup, Unannounced
from supsup_lightning.data import Digits, Mixed, Rotated, Whole
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.scenario import NNS
from tests.conftest import digits_lenet, fit, random_images, random_method


def finished_scores(method: SupSup, task: int) -> torch.Tensor:
    """Train a little, finish, and return the scores as they were."""
    method.begin_task(task)
    with torch.no_grad():
        method.live.values.add_(torch.randn(method.live.values.shape[1], generator=torch.Generator().manual_seed(task)))
    scores = method.live.values[0].detach().clone()
    method.finish_task(task)
    return scores


def test_transfer_starts_at_the_mean_of_all_final_scores_in_constant_memory():
    method = random_method(0, init="transfer")
    fresh = random_method(0)
    method.begin_task(0)
    fresh.begin_task(0)
    assert torch.equal(method.live.values, fresh.live.values)  # nothing to start from yet
    finals = [finished_scores(method, task) for task in range(4)]
    method.begin_task(4)
    torch.testing.assert_close(method.live.values[0].detach(), torch.stack(finals).mean(0))
    assert method.start.remembered.shape == method.live.values.shape[1:]


def test_previous_starts_at_the_last_final_scores():
    method = random_method(0, init="previous")
    finals = [finished_scores(method, task) for task in range(3)]
    method.begin_task(3)
    assert torch.equal(method.live.values[0].detach(), finals[-1])


def test_nearest_starts_from_the_mask_that_inference_finds(tmp_path):
    """Digits upright, turned by 90 degrees, upright again."""
    streams = [Rotated(Digits(), degrees=90), Whole(Digits())]
    data = ContinualDataModule(Mixed(streams, num_tasks=[2, 1]), steps_per_task=80)
    begun = []

    class Spy(SupSup):
        def start_like(self, task):
            super().start_like(task)
            begun.append((self.live.task, task, torch.equal(self.rule(self.live.values[0]) > 0, self.bank.get(task))))

    method = Spy(digits_lenet().network, init="nearest")
    fit(method, data, folder=tmp_path, scenario=GG, inference=Given())
    assert [(task, same) for task, _, same in begun] == [(1, True), (2, True)]
    assert [nearest for _, nearest, _ in begun] == [0, 0]


@pytest.mark.parametrize("init", ["transfer", "previous"])
def test_a_checkpoint_goes_on_with_what_is_remembered(init):
    whole = random_method(0, init=init)
    finished_scores(whole, 0)
    resumed = random_method(0, init=init)
    resumed.load_state_dict(whole.state_dict())
    for method in (whole, resumed):
        method.begin_task(1)
    assert torch.equal(whole.live.values, resumed.live.values)
    with pytest.raises(MismatchError, match=f"init '{init}' there|init None there, '{init}' here"):
        random_method(0, init=init).load_state_dict(random_method(1).state_dict())


def test_files_of_masks_hold_nothing_of_it(tmp_path, caplog):
    method = random_method(0, init="transfer")
    finished_scores(method, 0)
    method.save(tmp_path / "bank.safetensors")
    assert "start" not in "".join(method.kept())
    plain = random_method(0)
    plain.load(tmp_path / "bank.safetensors")
    random_method(0, init="transfer").load(tmp_path / "bank.safetensors")
    assert "mask.init=transfer: a file of masks holds no scores" in caplog.text
    images = random_images(3)
    assert torch.equal(plain(images, 0), method(images, 0))


def test_transfer_learns_related_tasks_faster(tmp_path):
    """Digits turned by 10 degrees more: few steps are enough to go on from the task before."""
    reached = {}
    for init in ("random", "transfer"):
        data = ContinualDataModule(Rotated(Digits(), degrees=10), num_tasks=4, steps_per_task=40)
        module, trainer = fit(digits_lenet(init=init), data, folder=tmp_path, scenario=GG, inference=Given())
        trainer.test(module, data, verbose=False)
        reached[init] = module.test_accuracy.compute()[0][1:].mean()
    assert reached["transfer"] > reached["random"] + 0.02


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="mask.init='transfr' is not known; choose one of random, transfer"):
        random_method(0, init="transfr")
    data = Unannounced(PermutedDigits(num_tasks=2, steps_per_task=200))
    with pytest.raises(ConfigurationError, match="mask.init=transfer needs to be told where a task ends"):
        fit(digits_lenet(init="transfer"), data, folder=tmp_path, scenario=NNS)
