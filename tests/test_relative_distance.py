"""Relative Mahalanobis distance: against covariances of the images themselves, and how the cut follows later tasks."""

import pytest
import torch

from supsup_lightning import ContinualDataModule, ContinualModule, Discriminant
from supsup_lightning.data import Digits, Split
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.gate.class_sums import ClassSums, TaskSums
from supsup_lightning.gate.linear_discriminant import LinearDiscriminant
from tests.conftest import StopAfter, digits_lenet, fit


@pytest.mark.parametrize("per_task", [False, True])
def test_it_is_that_of_the_images_themselves(per_task):
    draw = torch.Generator().manual_seed(0)
    sums, every, means = ClassSums(per_task=per_task), [], []
    for task in range(3):
        own = 2 * torch.randn(400, 5, generator=draw, dtype=torch.float64)
        labels = torch.arange(400) % 2
        own += torch.randn(2, 5, generator=draw, dtype=torch.float64)[labels] + task
        sums.add(task, TaskSums.of([(own, labels)], num_labels=2))
        every.append(own)
        means += [own[labels == label].mean(0) for label in range(2)]
    images = torch.cat(every)
    discriminant = LinearDiscriminant(sums, torch.arange(3), regularisation=0.0)
    apart = images - images.mean(0)
    far = (apart @ torch.linalg.inv(apart.T @ apart / len(images)) * apart).sum(1)
    within = torch.cat(
        [
            own[torch.arange(400) % 2 == label] - means[2 * task + label]
            for task, own in enumerate(every)
            for label in range(2)
        ]
    )
    expected, tasks = torch.empty(len(images), 6, dtype=torch.float64), torch.arange(3).repeat_interleave(400)
    for column, mean in enumerate(means):
        own = within[400 * (column // 2) : 400 * (column // 2 + 1)] if per_task else within
        moved = images - mean
        expected[:, column] = (moved @ torch.linalg.inv(own.T @ own / len(own)) * moved).sum(1) - far
    found = discriminant.relative_distances(images)
    torch.testing.assert_close(found, expected.float(), atol=1e-3, rtol=1e-3)
    from_own = found.gather(1, (2 * tasks + torch.arange(400).repeat(3) % 2).unsqueeze(1))[:, 0]
    averages = torch.stack([from_own[tasks == task].mean() for task in range(3)])
    predicted = discriminant.expected_relative_distances()
    if not per_task:  # one matrix says how far images of all tasks are together
        averages, predicted = averages.mean(), predicted.mean()
    torch.testing.assert_close(predicted, averages, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five tasks of two digits."""
    folder = tmp_path_factory.mktemp("relative")
    return fit(digits_lenet(), _split(), folder=folder, inference=_asking())[0].eval()


def test_inputs_of_no_task_are_refused_and_few_others(trained):
    draw = torch.Generator().manual_seed(0)
    assert (trained.infer(5 * torch.randn(100, 1, 8, 8, generator=draw))[0] == -1).all()
    data = _split()
    data.setup()
    known = torch.cat([batch for task in range(5) for batch, _ in data.test_loader(task)])
    assert 0.005 < (trained.infer(known)[0] == -1).float().mean() < 0.3  # there are 14 validation images per task


def test_files_and_checkpoints_keep_both_distances(trained, tmp_path):
    trained.method.save(tmp_path / "bank.safetensors")
    half = tmp_path / "half.ckpt"
    fit(digits_lenet(), _split(), folder=tmp_path, inference=_asking(), callbacks=[StopAfter(1, half)])
    resumed, _ = fit(digits_lenet(), _split(), folder=tmp_path, inference=_asking(), checkpoint=half)
    resumed.method.save(tmp_path / "resumed.safetensors")
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "bank.safetensors").read_bytes()
    images = 0.5 * torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    other = ContinualModule(digits_lenet(), inference=_asking()).method.eval()
    other.load(tmp_path / "bank.safetensors")
    absolute = Discriminant("convolution", num_features=45, unknown=0.05)
    for inference in (_asking(), absolute):
        assert torch.equal(inference(other, images, 2), inference(trained.method, images, 2))
    plain, _ = fit(digits_lenet(), _split(), folder=tmp_path, inference=absolute)
    assert torch.equal(absolute(plain.method.eval(), images, 2), absolute(trained.method, images, 2))
    assert not any("relative" in name for name in plain.method.kept())
    older = ContinualModule(digits_lenet(), inference=_asking()).method
    state = plain.method.state_dict()
    older.load_state_dict({name: value for name, value in state.items() if "relative_rows" not in name})
    for method in (plain.method, older):
        with pytest.raises(ConfigurationError, match=r"task 0 had none or was trained without it"):
            _asking()(method, images, 2)


def test_too_few_images_for_the_features_are_refused(tmp_path):
    asking = Discriminant("convolution", num_features=150, unknown=0.05, unknown_distance="relative")
    with pytest.raises(ConfigurationError, match=r"at least 3 training images per feature, and up to task 0 there are"):
        fit(digits_lenet(), _split(), folder=tmp_path, inference=asking)


def test_options_without_effect_are_refused():
    with pytest.raises(ConfigurationError, match=r"unknown_distance=relative has no effect with inference.unknown=nul"):
        Discriminant(unknown_distance="relative")
    with pytest.raises(ConfigurationError, match=r"inference.unknown_distance='near'"):
        Discriminant(unknown=0.05, unknown_distance="near")


def _asking() -> Discriminant:
    return Discriminant("convolution", num_features=45, unknown=0.05, unknown_distance="relative")


def _split() -> ContinualDataModule:
    return ContinualDataModule(Split(Digits(), classes_per_task=2), steps_per_task=15)
