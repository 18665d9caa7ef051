"""Tasks trained apart: the banks of all shards are that of one run."""

import json

import pytest
import torch
from torch import nn

from examples.my_modules import SomeDigits
from supsup_lightning import (
    PSP,
    BatchEnsemble,
    ContinualDataModule,
    DataModuleSequence,
    Discriminant,
    Exhaustive,
    Given,
    HopfieldRecovery,
    HopNet,
    HopSupSup,
    LeNet,
    LowerBound,
    OneShot,
    PermutedDigits,
    SeparateHeads,
    SupSup,
    Unannounced,
    UpperBound,
)
from supsup_lightning.callbacks.results import WriteResults
from supsup_lightning.data import Digits, Split
from supsup_lightning.data.shard import Shard
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.report.collection import collect
from supsup_lightning.report.comparison import compare
from supsup_lightning.runs.evaluate_run import evaluate
from supsup_lightning.scenario import GG, GNS, GNU
from tests.conftest import DIGITS, StopAfter, digits_lenet, fit, run_cli_here


def permuted(**options) -> ContinualDataModule:
    return PermutedDigits(**{"num_tasks": 5, "steps_per_task": 12, **options})


def split(**options) -> ContinualDataModule:
    stream = Split(Digits(), classes_per_task=2)
    return ContinualDataModule(stream, input_shape=DIGITS, steps_per_task=12, **options)


def modules(**options) -> DataModuleSequence:
    digits = [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9], [1, 3, 5]]
    return DataModuleSequence([SomeDigits(some) for some in digits], steps_per_task=12, **options)


def dropout_net() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 40, bias=False), nn.Dropout(), nn.BatchNorm1d(40), nn.Linear(40, 20)
    )


def new(method: str):
    torch.manual_seed(0)
    lenet = lambda: LeNet(output_size=20, input_shape=DIGITS)  # noqa: E731
    return {
        "supsup": digits_lenet,
        "topk": lambda: digits_lenet(rule="topk", sparsity=0.8),
        "search": lambda: digits_lenet(rule="topk", sparsity="auto", search_candidates=(0.5, 0.9)),
        "dropout": lambda: SupSup(dropout_net()),
        "rotations": lambda: digits_lenet(superfluous="rotations"),
        "batch_ensemble": lambda: BatchEnsemble(lenet(), trunk="random"),
        "heads": lambda: SeparateHeads(lenet(), trunk="random"),
        "upper_bound": lambda: UpperBound(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20))),
    }[method]()


@pytest.mark.parametrize(
    ("method", "data", "inference", "options"),
    [
        ("supsup", permuted, OneShot, {}),
        ("supsup", permuted, OneShot, {"tasks_at_once": 2, "num_tasks": 9}),
        ("supsup", split, Discriminant, {}),
        ("supsup", split, lambda: Discriminant("convolution"), {}),
        ("supsup", permuted, Discriminant, {"tasks_at_once": 2, "num_tasks": 8}),
        ("topk", modules, OneShot, {}),
        ("supsup", modules, Discriminant, {}),
        ("supsup", split, OneShot, {"epochs_per_task": 3, "steps_per_task": None, "patience": 1}),
        ("search", permuted, OneShot, {}),
        ("dropout", permuted, lambda: OneShot(images="batch"), {"epochs_per_task": 2, "steps_per_task": None}),
        ("rotations", split, lambda: Exhaustive("consistency"), {}),
        ("batch_ensemble", permuted, Given, {}),
        ("heads", split, Given, {}),
        ("upper_bound", split, Given, {}),
    ],
)
def test_banks_of_four_shards_are_that_of_one_run(method, data, inference, options, tmp_path):
    if data is split and "epochs_per_task" in options:
        data = lambda **more: ContinualDataModule(Split(Digits(), classes_per_task=2), input_shape=DIGITS, **more)  # noqa: E731
    scenario = GG if inference is Given else GNU
    whole, _ = fit(new(method), data(**options), folder=tmp_path, inference=inference(), scenario=scenario)
    shards, tasks = [], []
    for number in range(4):
        part = data(**options, task_shard=f"{number}/4")
        module, trainer = fit(new(method), part, folder=tmp_path, inference=inference(), scenario=scenario)
        assert module.method.tasks.tolist() == [*part.task_numbers]
        tasks += part.task_numbers
        (tested,) = trainer.test(module, part, verbose=False)[:1]
        assert 0 <= tested["test/accuracy"] <= 1
        module.method.save(tmp_path / f"{number}.safetensors")
        shards.append(module)
    assert tasks == whole.method.tasks.tolist() == [*range(whole.trainer.datamodule.num_tasks)]
    joined = shards[0].method
    for number in range(1, 4):
        joined.merge(tmp_path / f"{number}.safetensors")
    kept, expected = joined.kept(), whole.method.kept()
    assert kept.keys() == expected.keys()
    for name, value in expected.items():
        if not name.startswith("gate.") or "patches" in name:
            assert torch.equal(kept[name], value), name
    images, _ = next(iter(data(**options).test_loader(0)))
    if joined.gate is not None:  # its sums are rounded in files
        mine, others = joined.gate.sums, whole.method.gate.sums
        for task in tasks:
            scatter = others.scatter(task)
            torch.testing.assert_close(mine.scatter(task), scatter, rtol=0, atol=1e-3 * scatter.abs().max().item())
        assert torch.equal(mine.counts, others.counts)
        torch.testing.assert_close(mine.means, others.means, rtol=0, atol=2e-3 * others.means.abs().max().item())
        found = [module.infer(images)[0] for module in (shards[0], whole)]
        assert (found[0] == found[1]).float().mean() > 0.95
    elif scenario is GNU:
        for mine, others in zip(shards[0].infer(images), whole.infer(images), strict=True):
            assert torch.equal(mine, others)


