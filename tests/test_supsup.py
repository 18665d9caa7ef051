import pytest
import torch
from torch import nn

from supsup_lightning import SupSup
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from tests.conftest import random_images, random_method


def test_the_same_seed_grows_the_same_weights_and_scores():
    torch.manual_seed(1)
    one = random_method(2, seed=3)
    torch.manual_seed(2)
    two = random_method(2, seed=3)
    assert torch.equal(one.frozen, two.frozen)
    assert torch.equal(one.bank.packed, two.bank.packed)
    other = random_method(2, seed=4)
    assert not torch.equal(one.frozen, other.frozen)
    assert not torch.equal(one.bank.packed, other.bank.packed)


def test_a_task_does_not_depend_on_the_tasks_before_it():
    one, two = random_method(0), random_method(3)
    for method in (one, two):
        method.begin_task(7)
        method.finish_task(7)
    assert torch.equal(one.bank.get(7), two.bank.get(7))


def test_effective_weights_are_the_masked_frozen_ones_before_and_after_the_commit():
    method = random_method(0, rule="topk", sparsity=0.7)
    method.begin_task(0)
    images = random_images(5)
    before = method(images, 0)
    method.finish_task(0)
    assert torch.equal(method(images, 0), before)
    assert method.sparsity().item() == pytest.approx(0.7, abs=1e-3)
    with pytest.raises(KeyError, match="Task 1 has no mask"):
        method(images, 1)


def test_the_network_is_never_changed():
    method = random_method(0)
    before = {name: value.clone() for name, value in method.network.state_dict().items()}
    method.begin_task(0)
    method(random_images(4), 0).sum().backward()
    method.finish_task(0)
    assert all(torch.equal(value, before[name]) for name, value in method.network.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in method.network.parameters())
    assert method.scores.grad is not None


def test_checkpoints_leave_the_network_out_and_refuse_another(tmp_path):
    method = random_method(7)
    state = method.state_dict()
    assert not any("network" in key for key in state)
    fresh = random_method(0)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.bank.packed, method.bank.packed)
    images = random_images(3)
    assert all(torch.equal(fresh(images, task), method(images, task)) for task in range(7))
    others = {
        "seed '0' there, '1' here": random_method(0, seed=1),
        "rule 'threshold' there, 'topk' here": random_method(0, rule="topk", sparsity=0.5),
        "weights 'signed_constant' there, 'kaiming_normal' here": random_method(0, weights="kaiming_normal"),
    }
    method.save(tmp_path / "bank.safetensors")
    for message, other in others.items():
        with pytest.raises(MismatchError, match=message):
            other.load_state_dict(state)
        with pytest.raises(MismatchError, match=message):
            other.load(tmp_path / "bank.safetensors")
        assert len(other.bank) == 0


def test_another_architecture_is_refused(tmp_path):
    random_method(2).save(tmp_path / "bank.safetensors")
    with pytest.raises(MismatchError, match="another network"):
        random_method(0, output_size=30).load(tmp_path / "bank.safetensors")


def test_stored_weights_make_a_checkpoint_and_a_bank_that_need_no_seed(tmp_path):
    torch.manual_seed(0)
    method = random_method(2, weights="keep", store_weights=True)
    method.save(tmp_path / "bank.safetensors")
    images = random_images(3)
    for load in ("state", "file"):
        fresh = random_method(0, weights="keep", store_weights=True)  # another random network
        assert not torch.equal(fresh(images, 0) if 0 in fresh.bank else fresh.network(images), method.network(images))
        if load == "state":
            fresh.load_state_dict(method.state_dict())
        else:
            fresh.load(tmp_path / "bank.safetensors")
        assert torch.equal(fresh(images, 1), method(images, 1))


def test_a_damaged_or_foreign_bank_file_is_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    random_method(2).save(path)
    contents = path.read_bytes()
    path.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        random_method(0).load(path)
    with pytest.raises(DataError, match="cannot be read"):
        random_method(0).load(tmp_path / "absent.safetensors")


def test_only_weights_of_two_dimensions_are_masked_by_default():
    method = SupSup(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
    assert method.layout.names == ("0.weight", "2.weight")
    with pytest.raises(ConfigurationError, match=r"No parameter of LayerNorm is masked .*weight \(3,\)"):
        SupSup(nn.LayerNorm(3))


def test_unknown_options_are_refused():
    with pytest.raises(ConfigurationError, match="mask.rule='treshold' is not known; choose one of threshold, topk"):
        random_method(0, rule="treshold")
    with pytest.raises(ConfigurationError, match="mask.allocation='er'"):
        random_method(0, rule="topk", sparsity=0.5, allocation="er")


def network_with_biases(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), norm, nn.ReLU(), nn.Linear(16, 20))


def test_parameters_that_are_not_masked_come_back_with_the_masks(tmp_path):
    method = SupSup(network_with_biases(nn.LayerNorm(16)))
    method.begin_task(0)
    method.finish_task(0)
    method.save(tmp_path / "bank.safetensors")
    images = random_images(3)
    for load in ("state", "file"):
        torch.manual_seed(5)  # other biases
        fresh = SupSup(network_with_biases(nn.LayerNorm(16)))
        fresh.load_state_dict(method.state_dict()) if load == "state" else fresh.load(tmp_path / "bank.safetensors")
        assert torch.equal(fresh(images, 0), method(images, 0))


def test_running_statistics_are_refused_as_tasks_would_share_them():
    with pytest.raises(ConfigurationError, match=r"layer 2 \(BatchNorm1d\) .* track_running_stats=False"):
        SupSup(network_with_biases(nn.BatchNorm1d(16)))
    method = SupSup(network_with_biases(nn.BatchNorm1d(16, track_running_stats=False)))
    images = random_images(6)
    logits = []
    for task in range(2):
        method.begin_task(task)
        method(images, task).sum().backward()
        method.finish_task(task)
        logits.append(method(images, 0))
    assert torch.equal(*logits)
