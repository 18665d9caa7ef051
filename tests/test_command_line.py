import json
import signal
import subprocess
import sys
import time
import venv

import pytest
import torch

from supsup_lightning.cli.command_line import run_name
from supsup_lightning.methods import SupSup
from tests.conftest import QUIET, ROOT, TINY, digits_lenet, run_cli, run_cli_here, run_here, two_classes_of_images

CONTRACT = {
    "scenario", "data", "network", "method", "seed", "num_tasks", "num_masks", "average_accuracy", "accuracy_per_task",
    "task_inference_accuracy", "forgetting", "backward_transfer", "sparsity", "mask_bytes_per_task", "model_bytes",
    "train_seconds", "seconds_per_task", "inference_ms_per_batch", "peak_memory_bytes", "versions",
}  # fmt: skip


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_writes_what_the_contract_names(tmp_path):
    done = run_cli("data.num_tasks=3", "data.steps_per_task=60", "logger=csv", "eval_at=[2]", cwd=tmp_path)
    (folder,) = (tmp_path / "outputs").iterdir()
    result = results(folder)
    own = {
        "images_per_decision",
        "last_accuracy",
        "average_incremental_accuracy",
        "task_incremental_accuracy",
        "task_incremental_accuracy_per_task",
        "test_images_per_task",
        "validation_accuracy",
        "validation_accuracy_per_task",
        "optimized_metric",
        "identity",
        "num_classes",
        "skipped_images",
        "kept_bytes",
        "kept_bytes_in_all",
        "cap",
        "tasks_at_once",
    }
    assert set(result) == CONTRACT | own
    assert (result["scenario"], result["data"], result["network"], result["method"]) == (
        "gnu",
        "permuted_digits",
        "lenet",
        "supsup",
    )
    assert result["num_tasks"] == result["num_masks"] == len(result["accuracy_per_task"]) == 3
    assert result["average_accuracy"] == pytest.approx(sum(result["accuracy_per_task"]) / 3, abs=1e-6)
    assert result["average_accuracy"] > 0.5
    assert result["mask_bytes_per_task"] == (64 * 300 + 300 * 100 + 100 * 100) // 8
    assert result["model_bytes"] == (folder / "mask_bank.safetensors").stat().st_size
    rows = (folder / "accuracy_matrix.csv").read_text().splitlines()
    filled = [[cell != "" for cell in row.split(",")[1:]] for row in rows[1:]]
    assert filled == [[False] * 3, [True, True, False], [True] * 3]
    confusion = [list(map(int, row.split(","))) for row in (folder / "task_confusion.csv").read_text().splitlines()[1:]]
    right = sum(images for task, inferred, images in confusion if task == inferred)
    images = sum(row[2] for row in confusion)
    assert images == 3 * 360
    assert result["task_inference_accuracy"] == pytest.approx(right / images, abs=1e-6)
    layers = (folder / "layers.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in layers[1:]] == [
        ["1.weight", "19200"],
        ["3.weight", "30000"],
        ["5.weight", "10000"],
    ]
    gains = (folder / "inference.csv").read_text().splitlines()
    assert len(gains) == 1 + 3 * 3
    assert json.loads((folder / "job.json").read_text())["status"] == "finished"
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert (folder / "figures" / "accuracy_matrix.png").read_bytes()[1:4] == b"PNG"
    assert (folder / ".hydra" / "config.yaml").exists()
    assert "train/loss" in (folder / "csv" / "version_0" / "metrics.csv").read_text()
    assert "task 3/3" in done.stdout
    assert "task found" in done.stdout

    method = digits_lenet()
    method.load(folder / "mask_bank.safetensors")
    assert method.tasks.tolist() == [0, 1, 2]


def test_a_sweep_gives_each_job_its_own_results(tmp_path):
    sweep = ["-m", "network.output_size=25,50", "mask.rule=topk", "mask.sparsity=0.5,0.9", *TINY]
    run_cli_here(*sweep, cwd=tmp_path)
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()  # of its own, named by the whole sweep
    assert "mask.sparsity=0.5,0.9" in folder.name
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}
    assert len(found) == 4
    assert (folder / "report" / "report.html").exists()
    for name, result in found.items():
        sparsity = 0.5 if "mask.sparsity=0.5" in name else 0.9
        assert result["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    assert {result["mask_bytes_per_task"] for result in found.values()} == {
        (49200 + 2500) // 8 + 1,
        (49200 + 5000) // 8,
    }
    # Every job is done, so the same sweep has nothing left to do.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/results.json")}
    again = run_cli_here(*sweep, "resume=true", cwd=tmp_path)
    assert "nothing left to do" in again.stdout
    assert "report in " in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/sweeps/*/*/results.json")}


