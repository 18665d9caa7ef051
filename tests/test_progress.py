"""Progress: numbers on a terminal, one bar per task in a notebook, lines alone in a pipe."""

import io

import lightning as L
from rich.console import Console

from supsup_lightning import ContinualModule, PermutedDigits
from supsup_lightning.callbacks import TaskProgress
from supsup_lightning.callbacks.bars import NoBar, NotebookBars, TerminalBar, bar_for
from tests.conftest import digits_lenet


def test_a_terminal_shows_steps_accuracy_tasks_found_masks_and_time_left():
    text = _shown(Console(file=io.StringIO(), force_terminal=True, width=100))
    for part in ("training task 3/3", "steps", "accuracy 0.", "found ", "2 masks", "0:00:0"):
        assert part in text, part


def test_a_pipe_gets_one_line_per_task():
    lines = _shown(Console(file=io.StringIO(), force_terminal=False, width=200)).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["task 1/3", "task 2/3", "task 3/3"]


def test_a_notebook_has_one_bar_per_task(capsys):
    console = Console(file=io.StringIO(), force_jupyter=True)
    bar = bar_for(console, total=2)
    assert isinstance(bar, NotebookBars)
    for task in (1, 2):
        for share in (0.5, 1.0):
            bar.update(0, description=f"training task {task}/2", status=f"{share}", share=share)
        bar.print(f"accuracy 0.{task}")
    bar.close()
    finished = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "accuracy" in line]
    assert {line.split(" ")[2] for line in finished} == {"1/2", "2/2"}
    assert type(bar_for(Console(file=io.StringIO()), total=1)) is NoBar
    moving = bar_for(Console(file=io.StringIO(), force_terminal=True), total=1)
    assert isinstance(moving, TerminalBar)
    moving.close()


def _shown(console: Console) -> str:
    progress = TaskProgress(refresh_seconds=0)  # a fast machine may train a task within a refresh
    progress.console = console
    data = PermutedDigits(num_tasks=3, steps_per_task=40)
    module = ContinualModule(digits_lenet())
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[*module.task_callbacks(data), progress],
        max_epochs=data.num_epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    return console.file.getvalue()
