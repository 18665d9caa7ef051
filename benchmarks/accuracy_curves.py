"""Average accuracy over the tasks so far against their number, of several runs in one picture.

    python benchmarks/accuracy_curves.py --out curves.png "NNs=outputs/one" "GNs=outputs/other"

Each argument is a label and the output directory of a run; the points are the rows of its accuracy_matrix.csv.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def curve(folder: Path) -> tuple[list[int], list[float]]:
    """Numbers of tasks learned, and the mean accuracy over them."""
    learned, average = [], []
    with (folder / "accuracy_matrix.csv").open() as file:
        for row in csv.DictReader(file):
            number = int(row.pop("tasks_learned"))
            cells = [float(cell) for cell in row.values() if cell]
            if cells:
                learned.append(number)
                average.append(float(np.mean(cells)))
    return learned, average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("runs", nargs="+", help="label=folder")
    options = parser.parse_args()
    figure = Figure(figsize=(7, 4))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run in options.runs:
        label, _, folder = run.partition("=")
        learned, average = curve(Path(folder))
        axes.plot(learned, average, "o-", label=label, markersize=4)
        print(label, " ".join(f"{number}: {value:.4f}" for number, value in zip(learned, average, strict=True)))
    axes.set_xlabel("tasks so far")
    axes.set_ylabel("average accuracy over them")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
