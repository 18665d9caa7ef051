"""Arrangement of groups of runs in a figure: panels, and series with their labels."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from supsup_lightning.report.comparison import label, shown
from supsup_lightning.report.drawing import LOOKS

_MOST_PANELS = 6


class Series(NamedTuple):
    """Groups that are drawn as one line."""

    label: str
    rows: pd.DataFrame


class Panel(NamedTuple):
    """Lines in the same axes."""

    label: str
    series: list[Series]


class Arrangement(NamedTuple):
    """Panels of a figure, and a note on what they leave out."""

    panels: list[Panel]
    note: str = ""


def arrange(groups: pd.DataFrame, options: Sequence[str], *, by: Sequence[str] = ()) -> Arrangement:
    """Arrange groups as at most seven lines per panel in at most six panels.

    Args:
        groups: rows of `Comparison.groups`.
        options: varied options that are not on the x axis.
        by: those of them that tell lines apart; by default all, with panels where these are too many lines.
    """
    lines = [*by] or [*options]
    while not by and len(lines) > 1 and _count(groups, lines) > len(LOOKS):
        lines.remove(min(lines, key=lambda name: _count(groups, [name])))
    across = [name for name in options if name not in lines]
    panels, left_out = [], 0
    for title, rows in _split(groups, across):
        series = [Series(name, own) for name, own in _split(rows, lines)]
        left_out += max(0, len(series) - len(LOOKS))
        panels.append(Panel(title if across else "", series[: len(LOOKS)]))
    left_out += sum(len(panel.series) for panel in panels[_MOST_PANELS:])
    note = f"{left_out} more lines are in the table alone; choose with --group." if left_out else ""
    return Arrangement(panels[:_MOST_PANELS], note)


def _split(groups: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    if not names:
        return [(label({}, []), groups)]
    keys = groups[[(name, "") for name in names]].apply(lambda row: tuple(map(shown, row)), axis=1)
    found = []
    for key in dict.fromkeys(keys):
        rows = groups[keys == key]
        found.append((label({name: rows.iloc[0][(name, "")] for name in names}, names), rows))
    return found


def _count(groups: pd.DataFrame, names: Sequence[str]) -> int:
    return len({tuple(map(shown, row)) for row in groups[[(name, "") for name in names]].to_numpy(dtype=object)})
