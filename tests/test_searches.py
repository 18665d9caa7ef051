"""Searches with Optuna, several jobs at once with joblib, and the configurations for trying things."""

import pytest
import yaml

from supsup_lightning.report.summary import read_json
from tests.conftest import QUIET, run_cli, run_cli_here
from tests.test_config import composed

TINY = ["data.num_tasks=2", "data.steps_per_task=10", *QUIET]


@pytest.mark.slow
def test_a_search_with_two_objectives_goes_on_with_the_same_trials(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `optuna` is not installed")
    command = ["hparams_search=optuna_accuracy_bytes", "hydra.sweeper.n_trials=3", *TINY]
    done = run_cli_here(*command, cwd=tmp_path)
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    jobs = {path.parent.name: read_json(path) for path in folder.glob("*/results.json")}
    assert len(jobs) == 3
    for result in jobs.values():
        names = ["validation_accuracy", "model_bytes"]
        assert result["optimized_metric"] == {"name": names, "value": [result[name] for name in names]}
    front = yaml.safe_load((folder / "optimization_results.yaml").read_text())["solutions"]
    values = [result["optimized_metric"]["value"] for result in jobs.values()]
    assert all(solution["values"] in values for solution in front)
    assert "report in" in done.stdout
    (folder / next(iter(jobs)) / "results.json").unlink()  # as if it was stopped in its test
    again = run_cli_here(*command, "resume=true", cwd=tmp_path)
    assert again.stdout.count("nothing left to do") == 2
    assert {path.parent.name for path in folder.glob("*/results.json")} == jobs.keys()


@pytest.mark.slow
def test_jobs_at_once_give_the_bits_of_jobs_one_after_another(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra `joblib` is not installed")
    (tmp_path / "my_digits.py").write_text("from supsup_lightning import LeNet\nclass Own(LeNet): pass\n")
    command = ["-m", "seed=0,1", "network._target_=my_digits.Own", *TINY]
    run_cli_here(*command, cwd=tmp_path)
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    banks = {path.parent.name: path.read_bytes() for path in folder.glob("*/mask_bank.safetensors")}
    done = run_cli(*command, "launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=together", cwd=tmp_path)
    assert banks == {
        path.parent.name: path.read_bytes() for path in (tmp_path / "together").glob("*/mask_bank.safetensors")
    }
    assert len(banks) == 2
    assert "report in" in done.stdout


def test_a_search_needs_a_direction_for_each_metric(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `optuna` is not installed")
    command = ["hparams_search=optuna", "optimized_metric=[validation_accuracy,sparsity]", *TINY]
    done = run_cli_here(*command, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "names 2 and hydra.sweeper.direction=maximize has 1" in done.stderr


def test_fast_dev_run_takes_one_batch_of_each_kind_and_says_so(tmp_path):
    done = run_cli_here("debug=fast_dev_run", *QUIET, "hydra.run.dir=run", cwd=tmp_path)
    result = read_json(tmp_path / "run" / "results.json")
    assert (result["num_tasks"], result["limit_train_batches"]) == (2, 1)
    assert "numbers of a part of the data" in " ".join(done.stdout.split())
    told = run_cli_here("+trainer.fast_dev_run=true", cwd=tmp_path, check=False)
    assert "debug=fast_dev_run" in told.stderr


def test_the_debug_configuration_evaluates_after_every_task(tmp_path):
    config = composed("debug=default", folder=tmp_path)
    assert (config.data.num_tasks, config.eval_at) == (3, "all")
