"""What every method owes its users, and what the baselines are by themselves."""

import json
import re
from functools import partial
from inspect import getattr_static

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from supsup_lightning import (
    GG,
    GNS,
    PSP,
    BatchEnsemble,
    Exhaustive,
    FullyConnected,
    GEMResNet18,
    Given,
    HopSupSup,
    LeNet,
    LowerBound,
    PermutedDigits,
    SeparateHeads,
    SmallNetworks,
    SupSup,
    UpperBound,
)
from supsup_lightning.cli.command_line import check_options
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.methods import protocols
from supsup_lightning.methods.protocols import ByNumber
from tests.conftest import DIGITS, TINY, StopAfter, first_losses, fit, random_images, run_cli_here
from tests.test_config import composed

CLASSES = 10


def network(width: float = 1.0, *, biases: int = 0) -> nn.Module:
    """With biases, gains and running statistics."""
    torch.manual_seed(biases)  # as a command line does
    hidden = max(1, round(40 * width))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


METHODS = {
    "supsup": lambda **options: SupSup(network(), **options),
    "supsup_topk": lambda **options: SupSup(network(), rule="topk", sparsity=0.9, **options),
    "hopfield": lambda **options: HopSupSup(network(), **options),
    "batch_ensemble": lambda **options: BatchEnsemble(network(), **options),
    "batch_ensemble_random": lambda **options: BatchEnsemble(network(), trunk="random", **options),
    "separate_heads": lambda **options: SeparateHeads(network(), **options),
    "separate_heads_random": lambda **options: SeparateHeads(network(), trunk="random", **options),
    "psp": lambda **options: PSP(network(), **options),
    "upper_bound": lambda **options: UpperBound(network(), **options),
    "lower_bound": lambda **options: LowerBound(network(), **options),
    "small_networks": lambda **options: SmallNetworks(network, bytes_per_task=3000, **options),
}
OVERWRITING = ("lower_bound", "psp")


