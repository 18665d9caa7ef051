import subprocess
import sys

import pytest

import supsup_lightning
from tests.conftest import ROOT, run_cli

SLOW = {"torch", "lightning", "torchvision", "torchmetrics", "numpy", "scipy", "sklearn", "matplotlib", "wandb"}


def imported(stderr: str) -> set[str]:
    """Packages in what `python -X importtime` prints."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["--help"], "permuted_digits"),
        (["data.num_taks=3"], "Did you mean data.num_tasks"),
        (["netwrok=lenet"], "Did you mean network"),
        (["data=permuted_digit"], "Did you mean data/permuted_digits"),
        (["-sc", "query=bash"], "data=permuted_digits"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_trains_nothing_is_answered_without_importing_lightning(overrides, answer, tmp_path):
    completion = {"COMP_LINE": "python train.py data=permuted_d", "COMP_POINT": "99"}
    done = run_cli(*overrides, cwd=tmp_path, check=False, PYTHONPROFILEIMPORTTIME="1", **completion)
    assert answer in done.stdout + done.stderr
    assert "To append" not in done.stderr  # Hydra's advice, which a mistyped name has no use for
    assert "hydra" in imported(done.stderr)
    assert not imported(done.stderr) & SLOW


def python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)


def test_the_package_is_imported_when_it_is_used():
    assert not imported(python("import supsup_lightning; supsup_lightning.__version__").stderr) & SLOW
    done = python("import supsup_lightning as s; print(s.bits.dot); from supsup_lightning import *; print(SupSup)")
    assert "<function dot" in done.stdout
    assert "supsup.SupSup" in done.stdout
    assert {"torch", "lightning"} <= imported(done.stderr)


def test_every_public_name_is_there():
    assert set(supsup_lightning.__all__) <= set(dir(supsup_lightning))
    for name in supsup_lightning.__all__:
        assert getattr(supsup_lightning, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'LeNett'"):
        supsup_lightning.LeNett  # noqa: B018
