"""Table of accuracy per task for a terminal or a notebook, after `Trainer.test` and `Trainer.validate`."""

from rich.console import Console
from rich.table import Table
from torch import Tensor

# A table of more tasks shows only the first and the last ones.
_MOST_ROWS = 40


def show(values: Tensor, *, found: bool, first_task: int = 0) -> None:
    """Print one row per task, and one for the average.

    Args:
        values: ``(2, tasks)`` in [0, 1], accuracy and share of images whose task was found; NaN without images.
        found: whether to show that share.
        first_task: number of the first task.
    """
    table = Table("task", "accuracy", *(["task found"] if found else []))
    for column in table.columns:
        column.justify = "right"
    rows = values[: 1 + found].T.tolist()
    shown = [(str(task), *map(_shown, row)) for task, row in enumerate(rows, start=first_task)]
    if len(shown) > _MOST_ROWS:
        half = _MOST_ROWS // 2
        shown = [*shown[:half], ("…",) * len(table.columns), *shown[-half:]]
    for row in shown:
        table.add_row(*row)
    table.add_section()
    table.add_row("all", *map(_shown, values[: 1 + found].nanmean(1).tolist()), style="bold")
    Console().print(table)


def _shown(value: float) -> str:
    return f"{value:.4f}" if value == value else ""
