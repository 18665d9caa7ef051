"""Figures that compare groups of runs; each function returns one figure."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from supsup_lightning.report.arrangement import Arrangement, Series
from supsup_lightning.report.comparison import METRICS
from supsup_lightning.report.drawing import COLUMN, LOOKS, WIDE, label_ends, new

_LOGARITHMIC_FROM = 8  # ratio of the largest to the smallest value on an axis


def against_option(arrangement: Arrangement, *, x: str, y: str) -> Figure:
    """Mean of a metric against a numeric option, with standard deviations as bars.

    Args:
        arrangement: panels of lines; rows have a column for ``x`` and pairs of mean and standard deviation.
        x: option on the x axis.
        y: metric on the y axis.
    """

    def draw(axes: Axes, series: Series, look: int) -> tuple[float, float]:
        rows = series.rows.sort_values((x, ""))
        positions = rows[(x, "")].to_numpy(dtype=float)
        means, deviations = _mean_and_std(rows, y)
        return _line(axes, positions, means, deviations, look)

    figure, panels = _panels(arrangement, draw, _name(y), x)
    values = np.unique(np.concatenate([s.rows[(x, "")].to_numpy(float) for p in arrangement.panels for s in p.series]))
    for axes in panels:
        _scale(axes, values)
    return figure


def after_tasks(arrangement: Arrangement, curves: Mapping[int, pd.Series]) -> Figure:
    """Accuracy over all tasks learned so far against their number; bands are standard deviations over seeds.

    Args:
        arrangement: panels of lines of one row each, whose column ``members`` lists runs.
        curves: of each run, accuracy in [0, 1] by number of tasks learned.
    """

    def draw(axes: Axes, series: Series, look: int) -> tuple[float, float]:
        members = [curves[run] for run in series.rows.iloc[0][("members", "")] if run in curves]
        if not members:
            return float("nan"), float("nan")
        table = pd.concat(members, axis=1).dropna()  # where all of the seeds were evaluated
        deviations = table.std(axis=1).to_numpy() if len(members) > 1 else np.full(len(table), np.nan)
        return _line(axes, table.index.to_numpy(float), table.mean(axis=1).to_numpy(), deviations, look, band=True)

    figure, panels = _panels(arrangement, draw, "accuracy on the tasks so far", "tasks learned")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def against_bytes(groups: pd.DataFrame, labels: Sequence[str], *, x: str, y: str, front: Sequence[int]) -> Figure:
    """Mean of a metric against bytes, one point per group, and the Pareto front.

    Args:
        groups: rows of `Comparison.groups`.
        labels: name of each group.
        x: metric on the x axis, in bytes.
        y: metric on the y axis.
        front: places of the groups that no other one beats in both metrics, by ascending bytes.
    """
    figure = new(COLUMN * 1.3, 2.6 + 0.14 * len(groups))
    axes = figure.add_subplot()
    means, deviations = _mean_and_std(groups, y)
    sizes, spread = _mean_and_std(groups, x)
    for place, name in enumerate(labels):
        look = LOOKS[place % len(LOOKS)]
        axes.errorbar(
            *(sizes[place], means[place], np.nan_to_num(deviations[place]), np.nan_to_num(spread[place])),
            fmt=look.marker, color=look.color, capsize=2,
            markerfacecolor=look.color if place in front else "white", label=f"{place + 1}  {name}",
        )  # fmt: skip
        axes.annotate(f"{place + 1}", (sizes[place], means[place]), xytext=(4, 3), textcoords="offset points")
    if len(front) > 1:
        axes.step(sizes[[*front]], means[[*front]], where="post", color="0.5", linewidth=0.8, zorder=0)
    if sizes.min() > 0 and sizes.max() / sizes.min() >= _LOGARITHMIC_FROM:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(METRICS[x])
    axes.set_ylabel(_name(y))
    figure.legend(loc="outside lower center", ncols=2 if len(groups) > 8 else 1, handletextpad=0.3)
    return figure


def by_group(groups: pd.DataFrame, labels: Sequence[str], metrics: Sequence[str]) -> Figure:
    """Mean and standard deviation of some metrics by group, one panel per metric.

    Args:
        groups: rows of `Comparison.groups`.
        labels: name of each group.
        metrics: names of the metrics.
    """
    figure = new(WIDE, 0.9 + 0.18 * len(groups))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    places = np.arange(len(groups))[::-1]
    for axes, metric in zip(panels, metrics, strict=True):
        means, deviations = _mean_and_std(groups, metric)
        unit = 2**20 if metric == "peak_memory_bytes" else 1
        axes.errorbar(
            means / unit, places, xerr=np.nan_to_num(deviations) / unit, fmt="o", color=LOOKS[0].color, capsize=2
        )
        axes.set_xlabel("peak memory, MiB" if unit > 1 else _name(metric))
        if means.min() > 0 and means.max() / means.min() >= _LOGARITHMIC_FROM:
            axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_yticks(places, labels)
    panels[0].set_ylim(-0.6, len(groups) - 0.4)
    return figure


def layers(arrangement: Arrangement, tables: Mapping[int, pd.DataFrame], *, column: str) -> Figure:
    """Density of masks, or overlap between them, by layer; mean over seeds.

    Args:
        arrangement: panels of lines of one row each, whose column ``members`` lists runs.
        tables: layers.csv of each run.
        column: ``density`` or ``overlap``. With overlap, an open marker shows that of independent masks.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table["layer"]))

    def draw(axes: Axes, series: Series, look: int) -> tuple[float, float]:
        members = [tables[run].set_index("layer") for run in series.rows.iloc[0][("members", "")] if run in tables]
        if not members:
            return float("nan"), float("nan")
        table = pd.concat([member[column] for member in members], axis=1).reindex(names)
        mean = table.mean(axis=1).to_numpy()
        deviations = table.std(axis=1).to_numpy() if len(members) > 1 else np.full(len(table), np.nan)
        if column == "overlap":
            chance = pd.concat([member["density"] for member in members], axis=1).reindex(names).mean(axis=1)
            axes.plot(range(len(names)), chance, LOOKS[look].marker, color=LOOKS[look].color, markerfacecolor="white")
        return _line(axes, np.arange(len(names), dtype=float), mean, deviations, look)

    words = {"density": "share of weights on", "overlap": "share of a mask also in another"}
    figure, panels = _panels(arrangement, draw, words[column], "layer")
    every = -(-len(names) // 12)
    for axes in panels:
        axes.set_xticks(range(0, len(names), every), names[::every], rotation=30 if len(names) > 3 else 0)
    return figure


def _panels(
    arrangement: Arrangement, draw: Callable[[Axes, Series, int], tuple[float, float]], y: str, x: str
) -> tuple[Figure, list[Axes]]:
    """Draw each series of each panel, and label the lines at their ends."""
    number = len(arrangement.panels)
    rows = -(-number // 2)
    figure = new(COLUMN if number == 1 else WIDE, 2.4 * rows)
    grid = figure.subplots(rows, 1 if number == 1 else 2, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[number:]:
        axes.set_visible(False)
    ends = []
    for axes, panel in zip(grid, arrangement.panels, strict=False):
        ends.append([(*draw(axes, series, look), series.label, look) for look, series in enumerate(panel.series)])
        axes.set_title(panel.label)
    for place, axes in enumerate(grid[:number]):
        if place % 2 == 0:
            axes.set_ylabel(y)
        if place >= number - 2:
            axes.set_xlabel(x)
            axes.tick_params(labelbottom=True)
    figure.draw_without_rendering()  # limits and sizes, by which labels are placed
    for axes, panel, own in zip(grid, arrangement.panels, ends, strict=False):
        if len(panel.series) > 1:
            label_ends(figure, axes, [(end, name, LOOKS[look].color) for _, end, name, look in own if end == end])
    return figure, [*grid[:number]]


def _line(
    axes: Axes, x: np.ndarray, means: np.ndarray, deviations: np.ndarray, look: int, *, band: bool = False
) -> tuple[float, float]:
    """Draw a line with its deviations, and return the place of its end."""
    chosen = LOOKS[look]
    drawn = dict(color=chosen.color, marker=chosen.marker, linestyle=chosen.linestyle)
    if band:
        axes.plot(x, means, **drawn)
        if np.isfinite(deviations).any():
            axes.fill_between(x, means - deviations, means + deviations, color=chosen.color, alpha=0.2, linewidth=0)
    else:
        axes.errorbar(x, means, yerr=np.nan_to_num(deviations), capsize=2, elinewidth=0.8, **drawn)
    known = np.flatnonzero(np.isfinite(means))
    return (x[known[-1]], means[known[-1]]) if len(known) else (float("nan"), float("nan"))


def _scale(axes: Axes, values: np.ndarray) -> None:
    """Put a tick at each value; a logarithmic axis for values of different magnitudes."""
    if values.min() > 0 and values.max() / values.min() >= _LOGARITHMIC_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    if len(values) <= 12:
        places = np.log(values) if axes.get_xscale() == "log" else values
        crowded = len(values) > 1 and np.diff(places).min() < 0.07 * (places[-1] - places[0])
        axes.set_xticks(values, [f"{value:g}" for value in values], rotation=60 if crowded else 0)


def _mean_and_std(rows: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    return rows[(metric, "mean")].to_numpy(float), rows[(metric, "std")].to_numpy(float)


def _name(metric: str) -> str:
    return METRICS[metric]
