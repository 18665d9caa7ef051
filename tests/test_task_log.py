import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from supsup_lightning import PermutedDigits
from supsup_lightning.callbacks import LogTasks
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.runs import tracking
from supsup_lightning.runs.wandb_logger import WandbLogger
from tests.conftest import ROOT, digits_lenet, fit, run_cli_here, run_here
from tests.test_command_line import results
from tests.test_loggers import Act, patient, records  # noqa: F401

SHORT = ["data.num_tasks=3", "data.steps_per_task=20", "eval_at=all", "~callbacks.progress", "logger.offline=true"]
ONCE = ("task/validation_accuracy", "task/seconds", "task/bytes", "task/accuracy", "task/found", "learned/accuracy")


class Interrupt(Act):
    """Breaks a run off at a step, the first time."""

    armed = True

    def act(self, trainer):
        if Interrupt.armed:
            Interrupt.armed = False
            raise KeyboardInterrupt


def wandb_content(folder: Path) -> dict:
    """What all W&B files under ``folder`` hold, which have to be of one run."""
    wandb.teardown()  # `finish` returns before its service has written the last records
    found: dict = {"id": set(), "config": {}, "history": [], "axes": {}, "summary": {}, "artifacts": {}, "steps": []}
    for path in sorted(folder.rglob("run-*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                found["id"].add(record.run.run_id)
                found["run"] = record.run
            for item in (*record.run.config.update, *record.config.update):
                found["config"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            for item in record.summary.update:
                found["summary"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            if record.HasField("history"):
                found["steps"].append(record.history.step.num)
                row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                found["history"].append({name: json.loads(value) for name, value in row.items()})
            if record.HasField("metric"):
                found["axes"][record.metric.name] = record.metric.step_metric
            if record.HasField("artifact"):
                found["artifacts"][record.artifact.type] = record.artifact
    assert len(found["id"]) == 1
    return found


def by_number(rows: list[dict], name: str) -> dict[int, float]:
    """Values of one name over its axis, none of which may be there twice."""
    axis = tracking.LEARNED if name.startswith("learned/") else tracking.TASK
    values = [(int(float(row[axis])), float(row[name])) for row in rows if row.get(name) not in (None, "")]
    assert len(dict(values)) == len(values)
    return dict(values)


def check_numbers(rows: list[dict], result: dict, *, folder: Path) -> None:
    """Check every number by task, and after so many tasks, with those of results.json and accuracy_matrix.csv."""
    expected = {
        "task/validation_accuracy": result["validation_accuracy_per_task"],
        "task/seconds": result["seconds_per_task"],
        "task/accuracy": result["accuracy_per_task"],
    }
    for name, values in expected.items():
        logged = by_number(rows, name)
        assert [logged[task] for task in range(result["num_tasks"])] == pytest.approx(values, abs=1e-4), name
    kept = by_number(rows, "task/bytes")
    assert kept[result["num_tasks"] - 1] == result["kept_bytes_in_all"]
    assert sorted(kept.values()) == list(kept.values())
    found = by_number(rows, "task/found")
    assert sum(found.values()) / len(found) == pytest.approx(result["task_inference_accuracy"], abs=1e-5)
    with (folder / "accuracy_matrix.csv").open() as file:
        cells = [[float(cell) for cell in row[1:] if cell] for row in list(csv.reader(file))[1:]]
    means = {learned: sum(row) / len(row) for learned, row in enumerate(cells, start=1) if row}
    assert by_number(rows, "learned/accuracy") == pytest.approx(means, abs=1e-5)


def test_wandb_csv_and_tensorboard_get_the_same_numbers_by_task(tmp_path, monkeypatch):
    options = ["logger=[csv,tensorboard,wandb]", "logger.log_model=true", "logger.tags=[a,b]", "logger.name=12"]
    run_here(monkeypatch, tmp_path, *SHORT, *options, "logger.group=g", "logger.job_type=j", "hydra.run.dir=run")
    folder, result = tmp_path / "run", results(tmp_path / "run")

    found = wandb_content(folder)
    run, rows, names = found["run"], found["history"], {name for row in found["history"] for name in row}
    assert (run.display_name, run.run_group, run.job_type, list(run.tags)) == ("12", "g", "j", ["a", "b"])
    check_numbers(rows, result, folder=folder)
    assert {found["axes"][name] for name in ONCE[:-1]} == {tracking.TASK}
    assert found["axes"]["learned/accuracy"] == tracking.LEARNED
    assert found["summary"]["model/masked_weights"] == 8 * found["summary"]["model/bytes_per_task"] == 8 * 7400
    assert "task/accuracy" not in found["summary"]  # the last task's would pass for the run's
    assert "result/seed" not in names
    assert {"result/average_accuracy", "table/accuracy_matrix.nrows", "accuracy_matrix.count"} <= names
    saved = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert found["config"].keys() - {"_wandb", "choices"} == saved.keys()
    assert (found["config"]["seed"], found["config"]["choices"]["method"]) == (0, "supsup")
    assert found["config"]["network"] == OmegaConf.to_container(saved.network)
    bank = found["artifacts"]["model"]
    assert (bank.name, list(bank.aliases)) == ("12", ["latest"])
    assert [entry.path for entry in bank.manifest.contents] == ["mask_bank.safetensors"]
    assert json.loads(bank.metadata)["average_accuracy"] == result["average_accuracy"]

    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        check_numbers(list(csv.DictReader(file)), result, folder=folder)

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = {name: {event.step: event.value for event in events.Scalars(name)} for name in ONCE}
    for name in ONCE:
        assert logged[name] == pytest.approx(by_number(rows, name), rel=1e-6)
    assert events.Tags()["images"] == ["accuracy_matrix", "task_confusion"]


def test_a_resumed_run_logs_each_number_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Interrupt, "armed", True)
    options = [*SHORT, "logger=[csv,wandb]", "hydra.run.dir=run"]
    options += ["+callbacks.act._target_=tests.test_task_log.Interrupt", "+callbacks.act.step=50"]
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, *options)
    before = wandb_content(tmp_path / "run")
    assert [*by_number(before["history"], "task/bytes")] == [0, 1]
    time.sleep(1)  # W&B names folders by the second
    run_here(monkeypatch, tmp_path, *options, "resume=true")
    found = wandb_content(tmp_path / "run")
    check_numbers(found["history"], results(tmp_path / "run"), folder=tmp_path / "run")
    assert found["steps"] == sorted(set(found["steps"]))  # or W&B would drop those of the second file
    rows = []
    for path in sorted((tmp_path / "run" / "csv").rglob("metrics.csv")):
        with path.open() as file:
            rows += list(csv.DictReader(file))
    check_numbers(rows, results(tmp_path / "run"), folder=tmp_path / "run")


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_resumed_has_a_wandb_run_per_job_with_all_its_numbers(tmp_path):
    options = ["-m", *SHORT, "logger=wandb", "hydra.sweep.dir=jobs", "seed=0,1", "~callbacks.figures"]
    command = [sys.executable, str(ROOT / "train.py"), *options]
    environment = {**os.environ, "WANDB_X_SERVICE_WAIT": "300"}
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and started.poll() is None:
        notes = [path.read_text() for path in tmp_path.glob("jobs/*seed=1*/.logged.json")]
        if any(note != "{}" for note in notes):  # the first task of the second job is logged
            break
        time.sleep(0.005)
    assert started.poll() is None
    started.send_signal(signal.SIGKILL)  # its W&B service loses what it has not written, 15 seconds at most
    started.wait()
    time.sleep(1)  # W&B names folders by the second
    run_cli_here(*options, "resume=true", cwd=tmp_path, WANDB_X_SERVICE_WAIT="300")
    folders = sorted(path.parent for path in tmp_path.glob("jobs/*/results.json"))
    assert len(folders) == 2
    runs = [wandb_content(folder) for folder in folders]
    for folder, found in zip(folders, runs, strict=True):
        assert found["run"].run_group == "jobs"
        assert found["config"]["seed"] == results(folder)["seed"]
        check_numbers(found["history"], results(folder), folder=folder)
        accuracies = [row["result/average_accuracy"] for row in found["history"] if "result/average_accuracy" in row]
        assert accuracies == [results(folder)["average_accuracy"]]
    assert len({run["run"].run_id for run in runs}) == 2


class Listener(WandbLogger):
    """Keeps the table that it is given, and starts no run."""

    def log_table(self, key, columns, data):
        self.table = key, columns, data


def test_a_long_table_is_cut_with_a_warning(caplog):
    listener = Listener()
    rows = [(1, task, 0.5) for task in range(tracking.MOST_TABLE_ROWS)]
    tracking.log_table(listener, "accuracy_matrix", columns=("a", "b", "c"), rows=rows)
    assert not caplog.records
    tracking.log_table(listener, "accuracy_matrix", columns=("a", "b", "c"), rows=[*rows, (2, 7, 1.0)])
    key, columns, data = listener.table
    assert (key, columns, len(data), data[-1]) == ("table/accuracy_matrix", ["a", "b", "c"], 10_000, [2, 7, 1.0])
    assert "of the 10001 rows of accuracy_matrix" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"log_model": "yes"}, "logger.log_model=yes must be"), ({"log_model": "all", "offline": True}, "log_model=true")],
)
def test_what_log_model_cannot_do_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        WandbLogger(**options)


def test_in_a_notebook_without_other_callbacks(tmp_path):
    data = PermutedDigits(num_tasks=2, steps_per_task=5)
    listeners = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    module, trainer = fit(digits_lenet(), data, folder=tmp_path, callbacks=[LogTasks()], loggers=listeners)
    trainer.test(module, data, verbose=False)
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert by_number(rows, "task/bytes") == {0: 7416, 1: 2 * 7416 - 8}
    accuracy = module.test_accuracy.compute()[0]
    assert by_number(rows, "task/accuracy") == pytest.approx(dict(enumerate(accuracy.tolist())))
    assert by_number(rows, "learned/accuracy")[2] == pytest.approx(torch.mean(accuracy).item())
    assert "task/seconds" not in rows[0]
