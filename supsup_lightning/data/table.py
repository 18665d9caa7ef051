"""Reader of tables with one image path and its label per line."""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from supsup_lightning.errors import DataError

_DELIMITERS = (",", ";", "\t")


class Line(NamedTuple):
    """Cells of one line, without surrounding spaces; the half is empty if there is no such column."""

    number: int
    path: str
    label: str
    half: str


class Table(NamedTuple):
    """Lines of a table, whether they name halves, and the other columns by name."""

    lines: list[Line]
    has_halves: bool
    others: dict[str, list[str]]


def read_table(table: Path, *, path_column: str, label_column: str, split_column: str | None) -> Table:
    """Read a table in UTF-8 with a header line, separated by commas, semicolons or tabs.

    Names of columns are matched exactly, or else without regard to case.

    Args:
        table: path of the file.
        path_column: name of the column of paths.
        label_column: name of the column of labels.
        split_column: name of the column of halves; None to use none. The column ``split`` may be absent.

    Raises:
        DataError: a column that is absent or occurs twice; a line with too many cells, or with none for one of these
            columns; a file that is no table.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            text = file.read()
        if "\0" in text:
            raise csv.Error("null bytes: it is no text in UTF-8")
        rows = list(_rows(text, _delimiter(text, path_column, label_column)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        remedy = "check data.root and its name" if isinstance(error, OSError) else "fix it, or save it as CSV in UTF-8"
        raise DataError(f"The table {table} cannot be read ({error}); {remedy}.") from error
    header = [name.strip() for name in rows[0][1]] if rows else []

    wanted = [path_column, label_column]
    if split_column is not None and (split_column != "split" or _places(header, split_column)):
        wanted.append(split_column)
    places = [_place(header, column, table) for column in wanted]
    lines = []
    others: dict[str, list[str]] = {name: [] for place, name in enumerate(header) if place not in places}
    for number, row in rows[1:]:
        if any(cell.strip() for cell in row[len(header) :]):
            raise DataError(f"Line {number} of {table} has {len(row)} cells, where the first line has {len(header)}.")
        cells = [cell.strip() for cell in row] + [""] * (len(header) - len(row))
        for column, place in zip(wanted, places, strict=True):
            if not cells[place]:
                raise DataError(f"Line {number} of {table} has no {column}.")
        lines.append(Line(number, *(cells[place] for place in places), *([""] * (3 - len(places)))))
        for name in others:
            others[name].append(cells[header.index(name)])
    return Table(lines, len(places) == 3, others)


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty, with the number of its last line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for row in reader:
        if row:
            yield reader.line_num, row


def _delimiter(text: str, *columns: str) -> str:
    """Return the delimiter that separates these columns in the first line; a comma if none does."""
    for delimiter in _DELIMITERS:
        _, header = next(_rows(text, delimiter), (1, []))
        if all(_places([name.strip() for name in header], column) for column in columns):
            return delimiter
    return _DELIMITERS[0]


def _places(header: list[str], column: str) -> list[int]:
    exact = [place for place, name in enumerate(header) if name == column]
    return exact or [place for place, name in enumerate(header) if name.casefold() == column.casefold()]


def _place(header: list[str], column: str, table: Path) -> int:
    places = _places(header, column)
    if not places:
        raise DataError(f"The table {table} has no column {column!r}; it has {', '.join(header) or 'none'}.")
    if len(places) > 1:
        raise DataError(f"The table {table} has {len(places)} columns {column!r}; rename all but one.")
    return places[0]


def located(folder: Path, name: str) -> Path:
    """Return the path of an image below ``folder``; ``name`` may use the backslashes of Windows."""
    path = folder / name
    if "\\" in name and not os.path.isfile(path):
        slashes = folder / name.replace("\\", "/")
        return slashes if os.path.isfile(slashes) else path
    return path
