"""Table of a comparison: for terminals, as CSV, Markdown and LaTeX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from supsup_lightning.files import replacing
from supsup_lightning.report.collection import Run
from supsup_lightning.report.comparison import MAIN, METRICS, Comparison, short, shown

_SHORTER = {"bytes in the file": "bytes"}  # of the columns on a terminal
_WHOLE = ("num_masks", "mask_bytes_per_task", "kept_bytes_in_all", "model_bytes", "peak_memory_bytes")
_TENTHS = ("train_seconds", "inference_ms_per_batch")


def write(comparison: Comparison, folder: Path) -> None:
    """Write table.csv with all digits, table.md and table.tex with mean ± standard deviation, and runs.csv."""
    groups = comparison.groups.drop(columns=[("members", "")])
    groups.columns = ["_".join(filter(None, pair)) for pair in groups.columns]
    words = in_words(comparison, metrics=comparison.metrics)
    texts = {
        "table.csv": groups.to_csv(index=False),
        "table.md": words.to_markdown(index=False, disable_numparse=True) + "\n",
        "table.tex": _latex(words),
        "runs.csv": _runs(comparison).to_csv(index=False),
    }
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text)


def in_words(comparison: Comparison, *, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one row of text per group: values of the varied options, number of seeds, and mean ± std."""
    chosen = [name for name in (MAIN if metrics is None else metrics) if name in comparison.metrics]
    columns: dict[str, list[str]] = {
        name: [shown(value) for value in comparison.groups[(name, "")]] for name in comparison.varied
    }
    columns["seeds"] = [str(number) for number in comparison.groups[("seeds", "")]]
    for metric in chosen:
        parts = [comparison.groups[(metric, part)] for part in ("mean", "std", "count")]
        columns[short(metric)] = [
            # A mean over fewer runs than the row has says so.
            cell(metric, mean, deviation) + (f" (of {count})" if 0 < count < runs else "")
            for mean, deviation, count, runs in zip(*parts, comparison.groups[("runs", "")], strict=True)
        ]
    return pd.DataFrame(columns)


def cell(metric: str, mean: float, deviation: float) -> str:
    """Mean ± standard deviation of a metric; the mean alone for one seed.

    >>> cell("average_accuracy", 0.96184, 0.0012), cell("model_bytes", 33280.0, float("nan"))
    ('0.9618 ± 0.0012', '33,280')
    """
    if mean != mean:
        return ""
    digits = ",.0f" if metric in _WHOLE else ",.1f" if metric in _TENTHS else ".4f"
    spread = f" ± {deviation:{digits}}" if deviation == deviation and (metric not in _WHOLE or deviation) else ""
    return f"{mean:{digits}}{spread}"


def on_terminal(comparison: Comparison) -> Table:
    """Return the table with the most important metrics."""
    words = in_words(comparison)
    table = Table(box=SIMPLE_HEAD)
    for name in words.columns:
        number = name in METRICS.values() or name == "seeds"
        least = 0 if number else 8
        header = _SHORTER.get(name, short(name))
        table.add_column(header, justify="right", no_wrap=number, min_width=least, overflow="fold")
    for row in words.itertuples(index=False):
        table.add_row(*row)
    return table


def unfinished(runs: Sequence[Run]) -> Table:
    """Return a table of runs without results."""
    table = Table(title="without results", title_justify="left")
    for name in ("run", "state", "last line of its error"):
        table.add_column(name, overflow="fold")
    for run in runs:
        table.add_row(run.folder.name, run.state, run.error)
    return table


def as_json(comparison: Comparison, unfinished: Sequence[Run]) -> dict[str, Any]:
    """Return groups with the mean and standard deviation of each metric, and runs without results, for programs."""
    groups = []
    for _, row in comparison.groups.iterrows():
        group: dict[str, Any] = {name: row[(name, "")] for name in comparison.varied}
        group |= {name: int(row[(name, "")]) for name in ("runs", "seeds")}
        for metric in comparison.metrics:
            group[metric] = {part: _or_none(row[(metric, part)]) for part in ("mean", "std")}
        groups.append({name: value.item() if hasattr(value, "item") else value for name, value in group.items()})
    failed = [{"folder": str(run.folder), "state": run.state, "error": run.error} for run in unfinished]
    return {"varied": [*comparison.varied], "groups": groups, "unfinished": failed}


def _or_none(value: float) -> float | None:
    return None if value != value else float(value)


def _runs(comparison: Comparison) -> pd.DataFrame:
    table = comparison.frame.drop(columns="run").dropna(axis=1, how="all")
    return table.assign(folder=[str(run.folder) for run in comparison.runs])


def _latex(words: pd.DataFrame) -> str:
    """Table for booktabs."""
    words = words.map(lambda text: text.replace("±", r"PLUSMINUS"))
    styled = words.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    numbers = "l" * (len(words.columns) - len([c for c in words if c in METRICS.values()]))
    text = styled.to_latex(hrules=True, column_format=numbers + "r" * (len(words.columns) - len(numbers)))
    return "% needs \\usepackage{booktabs}\n" + text.replace("PLUSMINUS", r"$\pm$")
