"""Figures of results; each function writes one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from supsup_lightning.files import replacing

# Up to this many tasks, a cell has room for its number.
_MOST_WRITTEN_CELLS = 15


def accuracy_matrix(matrix: Tensor, path: str | Path) -> Path:
    """Draw accuracy per task (column) after learning some tasks (row); rows that were not evaluated are left out.

    Args:
        matrix: ``(tasks, tasks)`` in [0, 1]; NaN if not evaluated.
        path: path of the picture, PNG.
    """
    rows = matrix.isfinite().any(1).nonzero().flatten()
    values = matrix[rows].numpy()
    num_rows, num_tasks = values.shape
    low = float(np.nanmin(values)) if np.isfinite(values).any() else 0.0
    figure = Figure(figsize=(min(12.0, 2.5 + 0.5 * max(num_tasks, 6)), min(9.0, 1.8 + 0.42 * max(num_rows, 3))))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = mpl.colormaps["viridis"].with_extremes(bad="white")
    image = axes.imshow(values, cmap=colours, vmin=min(low, 0.9), vmax=1.0, aspect="auto", interpolation="nearest")
    shade = min(low, 0.9) + 0.6 * (1.0 - min(low, 0.9))  # above it, colours are too light for white letters
    if num_tasks <= _MOST_WRITTEN_CELLS:
        for (row, task), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > shade else "white"
                axes.text(task, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(*_ticks(np.arange(num_tasks)))
    axes.set_yticks(*_ticks(rows.numpy() + 1))
    axes.set_xlabel("task")
    axes.set_ylabel("tasks learned")
    axes.set_title(f"Test accuracy; average at the end {np.nanmean(values[-1]):.3f}", fontsize=11)
    figure.colorbar(image, ax=axes, label="accuracy")
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def stream(
    stretches: Sequence[tuple[int, int, int]],
    decisions: Sequence[tuple[int, str, int, float, float]],
    *,
    num_steps: int,
    path: str | Path,
) -> Path:
    """Draw true task and trained task over time, and below them the decision statistic with its threshold.

    True tasks are numbered in the order in which they appear. The two lines thus coincide if the learner starts one
    task for each true task at once.

    Args:
        stretches: first step, true task and trained task of each run of batches, as in `RecordStream`.
        decisions: step, action, task, statistic and threshold, as in `TaskDiscovery`.
        num_steps: length of the stream.
        path: path of the picture, PNG.
    """
    first, true, trained = zip(*stretches, strict=True)
    appearance = {task: number for number, task in enumerate(dict.fromkeys(true))}
    edges = [*first, num_steps]
    figure = Figure(figsize=(10, 5.5))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    numbers = [appearance[task] for task in true]
    above.stairs(numbers, edges, baseline=None, color="0.75", linewidth=5, label="true task, as it first appears")
    above.stairs(trained, edges, baseline=None, color="tab:blue", linewidth=1.2, label="task of the learner")
    above.set_ylabel("task")
    above.yaxis.get_major_locator().set_params(integer=True)
    judged = np.array([(d[0], d[3], d[4]) for d in decisions if np.isfinite(d[3])]).reshape(-1, 3)
    steps, statistics, thresholds = judged.T
    below.plot(steps, thresholds, "--", color="black", linewidth=0.8, label="threshold")
    fits = statistics >= thresholds
    for chosen, colour, label in ((fits, "tab:blue", "a known task fits"), (~fits, "tab:red", "none fits")):
        below.scatter(steps[chosen], statistics[chosen], s=8, color=colour, label=label)
    kept = [d[0] for d in decisions if d[1] == "combined"]
    if kept:
        below.vlines(kept, *below.get_ylim(), color="tab:purple", linewidth=1, label="a combination is kept")
    below.set_ylabel("decision statistic")
    below.set_xlabel("batch of the stream")
    for axes in (above, below):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9)
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def recovery(traces: Mapping[int, Tensor], *, path: str | Path) -> Path:
    """Draw the recovery of masks from a Hopfield memory: distance to the masks, energy and objective per step.

    Args:
        traces: one trace ``(steps + 1, 2 + masks)`` per task, for some tasks, as in `RecordRecovery`.
        path: path of the picture, PNG.
    """
    figure = Figure(figsize=(11, 3.8))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    for position, (task, trace) in enumerate(traces.items()):
        energy, value, *distances = trace.numpy().T
        colour = mpl.colormaps["tab10"](position % 10)
        for mask, distance in enumerate(distances):
            if mask == task:
                panels[0].plot(distance, ".-", color=colour, zorder=3, label=f"task {task}")
            else:
                panels[0].plot(distance, color="0.85", linewidth=0.8)
        panels[1].plot(energy, ".-", color=colour)
        panels[2].plot(value, ".-", color=colour)
    panels[0].plot([], color="0.85", linewidth=0.8, label="to the other masks")
    for axes, label in zip(
        panels, ("weights that differ from the mask", "energy", "objective on the images"), strict=True
    ):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if len(traces) <= 10:
        panels[0].legend(fontsize=8, frameon=False)
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


class Point(NamedTuple):
    """Point of one method in `accuracy_against_bytes`.

    Attributes:
        name: label of the point.
        num_bytes: bytes kept to predict all tasks; None, if not known, draws a line at the accuracy.
        accuracy: average over tasks, in [0, 1].
        family: points of the same family have the same colour.
        published: whether the numbers are published ones, not measured here; drawn hollow.
    """

    name: str
    num_bytes: int | None
    accuracy: float
    family: str
    published: bool = False


def accuracy_against_bytes(points: Sequence[Point], *, title: str, path: str | Path) -> Path:
    """Draw average accuracy over the bytes kept for all tasks, on a logarithmic scale.

    Args:
        points: measured and published points.
        title: title of the figure.
        path: path of the picture, PNG.
    """
    figure = Figure(figsize=(9, 5.5))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    families = list(dict.fromkeys(point.family for point in points))
    for point in points:
        colour = mpl.colormaps["tab10"](families.index(point.family) % 10)
        if point.num_bytes is None:
            axes.axhline(point.accuracy, color=colour, linewidth=1, linestyle=":", label=point.name)
            continue
        face = "white" if point.published else colour
        axes.plot(point.num_bytes, point.accuracy, "o", color=colour, markerfacecolor=face, markersize=7)
        side, height_of_text = _beside(point, points)
        axes.annotate(
            point.name,
            (point.num_bytes, point.accuracy),
            xytext=(7 if side == "left" else -7, height_of_text),
            textcoords="offset points",
            ha=side,
            fontsize=8,
        )
    axes.margins(x=0.2)
    axes.set_xlabel("bytes kept to predict all tasks")
    axes.set_ylabel("average accuracy")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3, which="both")
    if any(point.num_bytes is None for point in points):
        axes.legend(loc="lower left", fontsize=8)
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def _beside(point: Point, points: Sequence[Point]) -> tuple[str, int]:
    """Return the alignment and the vertical offset of a label, so that it avoids labels of nearby points."""
    near = 0.05 * (max(other.accuracy for other in points) - min(other.accuracy for other in points))
    others = [o for o in points if o.num_bytes and o is not point and abs(o.accuracy - point.accuracy) < near]
    ratios = [(other, (other.num_bytes or 0) / (point.num_bytes or 1)) for other in others]
    last = point.num_bytes == max(other.num_bytes or 0 for other in points)
    side = "right" if last or any(1.1 < ratio < 2.5 for _, ratio in ratios) else "left"
    below = any(1 / 1.1 < ratio < 1.1 and other.accuracy > point.accuracy for other, ratio in ratios)
    return side, -11 if below else 4


def _ticks(labels: np.ndarray, most: int = 20) -> tuple[np.ndarray, np.ndarray]:
    step = -(-len(labels) // most)
    positions = np.arange(0, len(labels), step)
    return positions, labels[positions]
