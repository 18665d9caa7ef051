"""What several test files share: a small stream, a method with finished tasks, and the command line."""

import os

# Tests run side by side, one per core: the threads of one would only wait for those of another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor, nn

from supsup_lightning import ContinualModule, LeNet, OneShot, PermutedDigits, SupSup

# Examples are cheap, but a busy machine is not even: no test may fail for being slow.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

ROOT = Path(__file__).parent.parent
DIGITS = (1, 8, 8)

# Few words per run: tests read results, not progress.
QUIET = ["logger=none", "~callbacks.progress", "~callbacks.figures"]
TINY = ["data.num_tasks=2", "data.steps_per_task=20", *QUIET]


@pytest.fixture
def digits():
    """Three permutations of the digits, 40 steps each."""
    data = PermutedDigits(num_tasks=3, steps_per_task=40)
    data.setup()
    return data


def random_method(num_tasks: int, *, output_size: int = 20, **options) -> SupSup:
    """A method over a small network with ``num_tasks`` random masks."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 33, bias=False), nn.ReLU(), nn.Linear(33, output_size, bias=False)
    )
    method = SupSup(network, **options)
    for task in range(num_tasks):
        method.begin_task(task)
        method.finish_task(task)
    return method


def random_images(count: int, *, seed: int = 0) -> Tensor:
    """``(count, 1, 8, 8)``."""
    return torch.randn(count, *DIGITS, generator=torch.Generator().manual_seed(seed))


def two_classes_of_images(folder: Path, *, per_class: int = 10, classes: Sequence[str] = ("dark", "light")) -> Path:
    """A tree of 12 x 10 colour images, one folder per class, each of its own brightness, and labels.csv beside it."""
    draw = np.random.default_rng(0)
    lines = ["path,label"]
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = draw.integers(0, 60, (10, 12, 3)) + place * 190 // max(1, len(classes) - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
            lines.append(f"{name}/{number}.png,{name}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def fit(
    method, data, *, folder, callbacks=(), discovery=None, checkpoint=None, loggers=False, **options
) -> tuple[ContinualModule, L.Trainer]:
    """Train as a notebook user does, with more callbacks perhaps, or from a checkpoint on.

    By one gradient, which needs no pass over the images of a finished task, unless another inference is given.
    """
    module = ContinualModule(method, **{"inference": OneShot(), **options})
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[*module.task_callbacks(data, discovery=discovery), *callbacks],
        max_epochs=data.num_epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=loggers,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module, trainer


class StopAfter(L.Callback):
    """Keeps a checkpoint after an epoch, and ends training there; comes after what begins and finishes tasks."""

    def __init__(self, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def first_losses(method, *, lr: float) -> list[float]:
    """Losses of four steps of SGD on the first task of the permuted digits."""
    data = PermutedDigits(num_tasks=1, steps_per_task=4)
    data.setup()
    method.begin_task(0)
    optimizer = torch.optim.SGD(method.trainable(), lr=lr, momentum=0.9)
    losses = []
    for images, labels in data.train_loader(0):
        loss = torch.nn.functional.cross_entropy(method(images, 0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def digits_lenet(**options) -> SupSup:
    """LeNet for the digits."""
    return SupSup(LeNet(output_size=100, input_shape=DIGITS), **options)


def run_cli(*overrides: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run train.py in a process of its own, as a user does."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **env})
    assert not check or done.returncode == 0, done.stderr
    return done


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> None:
    """The command line in this process, which spares the imports; `run_cli` is the real thing."""
    import train

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    train.main()


def run_cli_here(*overrides: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """`run_cli` without a process of its own, whose imports take longer than most of these runs."""
    output, errors, status = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(logging.getLogger(), "handlers", [])  # of the job before
        try:
            run_here(patch, cwd, *overrides)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc()
            status = 1
    for name, module in [*sys.modules.items()]:  # the next run may have other modules of these names
        if str(getattr(module, "__file__", None)).startswith(f"{cwd}{os.sep}"):
            del sys.modules[name]
    assert not check or status == 0, errors.getvalue()
    return subprocess.CompletedProcess(["train.py", *overrides], status, output.getvalue(), errors.getvalue())


@pytest.fixture
def mnist_root():
    """The folder with MNIST's files, where the machine has them."""
    root = os.environ.get("SUPSUP_DATA", "")
    if not (Path(root) / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip("MNIST is not here: set SUPSUP_DATA to a folder that holds MNIST/raw")
    return root
