"""Tasks added later: a finished run of a few tasks goes on with more, and ends as one run of all."""

import json
import re
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch

from examples.my_modules import SomeDigits
from supsup_lightning import (
    PSP,
    BatchEnsemble,
    ContinualDataModule,
    ContinualModule,
    DataModuleSequence,
    Discriminant,
    Exhaustive,
    Given,
    HopfieldRecovery,
    HopNet,
    HopSupSup,
    LeNet,
    OneShot,
    PermutedDigits,
)
from supsup_lightning.data import Digits, Split
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.scenario import GG, GNS, GNU
from tests.conftest import DIGITS, ROOT, digits_lenet, fit, run_cli_here


def permuted(num_tasks: int, **options) -> ContinualDataModule:
    return PermutedDigits(num_tasks=num_tasks, steps_per_task=12, **options)


def split(num_tasks: int, **options) -> ContinualDataModule:
    return ContinualDataModule(
        Split(Digits(), classes_per_task=2), num_tasks=num_tasks, input_shape=DIGITS, steps_per_task=12, **options
    )


def modules(num_tasks: int, **options) -> DataModuleSequence:
    digits = [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9], [1, 3, 5]][:num_tasks]
    return DataModuleSequence([SomeDigits(some) for some in digits], steps_per_task=12, **options)


def new(method: str):
    torch.manual_seed(0)
    lenet = LeNet(output_size=20, input_shape=DIGITS)
    return {
        "supsup": lambda: digits_lenet(),
        "transfer": lambda: digits_lenet(init="transfer"),
        "rotations": lambda: digits_lenet(superfluous="rotations"),
        "batch_ensemble": lambda: BatchEnsemble(lenet),
        "psp": lambda: PSP(lenet),
        "hopfield": lambda: HopSupSup(HopNet(output_size=20, input_shape=DIGITS, hidden_sizes=(32,))),
    }[method]()


def same(one, other) -> None:
    """Both methods keep the same tensors."""
    mine, others = one.kept(), other.kept()
    assert mine.keys() == others.keys()
    for name, value in others.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize(
    ("method", "data", "options", "inference", "scenario"),
    [
        ("supsup", permuted, {}, OneShot, GNU),
        ("supsup", permuted, {"tasks_at_once": 2}, OneShot, GNU),
        ("supsup", split, {}, Discriminant, GNU),
        ("supsup", split, {}, lambda: Discriminant("convolution"), GNU),
        ("supsup", modules, {}, Discriminant, GNU),
        ("transfer", permuted, {}, OneShot, GNU),
        ("rotations", split, {}, lambda: Exhaustive("consistency"), GNU),
        ("batch_ensemble", permuted, {}, Given, GG),
        ("psp", permuted, {}, Given, GG),
        ("hopfield", permuted, {}, HopfieldRecovery, GNS),
    ],
)
def test_a_checkpoint_of_fewer_tasks_goes_on_to_the_bank_of_all(method, data, options, inference, scenario, tmp_path):
    parts = {"inference": inference(), "scenario": scenario, "folder": tmp_path}
    whole, last = fit(new(method), data(5, **options), **parts)
    parts["inference"] = inference()
    _, first = fit(new(method), data(2, **options), **parts)
    first.save_checkpoint(tmp_path / "two.ckpt")
    parts["inference"] = inference()
    grown, trainer = fit(new(method), data(5, **options), checkpoint=tmp_path / "two.ckpt", **parts)
    same(grown.method, whole.method)
    assert grown.num_classes == whole.num_classes
    assert grown.method.tasks.tolist() == [0, 1, 2, 3, 4]
    results = [one.test(module, data(5, **options), verbose=False) for one, module in ((trainer, grown), (last, whole))]
    assert results[0] == results[1]


