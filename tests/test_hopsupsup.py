"""HopSupSup: masks over gains that come back from a Hopfield memory, with networks and data."""

import csv
import json
import logging
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from supsup_lightning import (
    GG,
    GNS,
    GNU,
    ByName,
    ContinualModule,
    Exhaustive,
    Given,
    HopfieldRecovery,
    HopNet,
    HopSupSup,
    OneShot,
    PermutedDigits,
    SupSup,
)
from supsup_lightning.bank.hopfield_memory import capacity
from supsup_lightning.callbacks.recovery import RecordRecovery
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from tests.conftest import DIGITS, QUIET, first_losses, fit, random_images, random_method, run_cli, run_cli_here

CLASSES = 10


def small_hop_net(**options) -> HopSupSup:
    network = HopNet(output_size=CLASSES, input_shape=DIGITS, hidden_sizes=(512, 512))
    return HopSupSup(network, **options)


def with_tasks(method, count: int, *, first: int = 0):
    for task in range(first, count):
        method.begin_task(task)
        method.finish_task(task)
    return method


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three permutations of the digits, learned and tested."""
    data = PermutedDigits(num_tasks=3, steps_per_task=60)
    folder = tmp_path_factory.mktemp("trained")
    module, trainer = fit(small_hop_net(), data, folder=folder, **OPTIONS)
    trainer.test(module, data, verbose=False)
    return module, trainer, data


OPTIONS = {"scenario": GNS, "inference": HopfieldRecovery(), "optimizer": partial(torch.optim.Adam, lr=0.03)}


def batch_of(data, task):
    return next(iter(data.test_loader(task)))


# The method.


def test_golden_loss_of_four_steps():
    """Any change of these numbers is a change of the method: of its initialisation, gradients, data or optimizer."""
    assert first_losses(small_hop_net(), lr=1.0) == pytest.approx([2.45481, 1.950016, 1.580176, 1.351395], rel=1e-4)


def test_the_same_seed_regrows_network_and_scores_and_nothing_of_them_is_stored(tmp_path):
    torch.manual_seed(1)
    one = with_tasks(small_hop_net(seed=3), 2)
    torch.manual_seed(2)
    two = with_tasks(small_hop_net(seed=3), 2)
    assert torch.equal(one.network[1].weight, two.network[1].weight)
    assert torch.equal(one.reference_masks(), two.reference_masks())
    assert not torch.equal(one.network[1].weight, small_hop_net(seed=4).network[1].weight)
    assert not any("network" in key for key in one.state_dict())
    one.save(tmp_path / "memory.safetensors")
    two.load(tmp_path / "memory.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.memory.weights, two.memory.weights, strict=True))


def test_masks_and_effective_gains_agree_before_and_after_they_are_stored():
    method = small_hop_net(rule="topk", sparsity=0.7)
    method.begin_task(0)
    images = random_images(8)
    before = method(images, 0)
    method.finish_task(0)
    (mask,) = method.reference_masks()
    torch.testing.assert_close(method.logits(2.0 * mask - 1, images), before)
    assert method.sparsity().item() == pytest.approx(0.7, abs=1e-3)
    with pytest.raises(KeyError, match="no parameters of finished tasks by number"):
        method(images, 0)


def test_tasks_come_in_order():
    method = with_tasks(small_hop_net(), 2)
    for task in (0, 3):
        with pytest.raises(ConfigurationError, match=f"Task {task} cannot begin: .* the next is 2"):
            method.begin_task(task)
    assert method.tasks.tolist() == [0, 1]


def test_the_file_has_the_same_size_for_any_number_of_tasks_and_holds_no_mask(tmp_path):
    sizes = set()
    for count in (1, 7):
        method = with_tasks(small_hop_net(), count)
        method.save(tmp_path / "memory.safetensors")
        sizes.add((tmp_path / "memory.safetensors").stat().st_size)
    (size,) = sizes
    assert method.memory.num_bytes() <= size <= method.memory.num_bytes() + 1000
    assert method.task_bytes() == 0
    storage = method.details()
    assert storage["capacity"] == round(capacity(512, "storkey"))
    assert storage["explicit_bytes_per_task"] == 1024 // 8
    assert storage["smaller_from_num_tasks"] * 128 > storage["memory_bytes"]
    assert (storage["smaller_from_num_tasks"] - 1) * 128 <= storage["memory_bytes"]
    fresh = small_hop_net()
    fresh.load(tmp_path / "memory.safetensors")
    assert fresh.tasks.tolist() == list(range(7))
    assert len(fresh.reference_masks()) == 0
    assert fresh.sparsity().mean() == pytest.approx(method.sparsity().mean().item(), abs=1e-6)
    assert fresh.nearest(torch.ones(1024)) == -1
    with_tasks(fresh, 9, first=7)  # trained on, with masks that are known of the new tasks alone
    assert fresh.nearest(torch.ones(1024)) == -1
    assert len(fresh.tasks) == len(fresh.sparsity()) == 9


def test_a_foreign_memory_is_refused(tmp_path):
    method = with_tasks(small_hop_net(), 2)
    method.save(tmp_path / "memory.safetensors")
    others = {
        "memory 'storkey' there, 'hebbian' here": small_hop_net(memory="hebbian"),
        "seed '0' there, '1' here": small_hop_net(seed=1),
        "another network or other weights": HopSupSup(
            HopNet(output_size=9, input_shape=DIGITS, hidden_sizes=(512, 512))
        ),
    }
    for message, other in others.items():
        with pytest.raises(MismatchError, match=message):
            other.load(tmp_path / "memory.safetensors")
        with pytest.raises(MismatchError, match=message):
            other.load_state_dict(method.state_dict())
        assert len(other.memory) == 0
    with pytest.raises(DataError, match="of format supsup-hopfield-memory-1, not supsup-mask-bank-1"):
        random_method(0).load(tmp_path / "memory.safetensors")


def test_a_vector_whose_matrix_would_fill_the_machine_is_refused():
    network = nn.Sequential(nn.Linear(2, 20_000, bias=False), nn.LayerNorm(20_000, bias=False))
    with pytest.raises(
        ConfigurationError, match=r"1.weight has 20,000 values, whose Hopfield matrix would take 1.6 GB"
    ):
        HopSupSup(network)
    network = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 4))
    with pytest.raises(
        ConfigurationError, match=r"2.weight has a single value, and a Hopfield memory needs two\. Choose"
    ):
        HopSupSup(network)
    with pytest.raises(ConfigurationError, match=r"0.weight has shape \(8, 64\)\. .* or mask.max_dimensions=1"):
        HopSupSup(network, is_masked=ByName())


def test_more_tasks_than_the_memory_holds_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        small_hop_net().check_num_tasks(100)
        assert not caplog.records
        small_hop_net().check_num_tasks(200)
    assert "data.num_tasks=200 is more than the 145 random masks that a storkey memory of 512 units" in caplog.text


# What does not go together.


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            small_hop_net,
            {"inference": OneShot()},
            "OneShot needs a superposition .* HopSupSup does not offer; use scen",
        ),
        (
            small_hop_net,
            {"inference": Exhaustive(), "scenario": GNS},
            "Exhaustive needs the parameters of any finished",
        ),
        (
            small_hop_net,
            {"inference": Given(), "scenario": GG},
            "In scenario=gg the task is given by its number, and Hop",
        ),
        (small_hop_net, {"inference": HopfieldRecovery()}, "In scenario=gnu the number of the task has to be right"),
        (
            lambda: random_method(0),
            {"inference": HopfieldRecovery(), "scenario": GNS},
            "which SupSup does not offer; use inference=one_shot, binary or exhaustive, or another method",
        ),
    ],
)
def test_what_a_method_does_not_offer_is_refused_at_once(method, options, message):
    with pytest.raises(ConfigurationError, match=message):
        ContinualModule(method(), **{"scenario": GNU, **options})


def test_options_of_the_recovery_are_checked():
    with pytest.raises(ConfigurationError, match="inference.images='each' is neither a number of images from 1 on nor"):
        HopfieldRecovery(images="each")
    with pytest.raises(ConfigurationError, match="inference.temperature=2 has no effect"):
        HopfieldRecovery("max_probability", temperature=2)


def test_one_image_is_refused_before_training_where_the_network_normalises_by_the_batch(tmp_path):
    data = PermutedDigits(num_tasks=1, steps_per_task=1)
    with pytest.raises(ConfigurationError, match=r"one image has none .* or a number from 2 on\.$"):
        fit(small_hop_net(), data, folder=tmp_path, scenario=GNS, inference=HopfieldRecovery(images=1))


def test_one_image_at_inference_says_what_is_wrong(trained):
    module, _, data = trained
    with pytest.raises(ConfigurationError, match="One image is too few to recover a mask from"):
        module.infer(batch_of(data, 0)[0][:1])


# Learning and recovering.


def test_every_batch_recovers_the_mask_of_its_task(trained):
    module, trainer, data = trained
    accuracy, found = module.test_accuracy.compute()
    assert found.tolist() == [1, 1, 1]
    assert accuracy.mean() > 0.8
    record = next(callback for callback in trainer.callbacks if isinstance(callback, RecordRecovery))
    result = record.results()
    assert result["recovered"] == 1
    assert 1 <= result["steps_mean"] <= result["steps_max"] <= 30
    assert 0 < result["confidence_min"] <= result["confidence"]
    for task, trace in record.traces.items():
        energy, objective, *distances = trace.T
        assert distances[task][-1] == 0
        assert min(d[-1] for mask, d in enumerate(distances) if mask != task) > 200
        assert energy[-1] < energy[0]
        assert objective[-1] < objective[0]
    assert sorted(record.traces) == [0, 1, 2]
    images, _ = batch_of(data, 1)
    recovered = module.inference.recover(module.method, images, CLASSES)
    assert torch.equal(recovered.recovery.state > 0, module.method.reference_masks()[1])


def test_inference_does_not_look_at_the_masks_themselves(trained, tmp_path, monkeypatch):
    """Loaded from its file, which has no masks, the method predicts the same to the last bit; only numbers are lost."""
    module, _, data = trained
    module.method.save(tmp_path / "memory.safetensors")
    method = small_hop_net()
    method.load(tmp_path / "memory.safetensors")
    other = ContinualModule(method, scenario=GNS, inference=HopfieldRecovery())
    other.num_classes = (2, 3, 10)  # nor at how many classes the recovered task has, by number
    monkeypatch.setattr(module, "num_classes", other.num_classes)
    for task in range(3):
        images, _ = batch_of(data, task)
        (numbers, labels), (unknown, same) = module.infer(images), other.infer(images)
        assert torch.equal(labels, same)
        assert numbers.unique().tolist() == [task]
        assert unknown.unique().tolist() == [-1]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[RecordRecovery()])
    trainer.test(other, data, verbose=False)
    assert trainer.callbacks[0].results()["recovered"] is None
    assert trainer.callbacks[0].results()["confidence"] > 0
    assert other.test_accuracy.compute()[0].mean() == module.test_accuracy.compute()[0].mean()


def test_images_of_no_task_or_of_several_get_less_confidence(trained):
    module, _, data = trained

    def confidence(images):
        tasks, labels = module.infer(images)
        assert tasks.shape == labels.shape == (len(images),)
        return module.inference.last.confidence

    batches = [batch_of(data, task)[0] for task in range(3)]
    own = [confidence(images) for images in batches]
    unseen = PermutedDigits(num_tasks=5, steps_per_task=1)
    others = {
        "mixed": torch.cat([images[:40] for images in batches]),
        "unseen": batch_of(unseen, 4)[0],
        "noise": random_images(128),
        "blank": torch.zeros(128, *DIGITS),
    }
    for name, images in others.items():
        assert 0 <= confidence(images) < min(own) - 0.1, name


@pytest.mark.slow
def test_two_processes_learn_and_recover_as_one(tmp_path):
    options = ["method=hopfield", "data.num_tasks=2", "data.steps_per_task=60", "network.hidden_sizes=[512,512]"]
    run_cli(*options, "optimizer.lr=0.03", "trainer=ddp_cpu", *QUIET, "hydra.run.dir=run", cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["task_inference_accuracy"] == 1
    assert result["recovery"]["recovered"] == 1
    assert result["average_accuracy"] > 0.8


def test_a_resumed_run_ends_with_the_same_memory(tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(**options):
        data = PermutedDigits(num_tasks=3, epochs_per_task=2)
        module, trainer = fit(
            small_hop_net(), data, folder=tmp_path, scenario=GNS, inference=HopfieldRecovery(), **options
        )
        trainer.test(module, data, verbose=False)
        return module

    whole = run(callbacks=[Save()])
    resumed = run(checkpoint=tmp_path / "2.ckpt")  # half way through task 1
    for one, other in zip(whole.method.memory.weights, resumed.method.memory.weights, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.test_accuracy.compute(), resumed.test_accuracy.compute())


class Own(nn.Module):
    """A network of a user's own: biases, BatchNorm with running statistics, LayerNorm, and a vector of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.batch_norm = nn.Linear(64, 512), nn.BatchNorm1d(512)
        self.second, self.layer_norm = nn.Linear(512, 512), nn.LayerNorm(512, elementwise_affine=False)
        self.gain = nn.Parameter(torch.ones(512))
        self.head = nn.Linear(512, CLASSES)

    def forward(self, images):
        hidden = nn.functional.silu(self.batch_norm(self.first(images.flatten(1))))
        return self.head(nn.functional.silu(self.gain * self.layer_norm(self.second(hidden))))