@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize("tasks_at_once", [1, 3])
def test_shards_are_blocks_that_cover_all_tasks(number, tasks_at_once):
    for num_tasks in range(1 + number * tasks_at_once, 40):
        blocks = [
            Shard(place, number or 1).tasks(num_tasks, tasks_at_once=tasks_at_once) for place in range(number or 1)
        ]
        assert [task for block in blocks for task in block] == [*range(num_tasks)]
        sizes = [-(-len(block) // tasks_at_once) for block in blocks]
        assert max(sizes) - min(sizes) <= 1
        assert all(block.start % tasks_at_once == 0 for block in blocks)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/4", "0/0", 0.25, "1/2/3", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigurationError, match=r"data.task_shard=.* must be i/n"):
        permuted(task_shard=text)


def test_what_cannot_be_trained_apart_is_refused_with_the_reason(tmp_path):
    lenet = LeNet(output_size=20, input_shape=DIGITS)
    for method, reason in (
        (digits_lenet(init="transfer"), "mask.init=transfer starts scores from those of earlier tasks"),
        (digits_lenet(init="nearest"), "mask.init=nearest starts"),
        (digits_lenet(init="previous"), "mask.init=previous starts"),
        (BatchEnsemble(lenet), "method.trunk=trained is trained by the first task"),
        (SeparateHeads(lenet), "method.trunk=trained is trained by the first task"),
        (LowerBound(lenet), "the same weights on all tasks in turn"),
        (PSP(lenet), "the same weights on all tasks in turn"),
    ):
        with pytest.raises(ConfigurationError, match=rf"data.task_shard=1/2 trains tasks apart .*{reason}"):
            fit(method, permuted(task_shard="1/2"), folder=tmp_path, inference=Given(), scenario=GG)
    with pytest.raises(ConfigurationError, match="in one memory"):
        fit(
            HopSupSup(HopNet(output_size=20, input_shape=DIGITS)),
            permuted(task_shard="1/2"),
            folder=tmp_path,
            inference=HopfieldRecovery(),
            scenario=GNS,
        )
    with pytest.raises(ConfigurationError, match="scenario=nns does not tell"):
        Unannounced(permuted(task_shard="0/2"))
    with pytest.raises(ConfigurationError, match="tasks_at_once=auto would group"):
        permuted(task_shard="0/2", tasks_at_once="auto")
    with pytest.raises(ConfigurationError, match="both say where to begin"):
        permuted(task_shard="0/2", first_task=1)
    with pytest.raises(ConfigurationError, match="use at most 3 shards"):
        permuted(task_shard="0/4", tasks_at_once=2).num_epochs  # noqa: B018
    for method in (LowerBound(lenet), BatchEnsemble(lenet)):
        with pytest.raises(ConfigurationError, match="cannot be merged"):
            method.merge(tmp_path / "any.safetensors")


def test_rows_that_differ_are_not_merged(tmp_path):
    first, other = new("batch_ensemble"), new("batch_ensemble")
    for method, tasks in ((first, (0, 1)), (other, (1, 2))):
        for task in tasks:
            method.begin_task(task)
            method.live.values.data += 0.1 * (task + (method is other))
            method.finish_task(task)
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(KeyError, match="Task 1 is in both and has other values"):
        first.merge(tmp_path / "other.safetensors")
    assert first.tasks.tolist() == [0, 1]


def test_a_shard_goes_on_from_its_own_checkpoint_alone(tmp_path):
    whole, _ = fit(digits_lenet(), permuted(task_shard="1/2"), folder=tmp_path)
    half = tmp_path / "half.ckpt"
    fit(digits_lenet(), permuted(task_shard="1/2"), folder=tmp_path, callbacks=[StopAfter(0, half)])
    resumed, _ = fit(digits_lenet(), permuted(task_shard="1/2"), folder=tmp_path, checkpoint=half)
    assert torch.equal(resumed.method.bank.packed, whole.method.bank.packed)
    assert resumed.method.tasks.tolist() == [2, 3, 4]
    for other, here in (("0/2", "0/2"), (None, "None"), ("1/3", "1/3")):
        with pytest.raises(MismatchError, match=f"data.task_shard=1/2 there, {here} here"):
            fit(digits_lenet(), permuted(task_shard=other), folder=tmp_path, checkpoint=half)
    with pytest.raises(MismatchError, match="data.num_tasks=5 there, 7 here"):
        fit(digits_lenet(), permuted(task_shard="1/2", num_tasks=7), folder=tmp_path, checkpoint=half)


def test_validation_and_prediction_are_of_the_shard(tmp_path):
    part = permuted(task_shard="1/2")
    module, trainer = fit(digits_lenet(), part, folder=tmp_path)
    trainer.validate(module, part, verbose=False)
    assert module.validated_tasks == (2, 3, 4)
    assert len(trainer.predict(module, part)) == 3
    with pytest.raises(ConfigurationError, match="Tasks 0 to 1 of data.num_tasks=5 were never learned"):
        trainer.test(module, permuted(), verbose=False)


SMALL = ["data.num_tasks=5", "data.steps_per_task=20", "~callbacks.progress", "logger=csv", "eval_at=all"]


def test_the_command_line_trains_shards_and_says_what_their_numbers_are_of(tmp_path):
    run_cli_here(*SMALL, "hydra.run.dir=whole", "data.task_shard=null", cwd=tmp_path)
    for number in (0, 1):
        run_cli_here(*SMALL, f"data.task_shard={number}/2", f"hydra.run.dir=shard{number}", cwd=tmp_path)
    result = json.loads((tmp_path / "shard1" / "results.json").read_text())
    assert {name: result[name] for name in ("task_shard", "first_task", "num_tasks", "num_masks")} == {
        "task_shard": "1/2",
        "first_task": 2,
        "num_tasks": 3,
        "num_masks": 3,
    }
    for name in ("accuracy_per_task", "validation_accuracy_per_task", "num_classes", "seconds_per_task"):
        assert len(result[name]) == 3, name
    assert result["forgetting"] is not None
    assert result["average_incremental_accuracy"] is not None
    header, *rows = (tmp_path / "shard1" / "accuracy_matrix.csv").read_text().splitlines()
    assert header == "tasks_learned,task_2,task_3,task_4"
    assert [row.count(",,") or row.endswith(",") for row in rows] == [1, True, False]
    confusion = (tmp_path / "shard1" / "task_confusion.csv").read_text().splitlines()[1:]
    assert {int(value) for row in confusion for value in row.split(",")[:2]} <= {2, 3, 4}
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert "task_shard" not in whole
    assert whole["num_tasks"] == 5
    assert not any(
        "task_shard" in name for name in json.loads((tmp_path / "whole" / "run.json").read_text())["options"]
    )
    assert (tmp_path / "shard1" / "figures" / "task_confusion.png").exists()

    # A shard's own directory is found again, another's refused.
    again = run_cli_here(*SMALL, "data.task_shard=1/2", "hydra.run.dir=shard1", "resume=true", cwd=tmp_path)
    assert "nothing left to do" in again.stdout + again.stderr
    for shard, here in (("0/2", "0/2"), ("null", "absent")):
        refused = run_cli_here(
            *SMALL, f"data.task_shard={shard}", "hydra.run.dir=shard1", "resume=true", cwd=tmp_path, check=False
        )
        assert (refused.returncode, f"data.task_shard=1/2 there, {here} here" in refused.stderr) == (1, True)

    # It is evaluated again, on its own tasks.
    found = evaluate(tmp_path / "shard1", ["inference=exhaustive", "inference.images=batch"])
    assert {name: found[name] for name in ("task_shard", "first_task", "num_tasks")} == {
        "task_shard": "1/2",
        "first_task": 2,
        "num_tasks": 3,
    }
    assert found["validation_accuracy_per_task"] == result["validation_accuracy_per_task"]
    for override in ("data.num_tasks=4", "data.task_shard=0/2"):
        with pytest.raises(ConfigurationError, match="makes other (shards|tasks)"):
            evaluate(tmp_path / "shard1", [override])

    # No mean over a shard and a whole run.
    comparison = compare(collect([tmp_path]))
    assert "data.task_shard" in comparison.varied
    assert comparison.groups[("runs", "")].tolist() == [1, 1, 1]

    # The joined banks are those of the whole run.
    method = digits_lenet()
    method.load(tmp_path / "shard0" / "mask_bank.safetensors")
    method.merge(tmp_path / "shard1" / "mask_bank.safetensors")
    expected = digits_lenet()
    expected.load(tmp_path / "whole" / "mask_bank.safetensors")
    assert torch.equal(method.bank.packed, expected.bank.packed)


def test_runs_in_python_say_their_shard_too(tmp_path):
    for shard in ("0/2", None):
        folder = tmp_path / str(shard)[0]
        data = permuted(task_shard=shard)
        module, trainer = fit(digits_lenet(), data, folder=folder, callbacks=[WriteResults(folder=folder)])
        trainer.test(module, data, verbose=False)
    assert "data.task_shard" in compare(collect([tmp_path])).varied
    assert json.loads((tmp_path / "0" / "results.json").read_text())["task_shard"] == "0/2"
