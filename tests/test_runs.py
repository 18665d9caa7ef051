"""Which run a directory is of, and how a job ends."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from omegaconf import OmegaConf

from supsup_lightning.cli import effects
from supsup_lightning.cli.output_name import run_name
from supsup_lightning.runs.job import alone_in
from tests.conftest import QUIET, ROOT, run_here, two_classes_of_images
from tests.test_command_line import results

SMALL = ["+network.width=0.1", "data.num_tasks=2", "data.steps_per_task=4", "eval_at=[]", "scenario=gg", *QUIET]


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Runs the command line here; returns its exit status and what it printed."""

    def run(*overrides: str) -> tuple[int, str]:
        logging.getLogger().handlers.clear()  # of the job before
        capsys.readouterr()
        try:
            run_here(monkeypatch, tmp_path, *overrides)
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return status, shown.out + shown.err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run of `SMALL`; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, folder, *SMALL, "hydra.run.dir=run")
    return folder / "run"


def test_a_finished_run_is_found_again_and_another_is_refused_by_name(finished, tmp_path, train):
    shutil.copytree(finished, tmp_path / "run")
    before = results(tmp_path / "run")
    same = [*SMALL, "hydra.run.dir=run", "resume=true"]
    for more in (
        ["logger=csv"],
        ["callbacks.loss_guard.every_n_steps=7"],
        ["trainer=ddp_cpu"],
        ["optimized_metric=average_accuracy"],
        ["data.root=elsewhere"],
    ):
        status, said = train(*same, *more)
        assert (status, "nothing left to do" in said) == (0, True), said
    for more, differs in {
        "data=split_digits network=fc1024": "data=permuted_digits there, split_digits here; network=lenet there",
        "data.steps_per_task=5": "data.steps_per_task=4 there, 5 here",
        "seed=1": "seed=0 there, 1 here",
        "optimizer.lr=0.5": "optimizer.lr=0.001 there, 0.5 here",
        "mask.rule=topk mask.sparsity=0.5": "mask.rule=threshold there, topk here",
        "trainer.precision=bf16-mixed": "trainer.precision=32-true there, bf16-mixed here",
    }.items():
        overrides = [option for option in same if option != "+network.width=0.1" or "network" not in more]
        status, said = train(*overrides, *more.split())
        assert status == 1
        assert differs in said
    assert results(tmp_path / "run") == before
    for name in ("config", "hydra", "overrides"):  # what refused calls leave as it was
        assert (tmp_path / "run" / ".hydra" / f"{name}.yaml").read_bytes() == (
            finished / ".hydra" / f"{name}.yaml"
        ).read_bytes()


def test_a_begun_run_of_another_configuration_is_refused_by_name(finished, tmp_path, train):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    status, said = train(*SMALL[1:], "+network.width=0.2", "hydra.run.dir=run", "resume=true")
    assert status == 1
    assert "begun and not finished: network.width=0.1 there, 0.2 here" in said
    assert said.split("error: ")[1].split("network.width")[0] in (tmp_path / "run" / "train.log").read_text()
    status, said = train(*SMALL, "hydra.run.dir=run", "resume=true", "logger=csv")
    assert status == 0
    assert results(tmp_path / "run")["accuracy_per_task"] == results(finished)["accuracy_per_task"]
    assert results(tmp_path / "run")["optimized_metric"] == results(finished)["optimized_metric"]


def test_older_results_are_compared_by_what_they_hold(finished, tmp_path, train):
    shutil.copytree(finished, tmp_path / "run")
    result = results(finished)
    del result["identity"]
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "results.json").write_text(json.dumps(result))
    status, said = train(*SMALL, "hydra.run.dir=run", "resume=true")
    assert (status, "kept no digest of its configuration" in said) == (0, True)
    status, said = train(*SMALL, "hydra.run.dir=run", "resume=true", "seed=3")
    assert (status, "seed=0 there, 3 here" in said) == (1, True)


def test_damaged_results_are_made_again_or_refused(finished, tmp_path, train):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for damaged in (b"", b'{"average_accuracy": 0.5, "num_tasks": 2, "identity": "another"}', b"\xff\xfe"):
        (run / "results.json").write_bytes(damaged)
        status, said = train(*SMALL, "hydra.run.dir=run", "resume=true")
        assert (status, "results.json is damaged" in said) == (0, True)
        assert results(run)["accuracy_per_task"] == results(finished)["accuracy_per_task"]
    (run / "results.json").write_text("{")
    (run / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "older.ckpt")
    for backup in run.glob("checkpoints/*.backup.ckpt"):
        backup.unlink()
    status, said = train(*SMALL, "hydra.run.dir=run", "resume=true")
    assert (status, "no checkpoint beside it" in said) == (1, True)
    (run / "results.json").unlink()
    status, said = train(*SMALL, "hydra.run.dir=run", "resume=true")
    assert (status, "has older.ckpt but no last.ckpt" in said) == (1, True)


