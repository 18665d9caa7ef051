import math

import pytest
import torch
from torch import nn

from supsup_lightning import ByName, SupSup
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
    assert method.live.values.grad is not None


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


def normalised_method(**options) -> SupSup:
    """Batch normalisation after a linear layer; two tasks that saw differently scaled images."""
    method = SupSup(network_with_biases(nn.BatchNorm1d(16)), **options)
    for task in range(2):
        train_briefly(method, task, scale=1 + 4 * task)
    return method


def train_briefly(method: SupSup, task: int, *, scale: float) -> None:
    method.begin_task(task)
    method.train()
    for step in range(5):
        method(random_images(32, seed=step) * scale + task, task).sum().backward()
    method.finish_task(task)
    method.eval()


def test_running_statistics_belong_to_a_task_and_are_those_of_a_network_of_its_own():
    method = normalised_method()
    for task, scale in enumerate((1, 5)):
        alone = network_with_biases(nn.BatchNorm1d(16))
        alone.load_state_dict(
            {**alone.state_dict(), **method.layout.split(method.bank.get(task) * method.frozen)}, strict=False
        )
        with torch.no_grad():
            alone[1].bias.copy_(method.network[1].bias)
            for step in range(5):
                alone(random_images(32, seed=step) * scale + task)
        kept = method.effective(task)
        torch.testing.assert_close(kept["2.running_mean"], alone[2].running_mean)
        torch.testing.assert_close(kept["2.running_var"], alone[2].running_var)
        assert kept["2.num_batches_tracked"] == 5
    assert method.task_bytes() == -(-method.layout.num_weights // 8) + 4 * (16 + 16 + 1)


def test_later_tasks_and_training_mode_leave_logits_of_a_normalised_task_alone_bit_for_bit():
    method = SupSup(network_with_biases(nn.BatchNorm1d(16)))
    images = random_images(6)
    train_briefly(method, 0, scale=1)
    before = method(images, 0)
    train_briefly(method, 1, scale=9)
    method.train()
    method(images * 7, 0)  # a layer in training mode changes what it is given: a copy
    method.eval()
    assert torch.equal(method(images, 0), before)
    assert method.network[2].num_batches_tracked == 0  # nor is the network's own ever changed
    with pytest.raises(KeyError, match="Task 2 has no mask"):
        method(images, 2)


def test_statistics_are_in_checkpoints_and_banks_and_merge(tmp_path):
    method = normalised_method()
    method.save(tmp_path / "bank.safetensors")
    images = random_images(5)
    for load in ("state", "file", "merge"):
        fresh = SupSup(network_with_biases(nn.BatchNorm1d(16))).eval()
        fresh.base.set_parameters({"1.bias": method.network[1].bias, "4.bias": method.network[4].bias})
        if load == "state":
            fresh.load_state_dict(method.state_dict())
        elif load == "file":
            fresh.load(tmp_path / "bank.safetensors")
        else:
            fresh.bank.merge(method.bank)
        assert all(torch.equal(fresh(images, task), method(images, task)) for task in range(2))
    other = SupSup(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Identity(), nn.ReLU(), nn.Linear(16, 20)))
    with pytest.raises(MismatchError):
        other.load_state_dict(method.state_dict())


def test_a_checkpoint_in_the_middle_of_a_task_goes_on_with_its_statistics():
    whole, broken = (SupSup(network_with_biases(nn.BatchNorm1d(16))) for _ in range(2))
    broken.load_state_dict(whole.state_dict())
    for method in (whole, broken):
        method.begin_task(0)
        method(random_images(8), 0)
    resumed = SupSup(network_with_biases(nn.BatchNorm1d(16)))
    resumed.load_state_dict(broken.state_dict())
    for method in (whole, resumed):
        method(random_images(8, seed=1), 0)
        method.finish_task(0)
    assert torch.equal(whole.bank.statistics, resumed.bank.statistics)


