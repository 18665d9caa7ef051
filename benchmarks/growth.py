"""What grows with the number of tasks: training, finding a task, evaluation, and memory, at 10 to 2,500 tasks.

    python benchmarks/growth.py [--out docs/growth.png] [--json results.json] [--tasks 10 100 500 2500]

LeNet 300-100 with output_size 500 on images of 28 x 28, batch 128. The bank is filled with random masks; then, at each
number of tasks: seconds to train one more (100 steps of Adam, finishing it and writing a checkpoint included);
milliseconds to find the task of one image by one gradient, by binary search, and by trying each; milliseconds to
classify a batch with the task given; seconds per task of `Trainer.test` over all tasks, one batch each, with the task
given and with one gradient per batch; bytes of the bank; and how the memory of the process has grown.
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import lightning as L
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from train_step import quiet  # a benchmark beside this one

from supsup_lightning import (
    Binary,
    ContinualDataModule,
    ContinualModule,
    Exhaustive,
    Given,
    LeNet,
    OneShot,
    SupSup,
)
from supsup_lightning.scenario import GG, GNU

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


def train_one(method: SupSup, task: int, folder: Path, steps: int = STEPS) -> float:
    """Seconds, the checkpoint included."""
    draw = torch.Generator().manual_seed(task)
    images, labels = torch.randn(128, 1, 28, 28, generator=draw), torch.randint(CLASSES, (128,), generator=draw)
    started = perf_counter()
    method.train()
    method.begin_task(task)
    optimizer = torch.optim.Adam(method.trainable(), lr=1e-3)
    for _ in range(steps):
        loss = cross_entropy(method(images, task), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method.finish_task(task)
    torch.save({"state_dict": method.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.ckpt")
    return perf_counter() - started


def late_over_early(early: int, late: int, folder: Path, rounds: int = 7) -> float:
    """Seconds to train one task after so many over seconds after so few, in turns; the median of 300 steps each."""
    methods = {count: SupSup(LeNet(output_size=100)) for count in (early, late)}
    for count, method in methods.items():
        for task in range(count):
            method.bank.add(task, torch.rand(method.layout.num_weights) < 0.5)
    ratios = []
    for _ in range(rounds + 1):
        seconds = {}
        for count, method in methods.items():
            seconds[count] = train_one(method, count, folder, steps=300)
            method.bank.remove(count)
        ratios.append(seconds[late] / seconds[early])
    return median(ratios[1:])


def test_all(method: SupSup, num_tasks: int, folder: Path, **options) -> float:
    """Seconds per task of a test of them all, on one batch of random images per task."""
    draw = torch.Generator().manual_seed(0)
    train, test = (
        TensorDataset(
            torch.randint(256, (count, 1, 28, 28), generator=draw, dtype=torch.uint8), torch.arange(count) % CLASSES
        )
        for count in (1000, 128)
    )
    data = ContinualDataModule.permuted(train, test, num_tasks=num_tasks, steps_per_task=1)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    started = perf_counter()
    trainer.test(ContinualModule(method, **options), data, verbose=False)
    return (perf_counter() - started) / num_tasks


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
    evaluation = {
        "test_given_seconds": test_all(method, num_tasks, folder, scenario=GG, inference=Given()),
        "test_one_shot_seconds": test_all(method, num_tasks, folder, scenario=GNU, inference=ways["one_shot"]),
    }
    return {
        "num_tasks": num_tasks,
        "train_seconds": seconds,
        **found,
        "given_ms": given,
        **evaluation,
        "bank_bytes": method.bank.packed.nbytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_all(counts: Sequence[int]) -> list[dict[str, float]]:
    """A row for each number of tasks, printed as well."""
    method = SupSup(LeNet(output_size=500))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for num_tasks in counts:
            rows.append(measure(method, num_tasks, Path(folder)))
            numbers = (f"{name} {value:,.3f}".rstrip("0").rstrip(".") for name, value in rows[-1].items())
            print("  ".join(numbers), flush=True)
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(14, 4))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    left, right, evaluation = figure.subplots(1, 3)
    tasks = [row["num_tasks"] for row in rows]
    left.semilogx(tasks, [row["train_seconds"] for row in rows], "o-", color="black")
    left.set_ylabel(f"seconds to train one more task ({STEPS} steps)")
    left.set_ylim(bottom=0)
    for name, label in LABELS.items():
        right.loglog(tasks, [row[f"{name}_ms"] for row in rows], "o-", label=label)
    right.set_ylabel("milliseconds to find a task")
    right.legend(frameon=False)
    for name, label in (("test_given_seconds", "task given"), ("test_one_shot_seconds", "one gradient per batch")):
        evaluation.loglog(tasks, [1000 * row[name] for row in rows], "o-", label=label)
    evaluation.set_ylabel("milliseconds per task to test all, one batch each")
    evaluation.legend(frameon=False)
    for axes in (left, right, evaluation):
        axes.set_xlabel("tasks learned")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 50, 100, 500, 1000, 2500])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet()
    rows = measure_all(options.tasks)
    if options.out:
        draw(rows, options.out)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