def test_images_in_another_folder_are_another_run(tmp_path, train):
    """Case data_root_collision."""
    for name, classes in (("easy", ("a", "b")), ("noise", ("a", "b"))):
        two_classes_of_images(tmp_path / name, classes=classes, per_class=9 if name == "noise" else 10)
    options = ["data=image_folder", "data.input_shape=[3,8,8]", "data.steps_per_task=2", "data.batch_size=4"]
    options = [*options, "network.output_size=4", "scenario=gg", *QUIET]
    status, said = train("-m", *options, "data.root=easy,noise", "resume=true")
    assert (status, said.count("Nothing to resume")) == (0, 2)
    assert len(list((tmp_path / "outputs").rglob("*data.root=*/results.json"))) == 2

    for root, expected in (("easy", 0), ("noise", 1)):  # in one directory
        status, said = train(*options, f"data.root={root}", "hydra.run.dir=run", "resume=true")
        assert status == expected
    assert "the files of ImageFolder, in data.root=easy there, noise here" in said
    (tmp_path / "easy").rename(tmp_path / "moved")
    status, said = train(*options, "data.root=moved", "hydra.run.dir=run", "resume=true")
    assert (status, "nothing left to do" in said) == (0, True)
    (tmp_path / "moved" / "a" / "0.png").rename(tmp_path / "moved" / "b" / "0b.png")
    status, said = train(*options, "data.root=moved", "hydra.run.dir=run", "resume=true")
    assert (status, "differ in number, names, labels or sizes" in said) == (1, True)


def test_an_edited_file_of_a_users_own_is_noticed(tmp_path, train):
    """Case stale_results."""
    (tmp_path / "conf" / "network").mkdir(parents=True)
    mine = tmp_path / "conf" / "network" / "mine.yaml"
    text = "_target_: supsup_lightning.LeNet\noutput_size: 10\ninput_shape: ${data.input_shape}\n"
    mine.write_text(text + "width: 0.2\n")
    options = ["--config-dir", "conf", *SMALL[1:], "network=mine"]
    assert train(*options)[0] == 0
    assert train(*options, "resume=true", "+logger.id=abc")[0] == 0
    mine.write_text(text + "width: 0.1\n")
    status, said = train(*options, "resume=true")
    assert (status, "network.width=0.2 there, 0.1 here" in said) == (1, True)
    assert len(list((tmp_path / "outputs").iterdir())) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_epochs=3"], "use data.steps_per_task or data.epochs_per_task"),
        (["+trainer.max_epochs=3"], "use data.steps_per_task or data.epochs_per_task"),
        (["+trainer.min_steps=3"], "trainer.min_steps would have no effect"),
        (["+trainer.logger=false"], "logger=csv for example"),
        (["+trainer.enable_checkpointing=false"], "~callbacks.checkpoint switches it off"),
        (["trainer.reload_dataloaders_every_n_epochs=2"], "leave it at 1"),
        (["+data.num_workers=2"], "data.num_workers=2 has no effect here"),
        (["inference=one_shot", "inference.temperature=2"], "it needs inference.objective=entropy"),
        (["+trainer.gradient_clip_algorithm=value"], "it needs +trainer.gradient_clip_val"),
        (["~callbacks.evaluation", "eval_at=all"], "it needs callbacks.evaluation"),
        (["scenario=nns", "discovery.trial_steps=5"], "it needs discovery.on_unknown=combine or auto"),
        (["callbacks.results.run.seed=5"], "would make results.json say what the run is not"),
        (["optimized_metric=accuracy"], "choose one of validation_accuracy, average_accuracy"),
        (["scenario=gg", "optimized_metric=task_inference_accuracy"], "is no number of this run's results.json"),
        (["+foo=1"], "+foo=1 has no effect: nothing reads foo"),
        (["~mask"], "Interpolation key 'mask' not found"),
        (["scenario=nns", "optimized_metric=validation_accuracy"], "not known in scenario=nns"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_an_option_without_effect_is_refused(overrides, message, train):
    status, said = train(*overrides)
    assert (status, said.count("error: ")) == (1, 1)
    assert message in said


def test_options_that_belong_to_no_group_are_those_of_train_yaml():
    own = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "train.yaml"))
    assert set(effects.OWN) == set(own) - {"defaults", "hydra"}


