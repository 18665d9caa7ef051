import os
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb.wandb_agent import Agent

from tests.conftest import ROOT
from tests.test_loggers import patient  # noqa: F401
from tests.test_task_log import wandb_content

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_files_compose(path):
    sweep = yaml.safe_load(path.read_text())
    values = {name: {"value": value_of(entry)} for name, entry in sweep["parameters"].items()}
    typed = create_sweep_command_args({"args": values})["args_no_hyphens"]
    typed += [part for part in sweep["command"] if not part.startswith("${")]
    with initialize_config_module("supsup_lightning.conf", version_base="1.3"):
        config = compose("train", overrides=typed)
    for name, value in values.items():
        chosen = OmegaConf.select(config, name)
        assert chosen == value["value"] or name == "optimizer"
    assert sweep["program"] == "train.py"
    assert "wandb" in config.logger


def value_of(parameter: dict):
    return parameter["values"][0] if "values" in parameter else parameter["min"]


@pytest.mark.slow
def test_the_agent_of_wandb_starts_a_run_of_a_sweep(tmp_path, monkeypatch):
    sweep = yaml.safe_load((ROOT / "sweeps" / "optimizer.yaml").read_text())
    values = {name: {"value": value_of(entry)} for name, entry in sweep["parameters"].items()}
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them for good
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    agent = Agent(api=None, queue=None, sweep_id="s1")  # without a server, which would send the command below
    agent._sweep_command = [*sweep["command"], "data.num_tasks=2", "data.steps_per_task=5", "~callbacks.figures"]
    command = {"type": "run", "run_id": "r1", "program": str(ROOT / sweep["program"]), "args": values}
    assert "exception" not in agent._process_command(command)
    assert agent._run_processes["r1"].wait(timeout=200) == 0
    found = wandb_content(tmp_path / "outputs")
    assert (found["id"], found["run"].sweep_id, found["run"].run_group) == ({"r1"}, "s1", "")
    # The sweep has taken the entry `optimizer`; the options of the group are there all the same.
    assert found["config"]["optimizer"] == "adam"
    assert (found["config"]["optimizer.lr"], found["config"]["optimizer.betas"]) == (0.0001, [0.9, 0.99])
    (metric,) = {row[sweep["metric"]["name"]] for row in found["history"] if sweep["metric"]["name"] in row}
    assert 0 <= metric <= 1
