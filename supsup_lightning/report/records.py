"""Tables of numbers that a run writes beside results.json, as CSV files."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from supsup_lightning.files import replacing


def write_rows(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file; it is complete or unchanged."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_matrix(path: str | Path, matrix: Tensor, *, first_task: int = 0) -> None:
    """Write the accuracy matrix as CSV: first column the number of tasks learned; cells not evaluated are empty."""
    write_rows(
        path,
        ["tasks_learned", *(f"task_{task}" for task in range(first_task, first_task + matrix.shape[1]))],
        (
            [learned, *("" if value != value else f"{value:.6f}" for value in row)]
            for learned, row in enumerate(matrix.tolist(), start=1)
        ),
    )
