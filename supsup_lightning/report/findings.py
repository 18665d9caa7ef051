"""Sentences that a comparison allows: the best group, the smallest that is about as good, and what an option costs."""

import pandas as pd

from supsup_lightning.report.comparison import METRICS, Comparison, label, shown
from supsup_lightning.report.tables import cell

TOLERANCE = 0.005  # a difference in accuracy that most users accept for fewer bytes
_LOWER_IS_BETTER = ("forgetting", "mask_bytes_per_task", "kept_bytes_in_all", "model_bytes", "train_seconds")
_SIZE = "model_bytes"


def findings(comparison: Comparison, *, y: str) -> list[str]:
    """Return sentences on the groups of a comparison; none for a single group."""
    groups = comparison.groups
    if len(groups) < 2 or y in _LOWER_IS_BETTER:
        return []
    best = groups[(y, "mean")].idxmax()
    said = [f"Highest {METRICS[y]}: {_group(comparison, best)}: {_value(groups, best, y)}{_seeds(groups, best)}."]
    near = groups[groups[(y, "mean")] >= groups.loc[best, (y, "mean")] - TOLERANCE]
    if _SIZE in comparison.metrics and y != _SIZE:
        sized = near[(_SIZE, "mean")].dropna()
        smallest = sized.idxmin() if len(sized) else best
        size, largest = groups.loc[smallest, (_SIZE, "mean")], groups.loc[best, (_SIZE, "mean")]
        if smallest != best and size < largest:
            said.append(
                f"Fewest bytes within {TOLERANCE} of it: {_group(comparison, smallest)}: "
                f"{_value(groups, smallest, y)} with {size:,.0f} bytes, {size / largest:.0%} of the best group's."
            )
    return [*said, *(_along(comparison, option, y) for option in comparison.varied if comparison.is_numeric(option))]


def pareto_front(groups: pd.DataFrame, *, x: str, y: str) -> list[int]:
    """Places of the groups that no other one beats: fewer of ``x``, more of ``y``; by ascending ``x``."""
    front: list[int] = []
    best = float("-inf")
    order = groups.sort_values([(x, "mean"), (y, "mean")], ascending=[True, False])
    for place, value in zip(order.index, order[(y, "mean")], strict=True):
        if value > best:
            front.append(groups.index.get_loc(place))
            best = value
    return front


def _along(comparison: Comparison, option: str, y: str) -> str:
    """Say how the metric changes with an option, for the best choice of the others."""
    groups = comparison.groups
    known = groups[groups[(y, "mean")].notna()]
    best = known.groupby((option, ""))[[(y, "mean")]].idxmax()[(y, "mean")]
    sized = _SIZE in comparison.metrics and y != _SIZE and groups[(_SIZE, "mean")].nunique() > 1
    sizes = {place: f" ({groups.loc[place, (_SIZE, 'mean')]:,.0f} bytes)" if sized else "" for place in best}
    steps = "; ".join(f"{shown(value)}: {_value(groups, place, y)}{sizes[place]}" for value, place in best.items())
    others = " (with the best of the other options)" if len(comparison.varied) > 1 else ""
    return f"{METRICS[y].capitalize()} by {option}{others}: {steps}."


def _group(comparison: Comparison, place: int) -> str:
    row = comparison.groups.loc[place]
    return label({name: row[(name, "")] for name in comparison.varied}, comparison.varied)


def _value(groups: pd.DataFrame, place: int, metric: str) -> str:
    return cell(metric, groups.loc[place, (metric, "mean")], groups.loc[place, (metric, "std")])


def _seeds(groups: pd.DataFrame, place: int) -> str:
    number = int(groups.loc[place, ("seeds", "")])
    return f" (mean ± standard deviation over {number} seeds)" if number > 1 else " (one seed)"