def test_an_added_option_to_which_another_refers_is_taken(tmp_path, train):
    status, _ = train(*SMALL, "+my_seed=3", "seed=${my_seed}", "hydra.run.dir=run")
    assert (status, results(tmp_path / "run")["seed"]) == (0, 3)


def test_a_directory_that_takes_no_run_is_named(tmp_path, train):
    (tmp_path / "file").touch()
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    (tmp_path / "logged" / "train.log").mkdir(parents=True)
    for folder in ("file/run", "locked", "logged"):
        status, said = train(*SMALL, f"hydra.run.dir={folder}")
        assert (status, said.count("error: ")) == (1, 1)
        assert f"{folder.partition('/')[0]}/" in said
        assert "use another directory (hydra.run.dir" in said


def test_a_second_process_in_a_directory_is_refused(tmp_path, train):
    (tmp_path / "run").mkdir()
    code = f"""
from pathlib import Path; from supsup_lightning.runs.job import alone_in; import os, time
with alone_in(Path({str(tmp_path / "run")!r})):
    if os.fork() == 0: time.sleep(60)  # a worker that outlives the run does not hold the directory
    print("held", flush=True); time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert holder.stdout is not None
    try:
        holder.stdout.readline()
        status, said = train(*SMALL, "hydra.run.dir=run")
        assert status == 1
        assert f"run is in use by process {holder.pid} on " in said
        holder.kill()
        holder.wait()
        with alone_in(tmp_path / "run"):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_the_other_processes_of_a_run_share_its_directory(tmp_path, monkeypatch):
    with alone_in(tmp_path):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with alone_in(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_sigterm_ends_a_run_with_143_and_keeps_what_is_finished(tmp_path):
    options = ["data.num_tasks=500", "data.steps_per_task=20", "eval_at=[]", "hydra.run.dir=run", *QUIET]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *options], cwd=tmp_path, stdout=subprocess.PIPE)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not checkpoint.exists():
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "finished tasks are kept, and resume=true goes on" in output.decode().replace("\n", " ")
    assert not (tmp_path / "run" / "results.json").exists()
    assert torch.load(checkpoint, weights_only=True)["epoch"] >= 0
    assert "stopped by SIGTERM" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("moment", ["on_fit_start", "on_test_batch_start", "on_test_end"])
def test_sigterm_at_any_time_ends_the_sweep(moment, tmp_path, train):
    (tmp_path / "stopper.py").write_text(f"""
import os, signal
from lightning import Callback
def send(*_): os.kill(os.getpid(), signal.SIGTERM)
class Stopper(Callback):
    {moment} = send
""")
    sys.modules.pop("stopper", None)
    status, _ = train("-m", *SMALL, "seed=0,1", "+callbacks.stopper._target_=stopper.Stopper")
    assert status == 143
    assert len(list((tmp_path / "outputs").rglob("*/train.log"))) == 1


def test_the_log_of_a_failed_job_says_why(tmp_path, train):
    status, said = train("-m", *SMALL, "network.output_size=5,20")
    assert status == 1
    failed, done = sorted(
        (tmp_path / "outputs").glob("sweeps/*/*=*"), key=lambda folder: (folder / "results.json").exists()
    )
    assert (done / "results.json").exists()  # Hydra goes on with the next job
    assert "network.output_size=5 is smaller than the 10 classes" in (failed / "train.log").read_text()
    assert "network.output_size=5 is smaller than the 10 classes" in said


def test_results_hold_what_a_sweeper_gets(finished):
    result = results(finished)
    own = result["validation_accuracy_per_task"]
    assert result["optimized_metric"] == {"name": "validation_accuracy", "value": pytest.approx(sum(own) / 2, abs=1e-6)}
    assert len(own) == 2
    assert all(0 <= accuracy <= 1 for accuracy in own)


def test_names_count_bytes():
    name = run_name("network.name=" + "漢" * 80)
    assert len(name.encode()) <= 200
    assert name == run_name("network.name=" + "漢" * 80) != run_name("network.name=" + "漢" * 81)
    assert run_name("a=\udcff") != run_name("a=\udcfe")
