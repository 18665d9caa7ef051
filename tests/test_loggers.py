import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import psutil
import pytest
import wandb
from lightning.pytorch.loggers import Logger
from wandb.proto.wandb_internal_pb2 import Record

from supsup_lightning import ContinualModule, PermutedDigits
from tests.conftest import ROOT, digits_lenet, run_here
from tests.test_command_line import results

SHORT = ["data.num_tasks=1", "data.steps_per_task=60", "trainer.log_every_n_steps=10", "scenario=gg", "eval_at=[]"]
SHORT += ["~callbacks.progress", "~callbacks.figures"]
OFFLINE = [*SHORT, "logger=wandb", "logger.offline=true"]


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """W&B's service has 30 seconds to start, which a busy machine may not give it."""
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "300")


class Deaf(Logger):
    """Raises in every call."""

    name = version = "deaf"

    def log_metrics(self, metrics, step=None):
        raise OSError("no space left")

    def log_hyperparams(self, params, *args, **kwargs):
        raise ConnectionError("nobody listens")

    def save(self):
        raise OSError("no space left")

    def finalize(self, status):
        raise ValueError(status)


class Act(L.Callback):
    """Does something at a step of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.act(trainer)


class KillWandb(Act):
    """Kills W&B's process in the job of seed 0."""

    def __init__(self, step: int, seed: int = 0) -> None:
        super().__init__(step if seed == 0 else -1)

    def act(self, trainer):
        services = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
        assert services
        for service in services:
            service.send_signal(signal.SIGKILL)
            service.wait(10)


class FillDisk(Act):
    def act(self, trainer):
        path = Path(trainer.logger.log_dir) / "metrics.csv"
        path.unlink()
        path.symlink_to("/dev/full")


