"""The commands `supsup bank ...`: what files say, joined files, and tasks that are removed or renamed."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from supsup_lightning import (
    PSP,
    BatchEnsemble,
    ContinualDataModule,
    Discriminant,
    Exhaustive,
    GEMResNet18,
    HopfieldRecovery,
    HopNet,
    HopSupSup,
    LeNet,
    LowerBound,
    OneShot,
    SeparateHeads,
    SupSup,
    UpperBound,
    load,
)
from supsup_lightning.bank import codec
from supsup_lightning.bank.selection import finished_tasks, selected
from supsup_lightning.cli.app import app
from supsup_lightning.data import Digits, Split
from supsup_lightning.data.inputs import Inputs
from supsup_lightning.data.naming import AboutData, TaskDescription
from supsup_lightning.data.raw_images import RawImages
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.module import ContinualModule
from supsup_lightning.scenario import GNS
from tests.conftest import DIGITS, fit, random_images, run_cli_here

CLASSES = ("ant", "bee", "cat")


def supsup(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and messages of the command."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(*arguments: str) -> str:
    """The message of a command that is refused in one line."""
    status, output, message = supsup(*arguments)
    assert (status, output) == (1, "")
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def small_lenet(**options) -> LeNet:
    return LeNet(**{"output_size": 12, "input_shape": DIGITS, "width": 0.1, **options})


def module_of(method, tasks, *, shape=DIGITS, **options) -> ContinualModule:
    """A module with random masks of these tasks, which knows of data what training would have told it."""
    for task in tasks:
        method.begin_task(task)
        method.finish_task(task)
    module = ContinualModule(method, **{"inference": OneShot(), **options})
    size = max(tasks) + 1
    module.num_classes = (3,) * size
    module.inputs = Inputs(shape, torch.float32)
    descriptions = tuple(TaskDescription(f"zoo {task}", CLASSES) for task in range(size))
    module.about_data = AboutData(
        module.inputs, RawImages(shape=shape, mean=(8.0,) * shape[0], std=(4.0,) * shape[0]), descriptions
    )
    module.accuracies = {"test": {task: 0.5 + task / 10 for task in tasks}}
    return module


METHODS = {
    "supsup": lambda: SupSup(small_lenet(), seed=3),
    "sparse": lambda: SupSup(small_lenet(), rule="topk", sparsity=0.95),
    "normalisation": lambda: SupSup(GEMResNet18(output_size=5, base_channels=2)),
    "rotations": lambda: SupSup(small_lenet(), superfluous="rotations"),
    "batch_ensemble": lambda: BatchEnsemble(small_lenet(), trunk="random"),
    "separate_heads": lambda: SeparateHeads(small_lenet(), trunk="random"),
    "upper_bound": lambda: UpperBound(small_lenet()),
}


def save(name: str, tasks, path, **options):
    torch.manual_seed(0)
    method = METHODS[name]()
    inference = OneShot() if isinstance(method, SupSup) else Exhaustive()
    inference = Exhaustive("consistency") if name == "rotations" else inference
    shape = (3, 32, 32) if name == "normalisation" else DIGITS
    module_of(method, tasks, **{"inference": inference, "shape": shape, **options}).save(path)
    return path


@pytest.fixture
def file(tmp_path):
    return save("supsup", range(4), tmp_path / "bank.safetensors")


def test_info_says_what_the_file_is(file):
    status, output, _ = supsup("bank", "info", file, "--json")
    found = json.loads(output)
    method = load(file).method
    assert status == 0
    assert found["network"]["class"].endswith("LeNet")
    assert found["network"]["arguments"]["width"] == 0.1
    assert (found["scenario"], found["seed"], found["num_tasks"], found["num_classes"]) == ("GNu", 3, 4, 12)
    assert found["bytes"] == {
        "file": file.stat().st_size,
        "per_task": method.task_bytes(),
        "parts": method.kept_bytes(),
    }
    assert found["sparsity"] == pytest.approx(method.sparsity().mean().item())
    assert found["accuracy"] == {"validation": None, "test": pytest.approx(0.65)}
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    status, output, _ = supsup("bank", "info", file)
    assert status == 0
    assert "LeNet(" in output
    assert "4, of 3 classes each" in output


def test_list_has_a_row_per_task(file):
    _, output, _ = supsup("bank", "list", file, "--json")
    rows = json.loads(output)
    assert [row["task"] for row in rows] == [0, 1, 2, 3]
    assert rows[2] | {"sparsity": 0} == {
        "task": 2,
        "name": "zoo 2",
        "classes": [*CLASSES],
        "num_classes": 3,
        "sparsity": 0,
        "validation": None,
        "test": pytest.approx(0.7),
    }
    assert [row["sparsity"] for row in rows] == load(file).method.sparsity().tolist()
    _, output, _ = supsup("bank", "list", file)
    assert len(output.splitlines()) == 5
    assert "0.7000" in output.splitlines()[3]


def test_verify_names_what_is_damaged(file, tmp_path):
    status, output, _ = supsup("bank", "verify", file)
    assert status == 0
    assert output.count("\n") == 1
    assert "the logits of task 0 and 3 are those of training" in output
    data = bytearray(file.read_bytes())
    packed = codec.read_contents(file).tensors["packed"][2].numpy().tobytes()
    data[bytes(data).index(packed) + 5] ^= 8
    (tmp_path / "flipped").write_bytes(data)
    assert "the mask of task 2 is not what was written" in refused("bank", "verify", tmp_path / "flipped")
    (tmp_path / "short").write_bytes(data[:-100])
    assert "cannot be read" in refused("bank", "verify", tmp_path / "short")
    contents = codec.read_contents(file)
    logits = {"0": [[9.0, 1, 2, 3, 4, 5]] * 2}
    codec.write_contents(tmp_path / "other", contents._replace(recipe={**contents.recipe, "fingerprint": logits}))
    assert "does not compute what was trained" in refused("bank", "verify", tmp_path / "other")
    codec.write_contents(tmp_path / "made_up", contents._replace(recipe={"version": 1}))
    assert "made up" in refused("bank", "verify", tmp_path / "made_up")
    assert "made up" in refused("bank", "list", tmp_path / "made_up")


def test_contents_are_written_again_byte_for_byte(tmp_path):
    for name in ("supsup", "sparse"):
        file = save(name, range(3), tmp_path / "bank.safetensors")
        codec.write_contents(tmp_path / "again", codec.read_contents(file))
        assert (tmp_path / "again").read_bytes() == file.read_bytes()
    assert "coded" in codec.read_contents(file).tensors


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("parts", [([0, 1], [2, 3, 4]), ([2, 3], [4], [0, 1]), ([0, 2, 4], [1, 3])])
def test_merged_files_are_that_of_tasks_trained_together(name, parts, tmp_path):
    whole = save(name, range(5), tmp_path / "whole")
    files = [save(name, tasks, tmp_path / f"{number}") for number, tasks in enumerate(parts)]
    status, output, message = supsup("bank", "merge", *files, "--out", tmp_path / "joined")
    assert status == 0, message
    assert "5 tasks" in output
    assert (tmp_path / "joined").read_bytes() == whole.read_bytes()


def test_trained_shards_merge_to_one_run_and_keep_their_accuracies(tmp_path):
    """With the sums of inference=discriminant, which each file has rounded."""
    options = ("data=split_digits", "data.steps_per_task=20", "logger=none", "inference=discriminant")
    run_cli_here(*options, "hydra.run.dir=whole", cwd=tmp_path)
    for shard in range(2):
        run_cli_here(*options, f"data.task_shard={shard}/2", f"hydra.run.dir={shard}", cwd=tmp_path)
    parts = [tmp_path / str(shard) / "mask_bank.safetensors" for shard in range(2)]
    assert supsup("bank", "merge", *parts, "--out", tmp_path / "joined")[0] == 0
    whole = tmp_path / "whole" / "mask_bank.safetensors"
    mine, other = (codec.read_contents(path) for path in (tmp_path / "joined", whole))
    assert mine.tensors.keys() == other.tensors.keys()
    for key, value in other.tensors.items():
        if not key.startswith("gate."):
            assert torch.equal(mine.tensors[key], value), key
    for key in ("num_classes", "tasks", "fingerprint", "inputs", "raw"):
        assert mine.recipe[key] == other.recipe[key]
    for number, path in enumerate(parts):
        results = json.loads((path.parent / "results.json").read_text())
        for place, accuracy in enumerate(results["accuracy_per_task"]):
            task = results["first_task"] + place
            assert mine.recipe["accuracy"]["test"][str(task)] == pytest.approx(accuracy, abs=1e-4), (number, task)
    images = random_images(50)
    answers = [load(path).predict(images) for path in (tmp_path / "joined", whole)]
    assert (answers[0].task == answers[1].task).float().mean() > 0.9


def test_clashing_numbers_are_refused_or_renumbered(tmp_path):
    first = save("supsup", range(2), tmp_path / "first")
    module = module_of(METHODS["supsup"](), [0, 1, 4])
    masks = [1 - module.method.bank.get(task).int() for task in (0, 1)]
    for task, mask in enumerate(masks):
        module.method.bank.replace(task, mask.bool())
    module.save(tmp_path / "second")
    before = (tmp_path / "second").read_bytes()
    out = tmp_path / "joined"
    message = refused("bank", "merge", first, tmp_path / "second", "--out", out)
    assert "has tasks of the numbers 0, 1, as" in message
    assert "--renumber" in message
    assert not out.exists()
    status, output, _ = supsup("bank", "merge", first, tmp_path / "second", "--out", out, "--renumber")
    assert status == 0
    assert "0 is 5, 1 is 6" in output
    joined = load(out)
    assert joined.method.tasks.tolist() == [0, 1, 4, 5, 6]
    assert [joined.name_of_task(task) for task in (0, 1, 4, 5, 6)] == ["zoo 0", "zoo 1", "zoo 4", "zoo 0", "zoo 1"]
    assert joined.accuracies["test"] == {0: 0.5, 1: 0.6, 4: 0.9, 5: 0.5, 6: 0.6}
    for task, mask in zip((5, 6), masks, strict=True):
        assert torch.equal(joined.method.bank.get(task).int(), mask)
    assert (tmp_path / "second").read_bytes() == before
    assert "'zoo 0' may be any of the tasks 0 (zoo 0), 5 (zoo 0)" in refused("bank", "remove", out, "zoo 0")
    assert "exists" in refused("bank", "merge", first, tmp_path / "second", "--out", out, "--renumber")
    assert supsup("bank", "merge", first, tmp_path / "second", "--out", out, "--renumber", "--force")[0] == 0


def test_a_file_renumbered_beside_itself_keeps_its_gate(tmp_path):
    data = ContinualDataModule(Split(Digits(), classes_per_task=5), input_shape=DIGITS, steps_per_task=12)
    module, _ = fit(SupSup(small_lenet()), data, folder=tmp_path, inference=Discriminant(per_task=True))
    module.save(tmp_path / "a")
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    assert supsup("bank", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c", "--renumber")[0] == 0
    gate = load(tmp_path / "c").method.gate
    for task in (0, 1):
        assert torch.equal(gate.sums.scatter(task), gate.sums.scatter(task + 2))
        assert torch.equal(gate.rows.read(task, "distances"), gate.rows.read(task + 2, "distances"))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda: SupSup(small_lenet(), seed=4), "method.seed is 3 and 4"),
        (lambda: SupSup(small_lenet(width=0.2), seed=3), "network.width is 0.1 and 0.2"),
        (lambda: SupSup(small_lenet(), seed=3, rule="topk", sparsity=0.9), "method.rule is"),
        (lambda: UpperBound(small_lenet()), "inference is supsup_lightning.inference.OneShot and supsup"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_difference(other, difference, file, tmp_path):
    method = other()
    inference = OneShot() if isinstance(method, SupSup) else Exhaustive()
    module_of(method, [7], inference=inference).save(tmp_path / "other")
    message = refused("bank", "merge", file, tmp_path / "other", "--out", tmp_path / "joined")
    assert difference in message
    assert not (tmp_path / "joined").exists()


def test_an_inference_that_differs_is_refused(file, tmp_path):
    other = save("supsup", [7], tmp_path / "other", inference=OneShot(images="each"))
    assert "inference.images is" in refused("bank", "merge", file, other, "--out", tmp_path / "joined")


@pytest.mark.parametrize("name", METHODS)
def test_what_stays_after_a_removal_is_kept_bit_for_bit(name, tmp_path):
    file = save(name, range(4), tmp_path / "bank")
    whole = codec.read_contents(file)
    images = torch.randn(6, *load(file).inputs.shape, generator=torch.Generator().manual_seed(0))
    answers = [load(file).predict(images, task=task) for task in (0, 3)]
    status, output, message = supsup("bank", "remove", file, "1", "zoo 2", "--out", tmp_path / "less")
    assert status == 0, message
    assert "removed task 1 (zoo 1)\nremoved task 2 (zoo 2)\n" in output
    less, model = codec.read_contents(tmp_path / "less"), load(tmp_path / "less")
    assert finished_tasks(less.tensors) == [0, 3]
    for key, value in selected(whole.tensors, [0, 3]).items():
        assert torch.equal(less.tensors[key], value), key
    for task, answer in zip((0, 3), answers, strict=True):
        assert torch.equal(model.predict(images, task=task).confidence, answer.confidence)
    assert "zoo 1" not in json.dumps(less.recipe)
    # The last task gone: as if it had never been trained.
    assert supsup("bank", "remove", file, "zoo 3")[0] == 0
    assert file.read_bytes() == save(name, range(3), tmp_path / "three").read_bytes()


def test_logits_are_written_where_those_of_removed_tasks_go(file):
    assert supsup("bank", "remove", file, "0", "3")[0] == 0
    assert [*codec.read_contents(file).recipe["fingerprint"]] == ["1", "2"]
    assert "task 1 and 2" in supsup("bank", "verify", file)[1]


def test_removal_says_what_stays_in_the_gate(tmp_path):
    data = ContinualDataModule(Split(Digits(), classes_per_task=2), input_shape=DIGITS, steps_per_task=12)
    for per_task in (False, True):
        module, _ = fit(SupSup(small_lenet()), data, folder=tmp_path, inference=Discriminant(per_task=per_task))
        module.save(tmp_path / "bank")
        before = load(tmp_path / "bank").method.gate.sums
        images = int(before.counts[before.tasks == 2].sum())
        status, output, _ = supsup("bank", "remove", tmp_path / "bank", "2")
        assert status == 0
        assert (f"the scatter of {images} images" in output) == (not per_task)
        model = load(tmp_path / "bank")
        after, kept = model.method.gate.sums, before.tasks != 2
        assert torch.equal(after.means, before.means[kept])
        assert torch.equal(after.scatter(1), before.scatter(1))
        assert 2 not in model.method.gate.rows
        assert 2 not in model.predict(random_images(40)).task


def test_combinations_hold_their_masks(tmp_path):
    module = module_of(METHODS["supsup"](), [0, 1, 2])
    combinations, masks = module.method.combinations, module.method.bank.tasks
    combinations.set(3, torch.tensor([0.5, 0.0, 1.0]), module.method.base.fresh_statistics(), masks=masks)
    module.num_classes += (3,)
    module.save(tmp_path / "bank")
    message = refused("bank", "remove", tmp_path / "bank", "2")
    assert "masks of tasks 2 are part of the combinations of tasks 3" in message
    assert supsup("bank", "remove", tmp_path / "bank", "1")[0] == 0
    assert load(tmp_path / "bank").method.tasks.tolist() == [0, 2, 3]
    assert supsup("bank", "remove", tmp_path / "bank", "3", "2")[0] == 0
    assert load(tmp_path / "bank").method.tasks.tolist() == [0]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (lambda: PSP(small_lenet()), {"inference": Exhaustive()}),
        (lambda: LowerBound(small_lenet()), {"inference": Exhaustive()}),
        (
            lambda: HopSupSup(HopNet(output_size=12, input_shape=DIGITS, hidden_sizes=(16,))),
            {"inference": HopfieldRecovery(), "scenario": GNS},
        ),
        (lambda: BatchEnsemble(small_lenet()), {"inference": Exhaustive()}),
    ],
)
def test_tasks_that_share_what_is_kept_are_refused_with_the_reason(method, options, tmp_path):
    for path, tasks in (("a", [0, 1]), ("b", [0, 1])):
        torch.manual_seed(0)
        module_of(method(), tasks, **options).save(tmp_path / path)
    assert [supsup("bank", command, tmp_path / "a")[0] for command in ("info", "list", "verify")] == [0, 0, 0]
    message = refused("bank", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert "cannot be merged" in message
    if "BatchEnsemble" not in str(method()):
        assert "share all that the file keeps" in refused("bank", "remove", tmp_path / "a", "1")
    else:
        output = supsup("bank", "remove", tmp_path / "a", "0")[1]
        assert "stays: the weights that all tasks share" in output


def test_a_task_gets_another_name_and_nothing_else_changes(file, tmp_path):
    before = codec.read_contents(file)
    assert supsup("bank", "rename", file, "zoo 1", "aquarium", "--out", tmp_path / "named")[0] == 0
    assert codec.read_contents(file).recipe == before.recipe
    after = codec.read_contents(tmp_path / "named")
    assert after.recipe["tasks"]["names"] == ["zoo 0", "aquarium", "zoo 2", "zoo 3"]
    assert all(torch.equal(after.tensors[key], value) for key, value in before.tensors.items())
    assert after.recipe | {"tasks": None} == before.recipe | {"tasks": None}
    assert "did you mean 'aquarium' (task 1)?" in refused("bank", "rename", tmp_path / "named", "aquarum", "x")
    assert "cannot be told from task 2" in refused("bank", "rename", file, "1", "zoo 2")
    assert "cannot be told from task 2" in refused("bank", "rename", file, "1", "2")
    assert "is no name for a task" in refused("bank", "rename", file, "1", "a\nb")
    assert supsup("bank", "rename", file, "1", "aquarium")[0] == 0
    assert file.read_bytes() == (tmp_path / "named").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank.safetensors", "named"]


def test_a_number_that_is_also_a_name_is_asked_back(file):
    contents = codec.read_contents(file)
    names = {**contents.recipe["tasks"], "names": ["1", "3", "zoo 2", "zoo 3"]}
    codec.write_contents(file, contents._replace(recipe={**contents.recipe, "tasks": names}))
    assert "'1' may be any of the tasks 1 (3), 0 (1); say number=1 or name=1." in refused("bank", "remove", file, "1")
    assert "removed task 0 (1)" in supsup("bank", "remove", file, "name=1")[1]


def test_wrong_uses_are_answered_in_one_line(file, tmp_path):
    (tmp_path / "text").write_text("no bank")
    for command in ("info", "list", "verify"):
        assert "cannot be read" in refused("bank", command, tmp_path / "missing")
        assert "cannot be read" in refused("bank", command, tmp_path / "text")
    assert "two files or more" in refused("bank", "merge", file, "--out", tmp_path / "out")
    assert "is named twice" in refused("bank", "merge", file, file, "--out", tmp_path / "out")
    assert "There is no task '9'" in refused("bank", "remove", file, "9")
    assert "all tasks of" in refused("bank", "remove", file, "0", "1", "2", "3")
    load(file).method.save(tmp_path / "bare")
    assert "does not say what its tasks are called" in refused("bank", "info", tmp_path / "bare")


class Own(nn.Module):
    """A network of a user's own, whose class a file may not import."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 12)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