def test_a_sweep_lists_the_jobs_that_failed_and_ends_with_an_error(tmp_path):
    sweep = ["-m", "mask.rule=topk", "mask.sparsity=0.5,2", "seed=0,1", *TINY]
    done = run_cli(*sweep, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "2 of 4 jobs have no result" in done.stderr
    assert done.stderr.count("mask.sparsity=2 is the share of weights switched off") == 2
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert len([*folder.glob("*/results.json")]) == 2
    page = (folder / "report" / "report.html").read_text()
    assert page.count("mask.sparsity=2 is the share") == 2
    states = sorted(json.loads(path.read_text())["status"] for path in folder.glob("*/job.json"))
    assert states == ["failed", "failed", "finished", "finished"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    options = ["data.num_tasks=6", "data.epochs_per_task=8", "eval_at=[1,3]", *QUIET, "hydra.run.dir=run"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run_cli_here(*options, cwd=whole)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *options], cwd=killed)
    checkpoint = killed / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (checkpoint.exists() and _epochs_done(checkpoint) >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "run" / "results.json").exists()
    run_cli_here(*options, "resume=true", cwd=killed)
    banks = []
    for folder in (whole, killed):
        method: SupSup = digits_lenet()
        method.load(folder / "run" / "mask_bank.safetensors")
        banks.append(method.bank)
    assert torch.equal(banks[0].packed, banks[1].packed)
    assert len(banks[0]) == 6
    matrices = [(folder / "run" / "accuracy_matrix.csv").read_text() for folder in (whole, killed)]
    assert matrices[0] == matrices[1]
    assert len(results(killed / "run")["seconds_per_task"]) == 6
    assert not list(killed.rglob("*.previous*"))  # only a fresh start sets former results aside


def _epochs_done(checkpoint) -> int:
    return torch.load(checkpoint, weights_only=True)["epoch"] + 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.num_task=3"], "Did you mean data.num_tasks"),
        (["netwrok=lenet"], "Did you mean network"),
        (["data=permuted_digit"], "Did you mean data/permuted_digits"),
        (["scenario=gg", "inference=one_shot"], "use inference=given"),
        (["inference=given"], "use inference=discriminant, one_shot"),
        (["inference.temperature=2"], "inference=binary, inference=exhaustive"),
        (["inference.objective=entropy"], "has no effect with inference.candidates=1"),
        (["seed=first"], "seed='first' must be an integer"),
        (["resume=no"], "resume='no' must be true or false"),
        (["mask.rule=topk", "mask.sparsity=1.0"], "mask.sparsity=1.0"),
        (["mask.rule=topk", "mask.sparsity=0.99999"], "leaves no weight"),
        (["network.output_size=5"], "network.output_size=5 is smaller than the 10 classes"),
        (["inference=one_shot", "network.output_size=10"], "raise network.output_size"),
        (["data=permuted_mnist", "data.root=/proc/nowhere"], "data.root=/proc/nowhere and could not be downloaded"),
        (["data=image_folder", "data.root=nowhere"], "The folder nowhere does not exist; set data.root"),
        (
            ["data=split_digits", "data.stream.classes_per_task=1"],
            "classes_per_task=1 must be an integer",
        ),
        (["data=split_digits", "data.num_tasks=6"], "data.num_tasks=6 is more than the 5 tasks of Split"),
        (["data=split_digits", "data.classes_per_task=2"], "Did you mean data.stream.classes_per_task"),
        (["data.input_shape=[1,9,9]"], "the images of task 0 have shape [1, 8, 8]"),
        (["network=torchvision", "network.name=resnet81"], "did you mean resnet18"),
        (["network=torchvision", "network.weights=DEFAULT"], "add method.weights=keep"),
        (["mask.exclude=[head.*]"], "the pattern 'head.*' matches no parameter of the network; it has 1.weight"),
        (["mask.min_dimensions=5"], "No parameter of LeNet is masked"),
        (["optimizer.lr=-1"], "Invalid learning rate"),
        (["lr=0.1"], "Did you mean optimizer.lr"),
        (["optimizer=sgd", "optimizer.momentm=0.5"], "Did you mean optimizer.momentum"),
        (["trainer.strategy=ddp_spawn", "trainer.devices=2"], "Use trainer.strategy=ddp"),
        (
            ["+callbacks.mine._target_=supsup_lightning.callbacks.EvaluateSeenTasks"],
            "callbacks.mine is a second EvaluateSeenTasks beside callbacks.evaluation",
        ),
        (
            ["optimizer=sgd", "optimizer.lr=1e38", "optimizer.weight_decay=9", "data.steps_per_task=60"],
            "The scores became NaN or infinite in task 0 at its step 49",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_clear_message(overrides, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, tmp_path, "data.num_tasks=2", *QUIET, *overrides)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("**/results.json"))


def test_a_rerun_sets_the_former_results_aside_only_once_it_trains(tmp_path):
    options = [*TINY, "hydra.run.dir=run"]
    run_cli_here(*options, cwd=tmp_path)
    before = results(tmp_path / "run")
    refused = run_cli_here(*options, "network.output_size=5", cwd=tmp_path, check=False)
    assert "smaller than the 10 classes" in refused.stderr
    assert results(tmp_path / "run") == before
    run_cli_here(*options, "seed=1", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "results.previous.json").read_text()) == before
    assert results(tmp_path / "run")["seed"] == 1