@pytest.mark.parametrize(
    ("include", "names"),
    [(["gain"], ("gain",)), (["gain", "*norm.weight"], ("gain", "batch_norm.weight"))],
)
def test_any_named_vectors_of_any_network_can_be_masked(include, names, tmp_path):
    torch.manual_seed(0)
    data = PermutedDigits(num_tasks=3, steps_per_task=100)
    method = HopSupSup(Own(), is_masked=ByName(include=include, min_dimensions=1, max_dimensions=1))
    assert method.layout.names == names
    running = method.network.batch_norm.running_mean.clone()
    module, trainer = fit(method, data, folder=tmp_path, **OPTIONS)
    trainer.test(module, data, verbose=False)
    accuracy, found = module.test_accuracy.compute()
    assert found.mean() > 0.9
    assert accuracy.mean() > 0.6
    assert torch.equal(method.network.batch_norm.running_mean, running)  # no statistics of any task are kept
    stored = {key for key in method.state_dict() if key.startswith("network.")}
    expected = {name for name, p in method.network.named_parameters() if p.ndim == 1} - set(names)
    assert stored == {f"network.{name}" for name in expected}  # what is neither masked nor regrown


def test_supsup_predicts_through_the_same_surface():
    method, images = random_method(5), random_images(12)
    tasks, logits = Exhaustive("entropy", images="each").predict(method, images, CLASSES)
    assert len(tasks.unique()) > 1
    for task, row, image in zip(tasks.tolist(), logits, images.split(1), strict=True):
        torch.testing.assert_close(row, method(image, task)[0])
    assert isinstance(method, SupSup)
    for inference in (OneShot(images="each"), OneShot(), Exhaustive()):
        assert [len(part) for part in inference.predict(method, images[:0], CLASSES)] == [0, 0]


