"""Figures of one run, drawn from the files in its output directory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from supsup_lightning.report import plots
from supsup_lightning.report.collection import Run

# Caption and axis label by the last column of inference.csv.
_EVIDENCE = {
    "gain": (
        "One gradient of the superposition of all masks, at equal coefficients, for test images of some tasks: how "
        "much confidence a larger coefficient of each task would give.",
        "-dO/da",
    ),
    "log_posterior": (
        "Log posterior of each task under the discriminant, for test images of some tasks.",
        "log posterior",
    ),
}


def figures(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, caption and figure for each file that the run has written."""
    folder, num_tasks, first_task = run.folder, run.result["num_tasks"], run.result.get("first_task", 0)
    if (matrix := accuracy_matrix(folder)) is not None:
        caption = "Accuracy of each task (column) after so many tasks have been learned (row)."
        yield "accuracy_matrix", caption, plots.accuracy_matrix(torch.from_numpy(matrix), first_task=first_task)
    if (table := read(folder / "task_confusion.csv")) is not None:
        figure = plots.task_confusion(table.to_numpy(), num_tasks=num_tasks, first_task=first_task)
        yield "task_confusion", _confusion_caption(table), figure
    if (table := read(folder / "inference.csv")) is not None:
        evidence = table.columns[-1]
        values = {
            int(true): dict(zip(rows["asked_about"].tolist(), rows[evidence].tolist(), strict=True))
            for true, rows in table.groupby("task")
        }
        learned_as = run.result.get("learned_as") or {}
        true_tasks = {own: int(true) for true, owned in learned_as.items() for own in owned}
        caption, label = _EVIDENCE[evidence]
        yield "inference", caption, plots.evidence(values, label=label, true_tasks=true_tasks or None)
    stretches, decisions = read(folder / "stream.csv"), read(folder / "decisions.csv")
    if stretches is not None and decisions is not None:
        rows = [(int(a), int(b), int(c)) for a, b, c in stretches.dropna().itertuples(index=False)]
        made = [*decisions.itertuples(index=False, name=None)]
        caption = "True task and task of the learner over time, and the statistic by which it decided."
        yield "stream", caption, plots.stream(rows, made, num_steps=int(stretches["first_step"].iloc[-1]))
    if (table := read(folder / "recovery.csv")) is not None:
        traces = {
            int(task): torch.from_numpy(rows.drop(columns=["task", "step"]).dropna(axis=1).to_numpy(float))
            for task, rows in table.groupby("task")
        }
        yield "recovery", "Recovery of masks from the Hopfield memory, step by step.", plots.recovery(traces)


def accuracy_matrix(folder: Path) -> np.ndarray | None:
    """Return the accuracy matrix ``(tasks, tasks)``, NaN where not evaluated; None without a file."""
    table = read(folder / "accuracy_matrix.csv")
    return None if table is None else table.drop(columns="tasks_learned").to_numpy(float)


def accuracy_after_tasks(folder: Path) -> pd.Series | None:
    """Return the mean accuracy on the tasks learned so far, by their number; None if there is only the last row."""
    matrix = accuracy_matrix(folder)
    if matrix is None:
        return None
    evaluated = np.isfinite(matrix).any(1)
    means = {row + 1: np.nanmean(matrix[row]) for row in np.flatnonzero(evaluated)}
    return pd.Series(means) if len(means) > 1 else None


def read(path: Path) -> pd.DataFrame | None:
    """Read a CSV file of a run; None if it does not exist or has no rows."""
    if not path.exists():
        return None
    table = pd.read_csv(path)
    return table if len(table) else None


def _confusion_caption(table: pd.DataFrame) -> str:
    caption = "Task that the images of each task (row) are taken for (column)."
    totals = table.groupby("task")["images"].transform("sum")
    table = table.assign(share=table["images"] / totals)
    worst = table[table["task"] != table["inferred_task"]].sort_values("share", ascending=False).head(3)
    if not len(worst):
        return f"{caption} Every image finds its task."
    named = "; ".join(
        f"{row.share:.1%} of task {row.task} for {'none' if row.inferred_task < 0 else f'task {row.inferred_task}'}"
        for row in worst.itertuples()
    )
    return f"{caption} Most frequent confusions: {named}."