def test_a_network_from_elsewhere_needs_trust_where_it_is_made(tmp_path):
    from omegaconf import OmegaConf

    from supsup_lightning.recipe.recorded import record_config

    network = Own()
    record_config(network, OmegaConf.create({"_target_": f"{__name__}.Own"}))
    module_of(SupSup(network, store_weights=True), range(3)).save(tmp_path / "bank")
    found = json.loads(supsup("bank", "info", tmp_path / "bank", "--json")[1])
    assert found["num_tasks"] == 3
    assert found["sparsity"] is None
    assert "load(path, trust=True)" in found["note"]
    assert json.loads(supsup("bank", "info", tmp_path / "bank", "--json", "--trust")[1])["sparsity"] > 0
    message = refused("bank", "verify", tmp_path / "bank")
    assert re.search(r"checksums and the recipe of .* are right.*--trust\.", message)
    assert supsup("bank", "verify", tmp_path / "bank", "--trust")[0] == 0
    status, _, note = supsup("bank", "remove", tmp_path / "bank", "0", "2")
    assert status == 0
    assert "no logits are left" in note
    with pytest.raises(ConfigurationError):
        load(tmp_path / "bank")
    assert load(tmp_path / "bank", trust=True).method.tasks.tolist() == [1]


def test_the_command_in_a_process_of_its_own(file):
    """Which has imported nothing but the command."""
    program = "from supsup_lightning.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "bank", "verify", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "is sound" in done.stdout