def records(path: Path) -> Iterator[Record]:
    """What a W&B run wrote: LevelDB's log format, blocks of 32 kB with pieces of records."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_runs(folder: Path) -> list[dict]:
    """Each W&B run kept under ``folder``, in the order of their starts: id, seed, final accuracy and exit code."""
    wandb.teardown()  # `finish` returns before its service has written the last records
    runs = []
    for path in sorted(folder.rglob("run-*.wandb")):
        run: dict = {"id": path.stem.removeprefix("run-"), "seed": None, "accuracy": None, "exit": None}
        for record in records(path):
            for entry in (*record.run.config.update, *record.config.update):
                if entry.key == "seed":
                    run["seed"] = json.loads(entry.value_json)
            for item in record.history.item:
                if "result/average_accuracy" in (item.key, *item.nested_key):
                    run["accuracy"] = json.loads(item.value_json)
            if record.HasField("exit"):
                run["exit"] = record.exit.exit_code
        runs.append(run)
    return runs


def act(what: str, *, step: int = 35) -> list[str]:
    return [f"+callbacks.act._target_=tests.test_loggers.{what}", f"+callbacks.act.step={step}"]


def test_each_job_of_a_sweep_is_a_run_of_its_own_also_where_one_fails(tmp_path, monkeypatch):
    diverges = ["optimizer=sgd", "optimizer.weight_decay=9", "optimizer.lr=1e38,0.001"]
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, "-m", *OFFLINE, *diverges, "seed=0,1")
    runs = {}
    for folder in (path for path in tmp_path.glob("outputs/sweeps/*/*") if path.name != "report" and path.is_dir()):
        (run,) = wandb_runs(folder)
        assert f"seed={run['seed']}" in folder.name
        runs[run["id"]] = run
        if "1e+38" in folder.name:
            assert (run["accuracy"], run["exit"]) == (None, 1)
        else:
            assert (run["accuracy"], run["exit"]) == (results(folder)["average_accuracy"], 0)
    assert len(runs) == 4


def test_a_resumed_run_goes_on_with_its_wandb_run(tmp_path, monkeypatch):
    options = [*OFFLINE, "hydra.run.dir=run"]
    for more in ([], ["resume=true"], [], ["+logger.id=abc", "+logger.resume=allow"], ["resume=true"]):
        run_here(monkeypatch, tmp_path, *options, *more)
        (tmp_path / "run" / "results.json").rename(tmp_path / "done.json")  # as if killed before the test ended
        time.sleep(1)  # W&B names folders by the second
    ids = [run["id"] for run in wandb_runs(tmp_path / "run")]
    assert ids[0] == ids[1] != ids[2]
    assert ids[3:] == ["abc", "abc"]


def test_any_number_of_loggers_listen(tmp_path, monkeypatch):
    options = [*SHORT, "hydra.run.dir=run"]
    run_here(
        monkeypatch, tmp_path, *options, "logger=[tensorboard,csv,wandb]", "logger.offline=true", "logger.csv.name=c"
    )
    assert "train/loss" in (tmp_path / "run" / "c" / "version_0" / "metrics.csv").read_text()
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))
    (run,) = wandb_runs(tmp_path / "run")
    assert run["accuracy"] == results(tmp_path / "run")["average_accuracy"]
    assert "WANDB_MODE" not in os.environ  # as it was


@pytest.mark.parametrize(
    "none", [["logger=none"], ["logger=null"], ["logger=null", "callbacks=null"], ["callbacks=none"]]
)
def test_nobody_listens(none, tmp_path, monkeypatch):
    options = [option for option in SHORT if "callbacks" not in option or "callbacks" not in str(none)]
    run_here(monkeypatch, tmp_path, *options, "hydra.run.dir=run", *none)
    assert results(tmp_path / "run")["average_accuracy"] > 0.5
    assert (tmp_path / "run" / "csv").exists() == (none == ["callbacks=none"])
    assert (tmp_path / "run" / "checkpoints").exists() == ("callbacks" not in str(none))


def test_without_callbacks_tasks_are_discovered_all_the_same(tmp_path, monkeypatch):
    options = ["scenario=nns", "data.num_tasks=2", "data.steps_per_task=120", "logger=none", "hydra.run.dir=run"]
    run_here(monkeypatch, tmp_path, *options, "callbacks=null")
    assert results(tmp_path / "run")["num_masks"] >= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["logger=wandbb"], "Did you mean logger/wandb"),
        (
            ["logger=[csv,tensorbord]"],
            "Choices: logger/csv, logger/none, logger/tensorboard, logger/wandb\nDid you mean",
        ),
        (["logger=csv", "logger.offline=true"], "Could not override 'logger.offline'"),
        (["logger=[csv,tensorboard]", "+logger.prefix=a"], "write +logger.csv.prefix or +logger.tensorboard.prefix"),
        (["logger=none", "+logger.id=abc"], "logger.id names no logger, and there are 0"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_names_no_logger_is_answered(overrides, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, *SHORT, *overrides)
    assert message in capsys.readouterr().err


def warnings_of(folder: Path) -> list[str]:
    """What was said of loggers, in the train.log of jobs."""
    lines = [line for path in sorted(folder.rglob("train.log")) for line in path.read_text().splitlines()]
    return [line.partition(" - ")[2] for line in lines if "[supsup_lightning.runs.loggers][WARNING]" in line]


def test_a_logger_that_raises_ends_nothing(tmp_path, monkeypatch):
    run_here(monkeypatch, tmp_path, *SHORT, "hydra.run.dir=run", "+logger.deaf._target_=tests.test_loggers.Deaf")
    assert results(tmp_path / "run")["average_accuracy"] > 0.5
    assert "train/loss" in next((tmp_path / "run").rglob("metrics.csv")).read_text()
    (said,) = warnings_of(tmp_path)
    assert said.startswith("Deaf failed in log_hyperparams (ConnectionError: nobody listens). The run goes on")


def test_a_logger_that_raises_ends_nothing_in_a_notebook(tmp_path, caplog):
    data = PermutedDigits(num_tasks=1, steps_per_task=20)
    module = ContinualModule(digits_lenet())
    options = {"max_epochs": data.num_epochs, "reload_dataloaders_every_n_epochs": 1, "log_every_n_steps": 5}
    callbacks = module.task_callbacks(data)
    trainer = L.Trainer(accelerator="cpu", callbacks=callbacks, logger=Deaf(), default_root_dir=tmp_path, **options)
    trainer.fit(module, data)
    trainer.test(module, data)
    assert module.test_accuracy.compute()[0].mean() > 0.3
    assert sum(record.name == "supsup_lightning.runs.loggers" for record in caplog.records) == 1


def test_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    run_here(monkeypatch, tmp_path, *SHORT, "hydra.run.dir=run", *act("FillDisk"))
    assert results(tmp_path / "run")["average_accuracy"] > 0.5
    (said,) = warnings_of(tmp_path)
    assert "CSVLogger failed in" in said
    assert "No space left on device" in said


def test_a_killed_wandb_service_ends_nothing_and_the_next_job_has_another(tmp_path, monkeypatch):
    run_here(monkeypatch, tmp_path, "-m", *OFFLINE, "seed=0,1", *act("KillWandb"), "+callbacks.act.seed=${seed}")
    folders = sorted(path.parent for path in tmp_path.glob("outputs/sweeps/*/*/results.json"))
    assert len(folders) == 2
    runs = [wandb_runs(folder)[0] for folder in folders]
    assert [run["exit"] for run in runs] == [None, 0]
    assert runs[1]["accuracy"] == results(folders[1])["average_accuracy"]
    (said,) = warnings_of(tmp_path)
    assert said.startswith("WandbLogger failed in log_metrics")


@pytest.mark.slow
def test_wandb_without_an_account_is_an_error_and_without_a_server_is_not(tmp_path):
    nowhere = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, str(ROOT / "train.py"), *SHORT, "logger=wandb", "hydra.run.dir=run"]
    for key, code in (("", 1), ("a" * 40, 0)):
        variables = {**environment, **nowhere, **({"WANDB_API_KEY": key} if key else {})}
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert (tmp_path / "run" / "results.json").exists() == (code == 0)
        assert ("add logger.offline=true" in said) == (code == 1)
    assert "W&B does not answer" in said
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*")  # beside what began online
    (run,) = wandb_runs(kept)
    assert run["accuracy"] == results(tmp_path / "run")["average_accuracy"]