@pytest.mark.parametrize("inference", [OneShot(), Exhaustive(), Exhaustive(images="each")])
def test_supsup_over_a_network_of_batch_statistics_needs_more_than_one_image(inference, tmp_path):
    data = PermutedDigits(num_tasks=1, steps_per_task=1)
    method = SupSup(HopNet(output_size=100, input_shape=DIGITS, hidden_sizes=(32, 32)))
    with pytest.raises(ConfigurationError, match=r"HopNet normalises by the statistics .* or a number from 2 on\.$"):
        fit(method, data, folder=tmp_path, inference=inference)


# The command line.


def test_a_run_writes_its_recovery(tmp_path):
    options = ["data.num_tasks=2", "data.steps_per_task=60", "network.hidden_sizes=[512,512]", "optimizer.lr=0.03"]
    done = run_cli_here("method=hopfield", *options, "eval_at=[1]", "hydra.run.dir=run", cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (result["scenario"], result["network"], result["method"]) == ("gns", "hop_net", "hopfield")
    assert result["task_inference_accuracy"] == 1
    assert result["recovery"]["recovered"] == 1
    assert result["mask_bytes_per_task"] == 0
    assert result["memory_bytes"] == 2 * 4 * (512 * 513 // 2 + 512)
    assert result["model_bytes"] == (tmp_path / "run" / "mask_bank.safetensors").stat().st_size
    with (tmp_path / "run" / "recovery.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {row["task"]: row for row in rows}
    assert [last[str(task)][f"distance_{task}"] for task in range(2)] == ["0", "0"]
    assert (tmp_path / "run" / "figures" / "recovery.png").read_bytes()[1:4] == b"PNG"
    logged = (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    names = ("energy", "objective", "distance_0", "distance_1")
    assert {f"recovery/task_{task}/{name}" for task in range(2) for name in names} <= set(logged)
    assert "explicit masks 128 per task" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_split_mnist_reaches_the_published_accuracy(mnist_root, tmp_path):
    run_cli_here("experiment=split_mnist_hopfield", "eval_at=[]", *QUIET, "hydra.run.dir=run", cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["average_accuracy"] >= 0.974
    assert result["recovery"]["recovered"] >= 0.99
    assert result["recovery"]["steps_max"] <= 30