def test_a_resume_with_other_options_is_refused_and_loses_nothing(tmp_path):
    options = ["data.num_tasks=3", "data.steps_per_task=20", "hydra.run.dir=run", *QUIET]
    run_cli_here(*options, cwd=tmp_path)
    (tmp_path / "run" / "results.json").unlink()  # as if killed before the test ended
    bank = (tmp_path / "run" / "mask_bank.safetensors").read_bytes()
    for change, message in {
        "seed=1": "seed=0 there, 1 here",
        "data.num_tasks=2": "data.num_tasks=3 there, 2 here",
        "data.steps_per_task=10": "data.steps_per_task=20 there, 10 here",
        "mask.rule=topk mask.sparsity=0.5": "mask.rule=threshold there, topk here",
    }.items():
        done = run_cli_here(*options, *change.split(), "resume=true", cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert (tmp_path / "run" / "mask_bank.safetensors").read_bytes() == bank
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = checkpoint.read_bytes()
    backup = checkpoint.with_name("last.backup.ckpt")
    for path in (checkpoint, backup):
        path.write_bytes(whole[: len(whole) // 2])
    done = run_cli_here(*options, "resume=true", cwd=tmp_path, check=False)
    assert "last.ckpt is damaged" in done.stderr
    backup.write_bytes(whole)
    done = run_cli_here(*options, "resume=true", cwd=tmp_path)  # nothing but the test is left to do
    assert "going on from the one before it" in done.stdout
    assert results(tmp_path / "run")["num_masks"] == 3


def test_an_interrupt_keeps_finished_tasks_and_is_no_result(tmp_path):
    options = ["data.num_tasks=50", "data.steps_per_task=50", "hydra.run.dir=run", *QUIET]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not checkpoint.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "finished tasks are kept, and resume=true goes on" in output.decode().replace("\n", " ")
    assert not (tmp_path / "run" / "results.json").exists()
    method = digits_lenet()
    method.load(tmp_path / "run" / "mask_bank.safetensors")
    assert 1 <= len(method.bank) < 50


def test_mixed_precision_runs_and_keeps_old_tasks(tmp_path):
    run_cli_here(
        "trainer=amp", "trainer.accelerator=cpu", "scenario=gg", "hydra.run.dir=run", *TINY, "eval_at=all", cwd=tmp_path
    )
    assert results(tmp_path / "run")["forgetting"] == 0


def test_wandb_offline(tmp_path):
    run_cli_here("logger=wandb", "logger.offline=true", *[o for o in TINY if not o.startswith("logger")], cwd=tmp_path)
    (folder,) = (tmp_path / "outputs").iterdir()
    assert results(folder)["num_tasks"] == 2
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path):
    for trainer in ("cpu", "ddp_cpu"):
        run = run_cli_here if trainer == "cpu" else run_cli
        run(
            f"trainer={trainer}",
            f"hydra.run.dir={trainer}",
            "data.num_tasks=2",
            "data.steps_per_task=100",
            "data.batch_size=400",  # more than the test images: the second process has none to test
            *QUIET,
            cwd=tmp_path,
        )
    one, two = (results(tmp_path / trainer) for trainer in ("cpu", "ddp_cpu"))
    assert two["num_masks"] == 2
    assert two["average_accuracy"] == pytest.approx(one["average_accuracy"], abs=0.01)
    assert two["task_inference_accuracy"] == pytest.approx(one["task_inference_accuracy"], abs=0.01)
    banks = []
    for trainer in ("cpu", "ddp_cpu"):
        method = digits_lenet()
        method.load(tmp_path / trainer / "mask_bank.safetensors")
        banks.append(torch.stack([method.bank.get(task) for task in range(2)]))
    # Sums in another order: rounding turns some scores near 0. Other data or another order would turn a tenth of them.
    assert (banks[0] != banks[1]).float().mean() < 0.01


def test_print_masked_shows_a_table_and_trains_nothing(tmp_path, monkeypatch, capsys):
    options = ["network=gem_resnet18", "mask.rule=topk", "mask.allocation=erdos_renyi", "mask.budget=16"]
    monkeypatch.setenv("COLUMNS", "120")
    run_here(monkeypatch, tmp_path, "print_masked=true", "data=split_cifar100", "mask.exclude=[13.*]", *options)
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    table = {line[0]: line[1:] for line in lines}
    assert table["0.weight"] == ["20 x 3 x 3 x 3", "mask", "0.5000", "67.5"]
    assert table["1.running_var"] == ["20", "statistics", "", "80.0"]
    assert table["13.weight"] == ["5 x 160", "nothing (frozen)", "", ""]
    assert table["all"][0] == "1,090,140 masked"
    assert not list(tmp_path.rglob("results.json"))


def test_a_mixture_runs_with_each_tasks_own_classes(tmp_path, monkeypatch):
    tree = two_classes_of_images(tmp_path / "images", classes=("a", "b", "c"), per_class=12)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mixture.yaml").write_text(f"""
defaults:
  - options/files@_here_
  - _self_
input_shape: [3, 8, 8]
resize: true
stream:
  _target_: supsup_lightning.data.Mixed
  streams:
    - _target_: supsup_lightning.data.Whole
      source:
        _target_: supsup_lightning.data.Digits
    - _target_: supsup_lightning.data.Whole
      source:
        _target_: supsup_lightning.data.ImageFolder
        folder: {tree}
""")
    options = ["data.steps_per_task=100", "scenario=gg", "data.batch_size=32"]
    run_here(monkeypatch, tmp_path, "--config-dir", str(tmp_path / "conf"), "data=mixture", *options, *QUIET)
    result = results(next((tmp_path / "outputs").iterdir()))
    assert result["num_classes"] == [10, 3]
    assert result["accuracy_per_task"][0] > 0.85
    assert result["accuracy_per_task"][1] > 0.85


def test_a_sweep_with_processes_of_its_own_is_refused(tmp_path):
    done = run_cli_here("-m", "trainer=ddp_cpu", "seed=0,1", *TINY, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "which a sweep (-m) cannot take" in done.stderr


def test_run_names_are_stable_short_and_safe():
    long = ",".join(f"data.option_{i}={i}" for i in range(40))
    assert len(run_name(long)) <= 200
    assert run_name(long) == run_name(long) != run_name(long + "0")
    assert "/" not in run_name("data.root=/a/b")
    assert run_name("a=[1,2]") != run_name("a={1,2}")


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_folder(tmp_path, monkeypatch):
    """Built for real and installed into an environment of its own, which borrows this one's dependencies."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would put a checkout before the installed package
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/python*/site-packages"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--ignore-installed",
            "--prefix",
            environment,
            wheel,
        ],
        check=True,
    )
    dependencies = next(path for path in map(str, sys.path) if path.endswith("site-packages"))
    # A .pth file after our own packages in the search order; no editable finder of the checkout among them.
    (site / "zz_dependencies.pth").write_text(dependencies + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "callbacks").mkdir()  # a user's own folders must not get in the way
    (empty / "callbacks" / "__init__.py").write_text("raise ImportError('the wrong callbacks')")
    command = [environment / "bin" / "python", environment / "bin" / "supsup-train", *TINY]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = (empty / "outputs").iterdir()
    assert results(folder)["num_masks"] == 2
    where = "import supsup_lightning, supsup_lightning.callbacks as c; print(supsup_lightning.__file__, c.__file__)"
    shown = subprocess.run(
        [environment / "bin" / "python", "-c", where], cwd=empty, capture_output=True, text=True, check=True
    )
    assert shown.stdout.count(str(site)) == 2
