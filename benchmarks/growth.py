"""What grows with the number of tasks: training, finding a task, and memory, at 10 to 2,500 tasks.

    python benchmarks/growth.py [--out docs/growth.png] [--json results.json] [--tasks 10 100 500 2500]

LeNet 300-100 with output_size 500 on images of 28 x 28, batch 128. The bank is filled with random masks; then, at each
number of tasks: seconds to train one more (100 steps of Adam, finishing it and writing a checkpoint included);
milliseconds to find the task of one image by one gradient, by binary search, and by trying each; milliseconds to
classify a batch with the task given; bytes of the bank; and how the memory of the process has grown.
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from supsup_lightning import Binary, Exhaustive, LeNet, OneShot, SupSup

STEPS = 100
CLASSES = 10
LABELS = {
    "one_shot": "one gradient",
    "binary": "binary search",
    "exhaustive": "trying each",
    "given": "given: to classify a batch",
}


def milliseconds(task: Callable[[], object], rounds: int = 5) -> float:
    """The median, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        started = perf_counter()
        task()
        times.append(1000 * (perf_counter() - started))
    return median(times[1:])


def train_one(method: SupSup, task: int, folder: Path) -> float:
    """Seconds."""
    draw = torch.Generator().manual_seed(task)
    images, labels = torch.randn(128, 1, 28, 28, generator=draw), torch.randint(CLASSES, (128,), generator=draw)
    started = perf_counter()
    method.train()
    method.begin_task(task)
    optimizer = torch.optim.Adam(method.trainable(), lr=1e-3)
    for _ in range(STEPS):
        loss = cross_entropy(method(images, task), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method.finish_task(task)
    torch.save({"state_dict": method.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.ckpt")
    return perf_counter() - started


def measure(method: SupSup, num_tasks: int, folder: Path) -> dict[str, float]:
    while len(method.bank) < num_tasks - 3:
        task = len(method.bank)
        method.bank.add(task, torch.rand(method.layout.num_weights) < 0.5)
    seconds = median(train_one(method, len(method.bank), folder) for _ in range(3))
    method.eval()
    image, batch = torch.randn(1, 1, 28, 28), torch.randn(128, 1, 28, 28)
    ways = {"one_shot": OneShot("entropy"), "binary": Binary("entropy"), "exhaustive": Exhaustive("entropy")}
    found = {
        f"{name}_ms": milliseconds(lambda inference=inference: inference(method, image, CLASSES))
        for name, inference in ways.items()
    }
    with torch.no_grad():
        given = milliseconds(lambda: method(batch, num_tasks // 2))
    return {
        "num_tasks": num_tasks,
        "train_seconds": seconds,
        **found,
        "given_ms": given,
        "bank_bytes": method.bank.packed.nbytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def draw(rows: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(10, 4))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    tasks = [row["num_tasks"] for row in rows]
    left.semilogx(tasks, [row["train_seconds"] for row in rows], "o-", color="black")
    left.set_ylabel(f"seconds to train one more task ({STEPS} steps)")
    left.set_ylim(bottom=0)
    for name, label in LABELS.items():
        right.loglog(tasks, [row[f"{name}_ms"] for row in rows], "o-", label=label)
    right.set_ylabel("milliseconds to find a task")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("tasks learned")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 50, 100, 500, 1000, 2500])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    method = SupSup(LeNet(output_size=500))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for num_tasks in options.tasks:
            rows.append(measure(method, num_tasks, Path(folder)))
            print(
                "  ".join(f"{name} {value:,.3f}".rstrip("0").rstrip(".") for name, value in rows[-1].items()),
                flush=True,
            )
    if options.out:
        draw(rows, options.out)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
