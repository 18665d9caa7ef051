"""Look of figures, and their files: the same series look different without colour as well."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from supsup_lightning.files import replacing

COLUMN = 3.5  # width of a column of a two-column page, inches
WIDE = 7.0
_LABEL_HEIGHT = 0.13  # of a line of text, inches

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    # Verdana is as wide as DejaVu Sans, by which matplotlib measures.
    "font.family": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "text.parse_math": False,  # option values are text, whatever dollar signs they have
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.2,
}


class Look(NamedTuple):
    """Colour (Okabe and Ito 2008), marker and line of a series."""

    color: str
    marker: str
    linestyle: Any


LOOKS = (
    Look("#0072B2", "o", "-"),
    Look("#D55E00", "s", "--"),
    Look("#009E73", "^", "-."),
    Look("#CC79A7", "D", ":"),
    Look("#E69F00", "v", (0, (5, 1))),
    Look("#56B4E9", "P", (0, (3, 1, 1, 1))),
    Look("#000000", "X", (0, (1, 1))),
)


@contextmanager
def style(salt: str = "") -> Iterator[None]:
    """Draw and save figures within the block in the report's look.

    Args:
        salt: text from which names inside an SVG file are made; figures of one page need different ones.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt or "supsup"}):
        yield


def new(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format of the path's suffix; the file is complete or unchanged."""
    path = Path(path)
    with replacing(path) as temporary:
        # Without a date, the same figure gives the same file.
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write labels at the right of the axes beside the ends of lines, moved apart where they would overlap.

    Args:
        figure: figure of the axes.
        axes: axes with their final limits.
        ends: value on the y axis, label and colour of each line.
    """
    low, high = axes.get_ylim()
    height = (high - low) or 1.0
    least = (
        0.11 * 2.2 / max(axes.get_window_extent().height / axes.figure.dpi, 0.5)
    )  # of the height, for one line of text
    places: list[float] = []
    for value, _, _ in sorted(ends):
        place = (value - low) / height
        places.append(max(place, places[-1] + least) if places else place)
    excess = places[-1] - 1 if places else 0
    if excess > 0:  # from the top down again
        limit = 1.0
        for position in range(len(places) - 1, -1, -1):
            places[position] = min(places[position], limit)
            limit = places[position] - least
    for place, (_, text, colour) in zip(places, sorted(ends), strict=True):
        axes.annotate(
            text, (1.02, place), xycoords="axes fraction", va="center", color=colour, fontsize=7, annotation_clip=False
        )