def train(method, task: int, *, steps: int = 12) -> list[float]:
    """Losses of a task of random images with fixed labels of its own."""
    method.begin_task(task)
    method.train()
    optimizer = torch.optim.Adam(method.trainable(), lr=0.02)
    labels = torch.randint(CLASSES, (64,), generator=torch.Generator().manual_seed(task))
    losses = []
    for _ in range(steps):
        loss = cross_entropy(method(random_images(64, seed=task), task), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    method.finish_task(task)
    method.eval()
    return losses


def logits_of(method, task: int) -> torch.Tensor:
    """Logits as at inference; masks in a Hopfield memory, by the state that they were stored as."""
    images = random_images(9, seed=99)
    with torch.no_grad():
        if isinstance(method, ByNumber):
            return method(images, task)
        return method.logits(STORED[task], images)


PROTOCOLS = {p for p in vars(protocols).values() if getattr(p, "_is_runtime_protocol", False)}
_SUPSUP = {
    *("ByNumber", "Superposes", "TrainsTogether", "Searches", "WarmStarts", "TrainsOn", "KnowsMasks"),
    "StandardisesScores",
}
OFFERED = {
    "supsup": _SUPSUP,
    "supsup_topk": _SUPSUP,
    "hopfield": {"RecoversMasks", "KnowsMasks"},
    **{
        f"{name}{trunk}": {"ByNumber", "SetsLearningRate"}
        for name in ("batch_ensemble", "separate_heads")
        for trunk in ("", "_random")
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_offers_is_the_same_in_every_python(name):
    method = METHODS[name]()
    assert {p.__name__ for p in PROTOCOLS if isinstance(method, p)} == OFFERED.get(name, {"ByNumber"})
    for protocol in PROTOCOLS:  # from Python 3.12 on, isinstance looks the members up so
        members = {member for member in {*vars(protocol), *protocol.__annotations__} if not member.startswith("_")}
        found = all(getattr_static(method, member, protocol) is not protocol for member in members)
        assert members
        assert found == isinstance(method, protocol)


STORED: dict[int, torch.Tensor] = {}  # of the Hopfield memory


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_surface(name, tmp_path):
    make = METHODS[name]
    method = make()
    before = {key: value.clone() for key, value in method.network.state_dict().items()}

    losses = train(method, 0)
    assert losses[-1] < losses[0] - 0.1
    kept = [sum(method.kept_bytes().values())]
    if name == "hopfield":
        STORED.update(enumerate(2.0 * method.reference_masks() - 1))
    first = logits_of(method, 0)
    statistics = method.effective(0)["2.running_mean"] if isinstance(method, ByNumber) else None
    for task in (1, 2):
        train(method, task)
        kept.append(sum(method.kept_bytes().values()))
    if name == "hopfield":
        STORED.update(enumerate(2.0 * method.reference_masks() - 1))

    # Later tasks change nothing of earlier ones, unless that is the point.
    if name in OVERWRITING:
        assert (logits_of(method, 0) - first).abs().max() > 0.1
    else:
        assert torch.equal(logits_of(method, 0), first)
    assert not torch.equal(logits_of(method, 1), logits_of(method, 2)) or name == "lower_bound"
    if isinstance(method, ByNumber) and name != "lower_bound":
        assert torch.equal(method.effective(0)["2.running_mean"], statistics)
    assert all(torch.equal(value, before[key]) for key, value in method.network.state_dict().items())

    # What is finished, and what is not.
    assert method.tasks.tolist() == [0, 1, 2]
    assert method.sparsity().shape == (3,)
    with pytest.raises(KeyError, match="Task 5"):
        method.effective(5)
    with pytest.raises(ConfigurationError, match="Task 1"):
        method.begin_task(1)

    # Checkpoint and file hold it all, and no other method takes them.
    path = tmp_path / "learned.safetensors"
    method.save(path)
    for load in ("state", "file"):
        fresh = make().eval()
        fresh.load_state_dict(method.state_dict()) if load == "state" else fresh.load(path)
        assert fresh.tasks.tolist() == [0, 1, 2]
        assert all(torch.equal(logits_of(fresh, task), logits_of(method, task)) for task in range(3))
        assert train(fresh, 3) == train(reloaded(make, method), 3)
    with pytest.raises(MismatchError):
        make(seed=1).load(path)
    with pytest.raises(MismatchError):
        make(seed=1).load_state_dict(method.state_dict())

    # Bytes: the file is what is kept, and a header; a task adds its row, and its number.
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    if name == "supsup_topk":  # sparse masks are coded
        assert path.stat().st_size < header + kept[2] - 0.4 * method.bank.packed.nbytes
    else:
        digests = 8 * (2 if name == "hopfield" else 5)  # of lists, of what is shared, and of each task it has a row of
        assert path.stat().st_size == header + kept[2] + digests
    numbers = 0 if name == "hopfield" else 8
    assert kept[2] - kept[1] == kept[1] - kept[0] == method.task_bytes() + numbers
    assert method.task_bytes() == pytest.approx(sum(part.task_bytes for part in method.parts()), abs=1)
    assert "network" not in method.kept_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_a_file_loads_where_what_no_seed_regrows_is_other(name, tmp_path, monkeypatch):
    """A notebook sets no seed: biases of another process."""
    method = METHODS[name]()
    train(method, 0)
    if name == "hopfield":
        STORED.update(enumerate(2.0 * method.reference_masks() - 1))
    method.save(tmp_path / "learned.safetensors")
    monkeypatch.setitem(globals(), "network", partial(network, biases=7))
    fresh = METHODS[name]().eval()
    fresh.load(tmp_path / "learned.safetensors")
    assert torch.equal(logits_of(fresh, 0), logits_of(method, 0))


def reloaded(make, method):
    """Another copy of a method, by its checkpoint."""
    copy = make()
    copy.load_state_dict(method.state_dict())
    return copy


# The baselines by themselves.


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    """Average accuracy and forgetting by method, on three permutations of the digits, the task given."""
    reached = {}
    make = partial(LeNet, output_size=CLASSES, input_shape=DIGITS)
    for name, method in {
        "upper_bound": UpperBound(make()),
        "lower_bound": LowerBound(make()),
        "psp": PSP(make()),
        "batch_ensemble": BatchEnsemble(make()),
        "separate_heads": SeparateHeads(make()),
        "small_networks": SmallNetworks(make),
        "supsup": SupSup(make()),
    }.items():
        data = PermutedDigits(num_tasks=3, steps_per_task=100)
        module, trainer = fit(method, data, folder=tmp_path_factory.mktemp(name), scenario=GG, inference=Given())
        trainer.test(module, data, verbose=False)
        right, _ = module.test_accuracy.compute()
        reached[name] = right.tolist()
    return reached


def test_networks_of_their_own_bound_the_others_and_fine_tuning_forgets(accuracies):
    average = {name: sum(right) / len(right) for name, right in accuracies.items()}
    assert average["upper_bound"] > 0.9
    assert average["upper_bound"] > average["batch_ensemble"]
    assert average["upper_bound"] > average["separate_heads"]
    assert average["supsup"] > average["upper_bound"] - 0.05
    assert accuracies["lower_bound"][-1] > 0.9 > accuracies["lower_bound"][0]
    assert average["lower_bound"] < average["psp"]  # rotations keep tasks apart


def test_batch_ensemble_finds_tasks_by_repeating_images(tmp_path):
    data = PermutedDigits(num_tasks=3, steps_per_task=150)
    method = BatchEnsemble(LeNet(output_size=CLASSES, input_shape=DIGITS))
    for objective in ("entropy", "max_probability"):
        inference = Exhaustive(objective, images="batch")
        if objective == "entropy":
            module, trainer = fit(method, data, folder=tmp_path, scenario=GNS, inference=inference)
        module.inference = inference
        trainer.test(module, data, verbose=False)
        assert module.test_accuracy.compute()[1].mean() > 0.45  # 1/3 by chance


def test_small_networks_are_as_wide_as_their_bytes_allow():
    make = partial(GEMResNet18, output_size=5)
    method = SmallNetworks(make)
    mask = SupSup(make())
    assert method.bytes_allowed == mask.task_bytes()
    assert method.task_bytes() <= method.bytes_allowed
    wider = UpperBound(make(width=method.width + 0.01))
    assert wider.task_bytes() > method.bytes_allowed
    assert method.dense_bytes() == 4 * sum(p.numel() for p in make().parameters())
    with pytest.raises(ConfigurationError, match="argument `width`"):
        SmallNetworks(lambda: make())
    with pytest.raises(TypeError, match="outputsize"):  # a mistake of the function's own
        SmallNetworks(lambda width: GEMResNet18(outputsize=5, width=width))
    with pytest.raises(ConfigurationError, match="method.bytes_per_task='abc' must be an integer"):
        SmallNetworks(make, bytes_per_task="abc")
    with pytest.raises(ConfigurationError, match=r"method.bytes_per_task=100 is less than the \d+ bytes"):
        SmallNetworks(make, bytes_per_task=100)


def test_rotations_are_orthogonal_regrown_and_of_their_task():
    one, two = (PSP(FullyConnected(output_size=CLASSES, input_shape=DIGITS, hidden_sizes=(33,))) for _ in range(2))
    assert [rotation.shape[0] for rotation in one.rotations(3).values()] == [64, 33]
    for first, second, other in zip(*(m.rotations(t).values() for m, t in ((one, 3), (two, 3), (one, 4))), strict=True):
        torch.testing.assert_close(first @ first.T, torch.eye(len(first)), atol=1e-5, rtol=0)
        assert torch.equal(first, second)
        assert not torch.allclose(first, other, atol=0.1)


def test_rotating_weights_is_rotating_inputs():
    method = PSP(nn.Linear(6, 3, bias=False))
    method.begin_task(2)
    images = torch.randn(5, 6)
    (rotation,) = method.rotations(2).values()
    torch.testing.assert_close(method(images, 2), images @ rotation.T @ method.live.values[0].view(3, 6).T)


def test_rank_one_factors_scale_outputs_and_inputs():
    method = BatchEnsemble(nn.Conv2d(3, 4, kernel_size=2, bias=False), trunk="random")
    method.begin_task(0)
    with torch.no_grad():
        method.live.values.copy_(torch.rand(1, 7) + 0.5)
    s, t = method.live.values[0].split([4, 3])
    images = torch.randn(2, 3, 5, 5)
    expected = method.network(images * t.view(1, 3, 1, 1)) * s.view(1, 4, 1, 1)
    torch.testing.assert_close(method(images, 0), expected)


def test_a_trunk_is_trained_by_the_first_task_alone_at_the_optimizers_rate(tmp_path):
    method = SeparateHeads(LeNet(output_size=CLASSES, input_shape=DIGITS), learning_rate=0.5)
    trunks, rates = [], []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_epoch_end(self, trainer, pl_module):
            trunks.append(method.trunk_values.clone())

    data = PermutedDigits(num_tasks=3, steps_per_task=20)
    fit(method, data, folder=tmp_path, scenario=GG, inference=Given(), callbacks=[Watch()])
    assert trunks[0].abs().sum() > 0
    assert torch.equal(trunks[0], trunks[2])
    assert rates == [0.001, 0.5, 0.5]
    assert method.learning_rate == 0.5


def test_heads_are_named_or_the_last_layer():
    assert SeparateHeads(network()).head.names == ("4.weight", "4.bias")
    assert SeparateHeads(network(), head=["1.*"]).head.names == ("1.weight", "1.bias")
    with pytest.raises(ConfigurationError, match=r"method.head: the pattern 'fc.\*' matches no parameter"):
        SeparateHeads(network(), head=["fc.*"])
    with pytest.raises(ConfigurationError, match=r"method.head=\['1.weight', .*\] is all of Sequential"):
        SeparateHeads(network(), head=["*"])
    with pytest.raises(ConfigurationError, match="method.trunk='trainde' is not known"):
        SeparateHeads(network(), trunk="trainde")
    with pytest.raises(ConfigurationError, match=r"method.head='4.weight' must be a list"):
        SeparateHeads(network(), head="4.weight")
    for rate in (-3, "abc"):
        with pytest.raises(ConfigurationError, match=f"method.learning_rate={rate!r} must be a positive number"):
            SeparateHeads(network(), learning_rate=rate)
    with pytest.raises(ConfigurationError, match="method.store_weights=true has no effect with method.trunk=trained"):
        SeparateHeads(network(), store_weights=True)


def test_pretrained_weights_are_counted_where_they_are_needed():
    size = 4 * sum(p.numel() for p in network().parameters() if p.ndim >= 2)
    assert SupSup(network(), weights="keep").kept_bytes()["network"] == size
    assert "seed" not in SupSup(network(), weights="keep").kept_bytes()
    assert "network" not in SupSup(network(), weights="keep", store_weights=True).kept_bytes()
    assert "network" not in UpperBound(network(), weights="keep").kept_bytes()
    # Of a random trunk, what no seed regrows, but nothing of the head.
    trunk = {"trunk": "random"}
    assert SeparateHeads(network(), weights="keep", **trunk).kept_bytes()["network"] == 4 * 40 * 64
    assert SeparateHeads(network(), **trunk).kept_bytes()["parameters"] == 4 * 40 * 3  # bias, and BatchNorm's two
    assert BatchEnsemble(network(), **trunk).kept_bytes()["parameters"] == 4 * (40 * 3 + CLASSES)
    stored = SeparateHeads(network(), store_weights=True, **trunk).kept_bytes()
    assert stored["parameters"] == 4 * 40 * (64 + 3)
    assert "seed" not in stored


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("batch_ensemble", [2.411147, 2.273544, 2.030042, 1.782839]),
        ("batch_ensemble_random", [2.411147, 2.409754, 2.380566, 2.391794]),
        ("separate_heads", [2.411147, 2.274884, 2.033193, 1.787259]),
        ("separate_heads_random", [2.411147, 2.359142, 2.248828, 2.126738]),
        ("psp", [2.416976, 2.227887, 1.971412, 1.751146]),
        ("upper_bound", [2.411147, 2.274884, 2.033193, 1.787259]),
        ("lower_bound", [2.411147, 2.274884, 2.033193, 1.787259]),
        ("small_networks", [2.508356, 2.289855, 2.241169, 2.083224]),
    ],
)
def test_golden_loss_of_four_steps(name, golden):
    """Any change of these numbers is a change of the method: of its initialisation, gradients, data or optimizer."""
    assert first_losses(METHODS[name](), lr=0.1) == pytest.approx(golden, rel=1e-4)


# On the command line.


@pytest.mark.parametrize("name", ["batch_ensemble", "separate_heads_random", "psp", "upper_bound", "lower_bound"])
def test_a_run_that_broke_off_resumes_to_the_same_values(name, tmp_path):
    def run(**options):
        method, data = METHODS[name](), PermutedDigits(num_tasks=3, epochs_per_task=2)
        fit(method, data, folder=tmp_path, scenario=GG, inference=Given(), **options)
        return method.kept()

    whole = run()
    for epoch in (0, 1, 2):  # within the first task, after it, within the second
        run(callbacks=[StopAfter(epoch, tmp_path / "stopped.ckpt")])
        resumed = run(checkpoint=tmp_path / "stopped.ckpt")
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_rival_runs_and_reports_its_bytes(tmp_path):
    options = ["method=batch_ensemble", *TINY]
    run_cli_here(*options, "hydra.run.dir=out", cwd=tmp_path)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["scenario"] == "gg"
    assert result["kept_bytes"].keys() == {"values", "tasks", "trunk"}
    assert sum(result["kept_bytes"].values()) == result["kept_bytes_in_all"] < result["model_bytes"]
    assert result["cap"] > 1
    shown = run_cli_here(*options, "print_masked=true", cwd=tmp_path).stdout
    assert "a factor for each output" in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=psp", "mask.sparsity=0.5"], "mask.sparsity=0.5 has no effect with method=psp, which learns no masks"),
        (["method=hopfield", "mask.init=transfer"], "mask.init=transfer has no effect with method=hopfield"),
        (["mask.search.tolerance=0.5"], "mask.search.tolerance=0.5 has an effect with mask.sparsity=auto alone"),
        (
            ["method=batch_ensemble", "method.trunk=random", "optimizer.lr=1"],
            "optimizer.lr=1 has no effect with method.trunk=random",
        ),
    ],
)
def test_an_option_without_effect_is_refused(overrides, message, tmp_path):
    config = composed(*overrides, folder=tmp_path)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        check_options(config)


def test_a_search_is_for_masks_in_a_bank():
    with pytest.raises(ConfigurationError, match="mask.sparsity=auto is for method=supsup alone"):
        HopSupSup(network(), rule="topk", sparsity="auto")


def test_options_without_effect_are_refused_on_the_command_line(tmp_path):
    done = run_cli_here("method=upper_bound", "mask.sparsity=0.5", cwd=tmp_path, check=False)
    assert "mask.sparsity=0.5 has no effect with method=upper_bound" in done.stderr
    done = run_cli_here("method=psp", "scenario=nns", "inference=exhaustive", cwd=tmp_path, check=False)
    assert "PSP cannot train a finished task on" in done.stderr
    done = run_cli_here("method=psp", "scenario=gnu", "inference=one_shot", cwd=tmp_path, check=False)
    assert "OneShot needs a superposition" in done.stderr
    assert "inference=exhaustive" in done.stderr


def test_rotations_drawn_in_a_test_can_be_trained_with():
    method = PSP(nn.Linear(6, 3))
    with torch.inference_mode():
        method.rotations(0)
    method.begin_task(0)
    method(torch.ones(2, 6), 0).sum().backward()
    assert method.live.values.grad.any()