def test_what_cannot_grow_is_refused(tmp_path):
    _, trainer = fit(digits_lenet(), permuted(3, tasks_at_once=2), folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    with pytest.raises(ConfigurationError, match=r"adds tasks to 3, .* do not fill groups of data.tasks_at_once=2"):
        fit(digits_lenet(), permuted(6, tasks_at_once=2), folder=tmp_path, checkpoint=tmp_path / "three.ckpt")
    with pytest.raises(MismatchError, match="data.num_tasks=3 there, 2 here"):
        fit(digits_lenet(), permuted(2, tasks_at_once=2), folder=tmp_path, checkpoint=tmp_path / "three.ckpt")
    _, trainer = fit(digits_lenet(), permuted(3), folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    with pytest.raises(MismatchError, match=r"other options: data.seed=0 there, 1 here"):
        fit(digits_lenet(), permuted(5, seed=1), folder=tmp_path, checkpoint=tmp_path / "three.ckpt")

    _, trainer = fit(digits_lenet(), modules(2), folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "modules.ckpt")
    others = DataModuleSequence([SomeDigits([0, 1]), SomeDigits([2, 3]), SomeDigits([4, 5])], steps_per_task=12)
    with pytest.raises(MismatchError, match=r"tasks with \[2, 3\] classes, and the first 2 tasks here have \[2, 2\]"):
        fit(digits_lenet(), others, folder=tmp_path, checkpoint=tmp_path / "modules.ckpt")


class Validated(SomeDigits):
    def val_dataloader(self):
        return self.test_dataloader()


def test_an_added_task_with_more_classes_would_change_rotated_outputs(tmp_path):
    def data(*digits):
        return DataModuleSequence([Validated(some) for some in digits], steps_per_task=4)

    parts = {"folder": tmp_path, "inference": Given(), "scenario": GG}
    two, three = [0, 1], [2, 3, 4]
    _, trainer = fit(new("rotations"), data(two, two), **parts)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ConfigurationError, match=r"copies of 2 classes in the checkpoint, and an added task has 3"):
        fit(new("rotations"), data(two, two, three), checkpoint=tmp_path / "two.ckpt", **parts)


# From a bank, in Python.


@pytest.mark.parametrize("inference", [OneShot, Discriminant])
def test_a_task_is_added_to_a_loaded_bank(inference, tmp_path):
    whole, _ = fit(digits_lenet(), modules(5), folder=tmp_path, inference=inference())
    first, _ = fit(digits_lenet(), modules(4), folder=tmp_path, inference=inference())
    first.method.save(tmp_path / "bank.safetensors")

    model = ContinualModule(digits_lenet(), inference=inference())
    model.method.load(tmp_path / "bank.safetensors")
    data = DataModuleSequence([SomeDigits([1, 3, 5])], first_task=4, num_classes=[2, 3, 2, 3, 3], steps_per_task=12)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=model.task_callbacks(data),
        max_epochs=data.num_epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    model.method.save(tmp_path / "bank.safetensors")

    assert model.method.tasks.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(model.method.bank.packed, whole.method.bank.packed)
    assert model.num_classes == whole.num_classes
    trainer.test(model, data, verbose=False)  # the new task
    assert model.test_accuracy.compute().shape == (2, 1)
    trainer.test(model, modules(5), verbose=False)  # all tasks
    assert model.test_accuracy.compute().shape == (2, 5)
    again = digits_lenet()
    again.load(tmp_path / "bank.safetensors")
    assert torch.equal(again.bank.packed, whole.method.bank.packed)


@pytest.mark.parametrize("method", ["batch_ensemble", "psp", "hopfield"])
def test_other_methods_are_loaded_and_go_on(method, tmp_path):
    scenario, inference = (GNS, HopfieldRecovery) if method == "hopfield" else (GG, Given)
    parts = {"folder": tmp_path, "scenario": scenario}
    whole, _ = fit(new(method), permuted(4), inference=inference(), **parts)
    first, _ = fit(new(method), permuted(2), inference=inference(), **parts)
    first.method.save(tmp_path / "bank.safetensors")
    loaded = new(method)
    loaded.load(tmp_path / "bank.safetensors")
    data = permuted(4, first_task=2)
    grown, trainer = fit(loaded, data, inference=inference(), **parts)
    same(grown.method, whole.method)
    trainer.test(grown, data, verbose=False)
    assert grown.test_accuracy.compute().shape == (2, 2)


def test_first_task_needs_the_tasks_before_it_and_no_others(tmp_path):
    with pytest.raises(ConfigurationError, match=r"tasks 0 to 1 before it were never finished; load the bank"):
        fit(digits_lenet(), permuted(3, first_task=2), folder=tmp_path)
    trained, _ = fit(digits_lenet(), permuted(3), folder=tmp_path)
    removed = digits_lenet()
    removed.load_state_dict(trained.method.state_dict())
    removed.bank.remove(1)  # a bank without one of them learns further ones as well
    fit(removed, permuted(4, first_task=3), folder=tmp_path)
    assert removed.tasks.tolist() == [0, 2, 3]
    for data, again in ((permuted(3), "Tasks 0 to 2 are"), (permuted(4, first_task=2), "Task 2 is")):
        with pytest.raises(ConfigurationError, match=rf"{again} finished.* give the data first_task=3"):
            fit(trained.method, data, folder=tmp_path)
    with pytest.raises(ConfigurationError, match="data.first_task=3 leaves none of the 3 tasks"):
        permuted(3, first_task=3).num_epochs  # noqa: B018
    with pytest.raises(ConfigurationError, match=r"data.first_task=2 needs data.num_classes, one number for each of"):
        DataModuleSequence([SomeDigits([0, 1])], first_task=2)
    with pytest.raises(ConfigurationError, match=r"The data of task 1 are needed, and data.first_task=2"):
        DataModuleSequence([SomeDigits([0, 1])], first_task=2, num_classes=2).test_loader(1)


def test_python_on_the_page_runs(tmp_path, monkeypatch):
    """The blocks of docs/added_tasks.md as they are, over small banks."""
    page = (ROOT / "docs" / "added_tasks.md").read_text()
    merges, adds = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for shard in range(4):
        part, _ = fit(digits_lenet(), permuted(8, task_shard=f"{shard}/4"), folder=tmp_path)
        part.save(tmp_path / "shards" / str(shard) / "mask_bank.safetensors")
    merged: dict = {}
    exec(compile(merges, "added_tasks.md", "exec"), merged)
    assert merged["model"].method.tasks.tolist() == [*range(8)]
    assert len(merged["model"].infer(torch.zeros(2, 1, 8, 8))[0]) == 2

    digits = [[0, 1], [2, 3, 4], [5, 6, 7, 8, 9]]
    before = DataModuleSequence([SomeDigits(some) for some in digits], steps_per_task=12)
    trained, _ = fit(digits_lenet(), before, folder=tmp_path)
    trained.save(tmp_path / "mask_bank.safetensors")
    added: dict = {}
    exec(compile(adds, "added_tasks.md", "exec"), added)
    after = digits_lenet()
    after.load(tmp_path / "mask_bank.safetensors")
    assert after.tasks.tolist() == [0, 1, 2, 3]
    for task in range(3):
        assert torch.equal(after.bank.get(task), trained.method.bank.get(task))


# On the command line.

SMALL = ["data.steps_per_task=20", "~callbacks.progress", "logger=csv", "eval_at=all", "hydra.run.dir=run"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The directory of a finished run of three tasks; to be copied."""
    folder = tmp_path_factory.mktemp("three")
    run_cli_here(*SMALL, "data.num_tasks=3", cwd=folder)
    return folder / "run"


def test_a_finished_run_goes_on_with_more_tasks(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    more = run_cli_here(*SMALL, "data.num_tasks=5", "resume=true", cwd=tmp_path)
    assert "3 tasks are finished; training goes on" in more.stdout + more.stderr
    run_cli_here(*SMALL, "data.num_tasks=5", "hydra.run.dir=whole", cwd=tmp_path)
    grown, whole = tmp_path / "run", tmp_path / "whole"
    assert (grown / "mask_bank.safetensors").read_bytes() == (whole / "mask_bank.safetensors").read_bytes()
    assert (grown / "accuracy_matrix.csv").read_text() == (whole / "accuracy_matrix.csv").read_text()
    changing = ("seconds", "memory", "inference_ms", "versions")
    here, there = (
        {name: value for name, value in results(folder).items() if not any(word in name for word in changing)}
        for folder in (grown, whole)
    )
    assert here == there
    assert len(results(grown)["seconds_per_task"]) == 5
    assert results(grown)["average_incremental_accuracy"] is not None
    assert json.loads((grown / "run.json").read_text())["options"]["data.num_tasks"] == 5
    assert "data.num_tasks=5" in (grown / ".hydra" / "overrides.yaml").read_text()
    assert results(three) == json.loads((grown / "results.previous.json").read_text())
    again = run_cli_here(*SMALL, "data.num_tasks=5", "resume=true", cwd=tmp_path)
    assert "nothing left to do" in again.stdout + again.stderr
    fewer = run_cli_here(*SMALL, "data.num_tasks=3", "resume=true", cwd=tmp_path, check=False)
    assert (fewer.returncode, "data.num_tasks=5 there, 3 here" in fewer.stderr) == (1, True)


@pytest.mark.parametrize("epoch", [3, 4])  # of the first added task, of the second
def test_a_run_that_adds_tasks_survives_a_stop(epoch, tmp_path):
    stops = [*SMALL, f"+callbacks.stop={{_target_: tests.test_added_tasks.StopOnce, epoch: {epoch}, marker: stopped}}"]
    run_cli_here(*stops, "data.num_tasks=3", cwd=tmp_path)
    stopped = run_cli_here(*stops, "data.num_tasks=5", "resume=true", cwd=tmp_path, check=False)
    assert (stopped.returncode, "stopped for a test" in stopped.stderr) == (1, True)
    assert not (tmp_path / "run" / "results.json").exists()
    fewer = run_cli_here(*stops, "data.num_tasks=3", "resume=true", cwd=tmp_path, check=False)
    assert (fewer.returncode, "data.num_tasks=5 there, 3 here" in fewer.stderr) == (1, True)
    run_cli_here(*stops, "data.num_tasks=5", "resume=true", cwd=tmp_path)
    run_cli_here(*SMALL, "data.num_tasks=5", "hydra.run.dir=whole", cwd=tmp_path)
    for name in ("mask_bank.safetensors", "accuracy_matrix.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class StopOnce(L.Callback):
    """Breaks training off in an epoch, the first time."""

    def __init__(self, epoch: int, marker: str) -> None:
        self.epoch, self.marker = epoch, Path(marker)

    def on_train_batch_start(self, trainer, *_):
        if trainer.current_epoch == self.epoch and not self.marker.exists():
            self.marker.touch()
            raise ConfigurationError("stopped for a test")


def test_what_cannot_grow_on_the_command_line_is_refused(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    before = results(three)
    for overrides, message in (
        (("data.num_tasks=2",), "data.num_tasks=3 there, 2 here"),
        (("data.num_tasks=5", "seed=1"), "data.num_tasks=3 there, 5 here; seed=0 there, 1 here"),
        (("data.num_tasks=5", "data.task_shard=1/2"), "data.task_shard=absent there, 1/2 here"),
        (("data.num_tasks=5", "data.tasks_at_once=2"), "data.tasks_at_once=1 there, 2 here"),
    ):
        done = run_cli_here(*SMALL, *overrides, "resume=true", cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert message in done.stderr
    assert results(tmp_path / "run") == before
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    done = run_cli_here(*SMALL, "data.num_tasks=5", "resume=true", cwd=tmp_path, check=False)
    assert (done.returncode, "no checkpoints/last.ckpt" in done.stderr) == (1, True)
    assert results(tmp_path / "run") == before
