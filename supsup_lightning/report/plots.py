"""Figures of a single run; each function returns one figure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from supsup_lightning.report.drawing import LOOKS, new

# Up to this many tasks, a cell has room for its number.
_MOST_WRITTEN_CELLS = 15
# Up to this many tasks, a table of all pairs of tasks is drawn.
_MOST_CELLS = 300
_MOST_INFERENCES = 3


def accuracy_matrix(matrix: Tensor, *, first_task: int = 0) -> Figure:
    """Draw accuracy per task (column) after learning some tasks (row); rows that were not evaluated are left out.

    Args:
        matrix: ``(tasks, tasks)`` in [0, 1]; NaN if not evaluated.
        first_task: number of the first task.
    """
    rows = matrix.isfinite().any(1).nonzero().flatten()
    values = matrix[rows].numpy()
    num_rows, num_tasks = values.shape
    low = float(np.nanmin(values)) if np.isfinite(values).any() else 0.0
    figure = new(min(6.2, 2.5 + 0.5 * max(num_tasks, 6)), min(7.0, 1.8 + 0.42 * max(num_rows, 3)))
    axes = figure.add_subplot()
    colours = mpl.colormaps["viridis"].with_extremes(bad="white")
    numbers = rows.numpy() + 1  # tasks learned, at which a row lies
    edges = np.concatenate([[numbers[0] - 0.5], (numbers[1:] + numbers[:-1]) / 2, [numbers[-1] + 0.5]])
    across = np.arange(num_tasks + 1) - 0.5
    image = axes.pcolormesh(
        *(across, edges, np.ma.masked_invalid(values)), cmap=colours, vmin=min(low, 0.9), vmax=1.0, rasterized=True
    )
    axes.invert_yaxis()
    axes.grid(visible=False)
    shade = min(low, 0.9) + 0.6 * (1.0 - min(low, 0.9))  # above it, colours are too light for white letters
    if num_tasks <= _MOST_WRITTEN_CELLS:
        for (row, task), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > shade else "white"
                middle = (edges[row] + edges[row + 1]) / 2
                axes.text(task, middle, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(*_ticks(first_task + np.arange(num_tasks), at=np.arange(num_tasks)))
    axes.set_yticks(*_ticks(numbers, at=(edges[1:] + edges[:-1]) / 2))
    axes.set_xlabel("task")
    axes.set_ylabel("tasks learned")
    axes.set_title(f"Test accuracy; average at the end {np.nanmean(values[-1]):.3f}", fontsize=11)
    figure.colorbar(image, ax=axes, label="accuracy")
    return figure


def stream(
    stretches: Sequence[tuple[int, int, int]],
    decisions: Sequence[tuple[int, str, int, float, float]],
    *,
    num_steps: int,
) -> Figure:
    """Draw true task and trained task over time, and below them the decision statistic with its threshold.

    True tasks are numbered in the order in which they appear. The two lines thus coincide if the learner starts one
    task for each true task at once.

    Args:
        stretches: first step, true task and trained task of each run of batches, as in `RecordStream`.
        decisions: step, action, task, statistic and threshold, as in `TaskDiscovery`.
        num_steps: length of the stream.
    """
    first, true, trained = zip(*stretches, strict=True)
    appearance = {task: number for number, task in enumerate(dict.fromkeys(true))}
    edges = [*first, num_steps]
    figure = new(10, 5.5)
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
    return figure


def recovery(traces: Mapping[int, Tensor]) -> Figure:
    """Draw the recovery of masks from a Hopfield memory: distance to the masks, energy and objective per step.

    Args:
        traces: one trace ``(steps + 1, 2 + masks)`` per task, for some tasks, as in `RecordRecovery`.
    """
    figure = new(11, 3.8)
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
    return figure


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


def accuracy_against_bytes(points: Sequence[Point], *, title: str) -> Figure:
    """Draw average accuracy over the bytes kept for all tasks, on a logarithmic scale.

    Args:
        points: measured and published points.
        title: title of the figure.
    """
    figure = new(9, 5.5)
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
    return figure


def _beside(point: Point, points: Sequence[Point]) -> tuple[str, int]:
    """Return the alignment and the vertical offset of a label, so that it avoids labels of nearby points."""
    near = 0.05 * (max(other.accuracy for other in points) - min(other.accuracy for other in points))
    others = [o for o in points if o.num_bytes and o is not point and abs(o.accuracy - point.accuracy) < near]
    ratios = [(other, (other.num_bytes or 0) / (point.num_bytes or 1)) for other in others]
    last = point.num_bytes == max(other.num_bytes or 0 for other in points)
    side = "right" if last or any(1.1 < ratio < 2.5 for _, ratio in ratios) else "left"
    below = any(1 / 1.1 < ratio < 1.1 and other.accuracy > point.accuracy for other, ratio in ratios)
    return side, -11 if below else 4


def task_confusion(counts: np.ndarray, *, num_tasks: int, first_task: int = 0) -> Figure:
    """Draw which task the images of each task (row) are taken for (column), as shares on a logarithmic scale.

    Args:
        counts: ``(pairs, 3)`` int, task, inferred task and number of images, as in task_confusion.csv; -1 stands for
            no known task.
        num_tasks: number of tasks that were tested.
        first_task: number of the first of them; inferred tasks before it and after the last get a column each.
    """
    tasks, inferred, images = counts.T
    tested = [*range(first_task, first_task + num_tasks)]
    asked = [*tested, *sorted({*inferred[inferred >= 0].tolist()} - {*tested})]
    column = {task: place for place, task in enumerate(asked)}
    tasks = tasks - first_task
    inferred = np.array([column.get(task, -1) for task in inferred.tolist()], dtype=int)
    totals = np.bincount(tasks, weights=images, minlength=num_tasks)
    shares = images / np.maximum(totals[tasks], 1)
    unknown = bool((inferred < 0).any())
    columns = np.where(inferred < 0, len(asked), inferred)
    side = min(9.0, 2.6 + 0.14 * max(num_tasks, 6))
    figure = new(side + 0.8, side)
    axes = figure.add_subplot()
    norm = LogNorm(1e-3, 1)
    if num_tasks <= _MOST_CELLS:
        table = np.zeros((num_tasks, len(asked) + unknown))
        table[tasks, columns] = shares
        colours = mpl.colormaps["viridis"].with_extremes(bad="white", under="0.9")
        drawn: Any = axes.imshow(np.ma.masked_equal(table, 0), norm=norm, cmap=colours, interpolation="nearest")
    else:  # cells would be smaller than a dot of the screen
        drawn = axes.scatter(columns, tasks, c=shares, s=4, norm=norm, cmap="viridis", rasterized=True)
        axes.invert_yaxis()
    names = np.array([*map(str, asked), *(["none"] if unknown else [])])
    axes.set_xticks(*_ticks(names))
    axes.set_yticks(*_ticks(names[:num_tasks]))
    axes.set_xlabel("inferred task")
    axes.set_ylabel("true task")
    axes.grid(visible=False)
    right = shares[tasks == inferred].sum() / max((totals > 0).sum(), 1)
    axes.set_title(f"Tasks found: {right:.4f}", fontsize=11)
    figure.colorbar(drawn, ax=axes, label="share of the task's images", extend="min")
    return figure


def evidence(
    found: Mapping[int, Mapping[int, float]], *, label: str, true_tasks: Mapping[int, int] | None = None
) -> Figure:
    """Draw what one inference goes by for each task, for images of up to three tasks.

    Args:
        found: by true task, and by task asked about; the largest wins.
        label: of the axis.
        true_tasks: true task of each task asked about, if these have other numbers.
    """
    chosen = list(found)
    if len(chosen) > _MOST_INFERENCES:
        chosen = [chosen[0], chosen[len(chosen) // 2], chosen[-1]]
    figure = new(5.5, 0.7 + 1.1 * len(chosen))
    panels = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
    for axes, true in zip(panels, chosen, strict=True):
        asked = np.array(list(found[true]))
        values = np.array(list(found[true].values()))
        own = np.array([(true_tasks or {}).get(task, task) == true for task in asked.tolist()])
        best = values.argmax()
        axes.bar(asked, values, color="0.75", width=0.8)
        axes.bar(asked[own], values[own], color=LOOKS[0].color, width=0.8, label="true task")
        axes.plot(asked[best], values[best], "v", color=LOOKS[1].color, label="largest: the inferred task")
        margin = max(0.15 * (values.max() - values.min()), 1e-12)
        axes.set_ylim(values.min() - margin, values.max() + 2 * margin)  # differences count, not the distance to 0
        axes.set_ylabel(label)
        axes.set_title(f"image of task {true}", fontsize=8, loc="left")
    panels[-1].set_xlabel("task")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    return figure


def _ticks(labels: np.ndarray, most: int = 20, *, at: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Places and labels of ticks, of which there are not too many."""
    positions = np.arange(len(labels)) if at is None else at
    if at is not None and len(labels) > 1:  # leave out rows too close to the one before
        least, kept = (at[-1] - at[0]) / most, [len(labels) - 1]
        for place in range(len(labels) - 2, -1, -1):
            if at[kept[-1]] - at[place] >= least:
                kept.append(place)
        return positions[kept[::-1]], labels[kept[::-1]]
    step = -(-len(labels) // most)
    return positions[::step], labels[::step]