def test_a_superposition_is_normalised_by_the_batch():
    method = normalised_method()
    images = random_images(12)
    logits = method.base.call_superposed(method.superposed(), images)
    layers = network_with_biases(nn.BatchNorm1d(16, track_running_stats=False))
    layers.load_state_dict(
        {
            **layers.state_dict(),
            **method.superposed(),
            "1.bias": method.network[1].bias,
            "4.bias": method.network[4].bias,
        }
    )
    torch.testing.assert_close(logits, layers(images))


def test_a_layer_that_changes_a_buffer_of_its_own_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x

    method = SupSup(network_with_biases(Counts()))
    method.begin_task(0)
    method(random_images(2), 0)
    with pytest.raises(ConfigurationError, match="Training changed the network's buffer 2.calls"):
        method.finish_task(0)


def test_constant_buffers_come_back_with_the_masks(tmp_path):
    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("directions", torch.randn(64, 32))
            self.head = nn.Linear(32, 20, bias=False)

        def forward(self, x):
            return self.head(x.flatten(1) @ self.directions)

    method = SupSup(Projection())
    method.begin_task(0)
    method.finish_task(0)
    method.save(tmp_path / "bank.safetensors")
    fresh = SupSup(Projection())
    fresh.load(tmp_path / "bank.safetensors")
    assert torch.equal(fresh(random_images(3), 0), method(random_images(3), 0))


def test_names_say_what_is_masked():
    network = network_with_biases(nn.LayerNorm(16))
    assert SupSup(network, is_masked=ByName(exclude=["4.*"])).layout.names == ("1.weight",)
    assert SupSup(network, is_masked=ByName(include=["*.bias"], min_dimensions=1)).layout.names == (
        "1.bias",
        "2.bias",
        "4.bias",
    )
    with pytest.raises(
        ConfigurationError, match=r"mask.exclude: the pattern 'head\.\*' matches no parameter .* 1.weight"
    ):
        SupSup(network, is_masked=ByName(exclude=["head.*"]))
    with pytest.raises(ConfigurationError, match="mask.exclude='head' must be a list"):
        ByName(exclude="head")
    with pytest.raises(ConfigurationError, match="No parameter of Sequential is masked"):
        SupSup(network, is_masked=ByName(min_dimensions=5))


def test_parts_add_up_to_a_tasks_bytes_and_weights():
    method = SupSup(network_with_biases(nn.BatchNorm1d(16)), rule="topk", sparsity=0.75)
    parts = {part.name: part for part in method.parts()}
    assert math.ceil(sum(part.task_bytes for part in parts.values())) == method.task_bytes()
    assert parts["1.weight"].kept == "mask"
    assert parts["1.weight"].density == 0.25
    assert parts["1.bias"] == ("1.bias", (16,), "frozen", None, 0)
    assert parts["2.running_mean"].kept == "statistics"


def test_tasks_trained_elsewhere_are_merged_if_they_belong_to_the_same_network(tmp_path):
    here, there, other = (SupSup(network_with_biases(nn.BatchNorm1d(16))) for _ in range(3))
    there.load_state_dict(here.state_dict())
    train_briefly(here, 0, scale=1)
    for method in (there, other):
        train_briefly(method, 1, scale=3)
        method.save(tmp_path / f"{method is other}.safetensors")
    here.merge(tmp_path / "False.safetensors")
    images = random_images(4)
    assert here.tasks.tolist() == [0, 1]
    assert torch.equal(here(images, 1), there(images, 1))
    with pytest.raises(MismatchError, match=r"other values of 1.bias, 4.bias, which are not masked"):
        here.merge(tmp_path / "True.safetensors")
    assert len(here.bank) == 2


def test_tied_weights_are_shown_as_tied():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    network[2].weight = network[1].weight
    assert [(part.name, part.kept) for part in SupSup(network).parts()] == [("1.weight", "mask"), ("2.weight", "tied")]
