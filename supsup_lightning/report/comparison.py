"""Comparison of several runs: the options in which they differ, and mean and standard deviation over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import pandas as pd

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.report.collection import Run

# Numbers of results.json that are compared, with their name in tables and at axes.
METRICS = {
    "average_accuracy": "accuracy",
    "task_inference_accuracy": "tasks found",
    "validation_accuracy": "validation accuracy",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "adjusted_rand_index": "adjusted Rand index",
    "assignment_accuracy": "assignment accuracy",
    "num_masks": "masks",
    "sparsity": "measured sparsity",
    "mask_bytes_per_task": "bytes per task",
    "model_bytes": "bytes in the file",
    "kept_bytes_in_all": "bytes in memory",
    "train_seconds": "training, s",
    "inference_ms_per_batch": "inference, ms per batch",
    "peak_memory_bytes": "peak memory, bytes",
}
# In the table on the terminal; the others are in the files.
MAIN = ("average_accuracy", "task_inference_accuracy", "model_bytes")
REPLICATE = "seed"


@dataclass(frozen=True)
class Comparison:
    """Finished runs side by side.

    Attributes:
        runs: finished runs, without repetitions.
        frame: one row per run: the varied options, the seed, the metrics, and ``run``, its place in ``runs``.
        varied: names of the options in which runs differ, without the seed.
    """

    runs: Sequence[Run]
    frame: pd.DataFrame
    varied: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """Metrics that at least one run has."""
        return [name for name in METRICS if name in self.frame and self.frame[name].notna().any()]

    @cached_property
    def groups(self) -> pd.DataFrame:
        """One row per combination of varied options: mean and standard deviation of each metric over its runs.

        Columns are pairs: ``(option, "")``, ``("runs", "")``, ``("seeds", "")``, ``("members", "")`` (places of the
        runs), ``(metric, "mean")``, ``(metric, "std")`` and ``(metric, "count")``, the number of runs that have it. The
        standard deviation (with ``n - 1``) of one run is NaN.
        """
        return self.over_seeds([*self.metrics])

    def over_seeds(self, metrics: Sequence[str]) -> pd.DataFrame:
        """Mean and standard deviation of some metrics by combination of varied options, in the options' order."""
        by: list[Any] = [*self.varied] or [lambda _: 0]
        grouped = self.frame.groupby(by, sort=False, dropna=False)
        table = grouped[[*metrics]].agg(["mean", "std", "count"])
        counts = grouped.agg(runs=("run", "size"), seeds=(REPLICATE, "nunique"), members=("run", list))
        counts.columns = pd.MultiIndex.from_product([counts.columns, [""]])
        table = pd.concat([counts, table], axis=1)
        if not self.varied:
            return table.reset_index(drop=True)
        return table.reset_index().sort_values([(name, "") for name in self.varied], key=_sortable, ignore_index=True)

    def is_numeric(self, option: str) -> bool:
        """Whether all values of an option are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.frame[option])

    def checked(self, name: str, *, option: str) -> str:
        """Return the name of a column. Raises `ConfigurationError` if the runs do not have it.

        Args:
            name: the name of a varied option or of a metric.
            option: the command's option that gives it, for the message.
        """
        known = [*self.varied, REPLICATE, *self.metrics]
        if name in known:
            return name
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigurationError(
            f"{option} {name}: these runs do not differ in it.{hint} There are {', '.join(known)}."
        )


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare finished runs.

    An option is varied if it was typed for at least one run, and its value differs between runs. Options that follow
    from others (the network's output size of another network, say) differ without being typed and are not listed,
    unless runs would otherwise pass for repetitions of one another, as runs of versions with different defaults.
    """
    names = sorted({name for run in runs for name in run.typed if name != REPLICATE and not _is_private(name)})
    names = [*names, *(name for name in ("method", "data", "network", "scenario") if name not in names)]
    varied = [name for name in names if len({str(run.options.get(name)) for run in runs}) > 1]
    varied = _without_followers(runs, varied + _hidden_differences(runs, varied))
    rows = [
        {
            **{name: _plain(run.options.get(name)) for name in varied},
            REPLICATE: run.seed,
            **{metric: _number(run.result.get(metric)) for metric in METRICS},
            "run": place,
        }
        for place, run in enumerate(runs)
    ]
    return Comparison(runs, pd.DataFrame(rows), tuple(varied))


def label(values: Mapping[str, Any] | pd.Series, names: Sequence[str]) -> str:
    """Name of a group in a picture: short names of options that are numbers, and the bare values of others.

    >>> label({"inference.objective": "entropy", "network.output_size": 25}, ["inference.objective"])
    'entropy'
    >>> label({"network.output_size": 25}, ["network.output_size"])
    'output_size 25'
    """
    parts = []
    for name in names:
        value = values[name]
        bare = isinstance(value, str) and value not in ("none", "auto", "all", "true", "false")
        parts.append(value if bare else f"{short(name)} {shown(value)}")
    return ", ".join(parts) or "all runs"


def short(name: str) -> str:
    """Last part of an option's name, or a metric's name in words."""
    return METRICS.get(name, name.rpartition(".")[2])


def shown(value: Any) -> str:
    """A value as it is typed."""
    if value is None or value != value:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _without_followers(runs: Sequence[Run], varied: Sequence[str]) -> list[str]:
    """Leave out choices of groups that the other options tell already: method=hopfield brings its network along."""

    def partition(names: Sequence[str]) -> set[tuple[int, ...]]:
        groups: dict[str, list[int]] = {}
        for place, run in enumerate(runs):
            groups.setdefault(str([run.options.get(name) for name in names]), []).append(place)
        return {tuple(group) for group in groups.values()}

    kept = [*varied]
    typed = {name for run in runs for name in run.typed}
    for name in varied:
        others = [other for other in kept if other != name]
        if "." not in name and name not in typed and others and partition(others) == partition(varied):
            kept = others
    return kept


def _hidden_differences(runs: Sequence[Run], varied: Sequence[str]) -> list[str]:
    """Options that were not typed and differ between runs that agree in all varied options."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        same.setdefault(str([run.options.get(name) for name in varied]), []).append(run)
    found: dict[str, None] = {}
    for group in same.values():
        for name in sorted({name for run in group for name in run.options}):
            values = [run.options.get(name) for run in group]
            follows_seed = values == [run.seed for run in group]  # the seed itself, and options that refer to it
            if len({*map(str, values)}) > 1 and not follows_seed and not _is_private(name):
                found[name] = None
    return [name for name in found if name not in varied]


def _is_private(name: str) -> bool:
    return name in ("resume", "optimized_metric", "eval_at", "print_masked") or name.endswith("._target_")


def _plain(value: Any) -> Any:
    """A value that can be compared and grouped: lists as text."""
    return value if isinstance(value, int | float | str | bool) else "null" if value is None else str(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _sortable(column: pd.Series) -> pd.Series:
    """Numbers by size; other values by the order in which they came."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    order = {value: place for place, value in enumerate(dict.fromkeys(column))}
    return column.map(order)
