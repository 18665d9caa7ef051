"""Comparison of several runs: the options in which they differ, and mean and standard deviation over seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import pandas as pd

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.report.collection import Run, parsed

# Numbers of results.json that are compared, with their name in tables and at axes.
METRICS = {
    "average_accuracy": "accuracy",
    "task_inference_accuracy": "tasks found",
    "last_accuracy": "last accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
    "task_incremental_accuracy": "accuracy with the task given",
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
ABSENT = "absent"  # shown for an option that a run's configuration lacks, which is other than null
RECORDED = "run.json"  # stands for all options, where some runs have them recorded and others do not


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
        # By text: pandas takes True for 1.
        texts = [str([shown(value) for value in row]) for row in self.frame[[*self.varied]].to_numpy(dtype=object)]
        grouped = self.frame.groupby(texts, sort=False)
        table = grouped[self.metrics].agg(["mean", "std", "count"])
        counts = grouped.agg(runs=("run", "size"), seeds=(REPLICATE, "nunique"), members=("run", list))
        options = self.frame.loc[[members[0] for members in counts["members"]], [*self.varied]].set_index(counts.index)
        first = pd.concat([options, counts], axis=1)
        first.columns = pd.MultiIndex.from_product([first.columns, [""]])
        table = pd.concat([first, table], axis=1)
        order = [(name, "") for name in self.varied]
        return (table.sort_values(order, key=_sortable) if order else table).reset_index(drop=True)

    def is_numeric(self, option: str) -> bool:
        """Whether all values of an option are finite numbers."""
        return all(_is_number(value) and math.isfinite(value) for value in self.frame[option])

    def check_varied(self, name: str, *, option: str) -> None:
        """Raise `ConfigurationError` if the runs do not differ in an option.

        Args:
            name: the name of a varied option.
            option: the command's option that gives it, for the message.
        """
        if name in self.varied:
            return
        near = get_close_matches(name, self.varied, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigurationError(
            f"{option} {name}: these runs do not differ in it.{hint} They differ in "
            f"{', '.join(self.varied) or 'their seeds alone'}."
        )


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare finished runs.

    An option is varied if it was typed for at least one run, and its value differs between runs. Options that follow
    from others (the network's output size of another network, say) differ without being typed and are not listed,
    unless runs would otherwise pass for repetitions of one another, as runs of versions with different defaults.
    """
    names = sorted({name for run in runs for name in run.typed if name != REPLICATE and not _is_private(name)})
    usual = ("method", "data", "network", "scenario", "data.task_shard")
    names = [*names, *(name for name in usual if name not in names)]
    varied = [name for name in names if len({_text(run, name) for run in runs}) > 1]
    varied = _without_followers(runs, varied + _hidden_differences(runs, varied))
    rows = [
        {
            REPLICATE: run.seed,
            **{metric: _number(run.result.get(metric)) for metric in METRICS},
            "run": place,
        }
        for place, run in enumerate(runs)
    ]
    # As objects: among numbers, pandas would make NaN of null and 1.0 of 1.
    options = pd.DataFrame({name: pd.Series([_value(run, name) for run in runs], dtype=object) for name in varied})
    return Comparison(runs, pd.concat([options, pd.DataFrame(rows)], axis=1), tuple(varied))


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
        bare = isinstance(value, str) and value not in ("none", "auto", "all", "true", "false", ABSENT)
        parts.append(shown(value) if bare else f"{short(name)} {shown(value)}")
    return ", ".join(parts) or "all runs"


def short(name: str) -> str:
    """Last part of an option's name, or a metric's name in words."""
    return METRICS.get(name, name.rpartition(".")[2])


def shown(value: Any) -> str:
    """A value as it is typed; different values have different texts, and 1.0 is the same as 1.

    >>> [shown(value) for value in (True, 1.0, 0.1, None, "entropy", "1", [0.5, "all"])]
    ['true', '1', '0.1', 'null', 'entropy', "'1'", '[0.5, "all"]']
    """
    if isinstance(value, str):
        return value if isinstance(parsed(value), str) else f"'{value}'"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _without_followers(runs: Sequence[Run], varied: Sequence[str]) -> list[str]:
    """Leave out choices and classes that the other options tell already: method=hopfield brings its network along."""

    def partition(names: Sequence[str]) -> set[tuple[int, ...]]:
        groups: dict[str, list[int]] = {}
        for place, run in enumerate(runs):
            groups.setdefault(str([_text(run, name) for name in names]), []).append(place)
        return {tuple(group) for group in groups.values()}

    kept = [*varied]
    typed = {name for run in runs for name in run.typed}
    for name in sorted(varied, key=_is_class, reverse=True):
        others = [other for other in kept if other != name]
        follows = _is_class(name) or "." not in name
        if follows and name not in typed and others and partition(others) == partition(varied):
            kept = others
    return kept


def _hidden_differences(runs: Sequence[Run], varied: Sequence[str]) -> list[str]:
    """Options that were not typed and differ between runs that agree in all varied options."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        same.setdefault(str([_text(run, name) for name in varied]), []).append(run)
    found: dict[str, None] = {}
    for group in same.values():
        # Of a run without run.json, only what was typed is known.
        recorded = [run for run in group if run.is_recorded]
        if 0 < len(recorded) < len(group):
            found[RECORDED] = None
        for name in sorted({name for run in recorded for name in run.options}):
            values = [_text(run, name) for run in recorded]
            follows_seed = values == [shown(run.seed) for run in recorded]  # options that refer to the seed, and itself
            if len({*values}) > 1 and not follows_seed and not _is_private(name):
                found[name] = None
    return [name for name in found if name not in varied]


def _is_private(name: str) -> bool:
    return name in ("resume", "optimized_metric", "eval_at", "print_masked", "callbacks.evaluation.eval_at")


def _is_class(name: str) -> bool:
    return name.endswith("._target_")


def _value(run: Run, name: str) -> Any:
    """Value of an option; classes of this package without their module, which has moved between versions."""
    if name == RECORDED:
        return run.is_recorded
    value = run.options.get(name, ABSENT)
    is_own = _is_class(name) and str(value).startswith("supsup_lightning.")
    return str(value).rpartition(".")[2] if is_own else value


def _text(run: Run, name: str) -> str:
    return shown(_value(run, name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _sortable(column: pd.Series) -> pd.Series:
    """Numbers by size; after them other values, in the order in which they came."""
    numbers = sorted({value for value in column if _is_number(value)})
    texts = dict.fromkeys([*map(shown, numbers), *map(shown, column)])
    places = {text: place for place, text in enumerate(texts)}
    return column.map(lambda value: places[shown(value)])
