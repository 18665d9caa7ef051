"""Every target of speed and size beside what is measured here, in one run; `make bench`.

    python benchmarks/targets.py [--json results.json] [--out docs] [--permuted-mnist]

Runs the other benchmarks (`train_step`, `packed_bits`, `growth`), measures the bank's file, and that old tasks keep
their logits, and prints a table: what, measured, target. Ratios are of things that were timed in turns. Ten minutes on
two cores. With ``--permuted-mnist``, also the 250 tasks of PermutedMNIST from end to end (a quarter of an hour more;
needs MNIST in $SUPSUP_DATA). ``--out`` is a folder for the curves: growth.png and tasks_at_once.png.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import growth
import packed_bits
import torch
import train_step
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from supsup_lightning import LeNet, SupSup
from supsup_lightning.module import default_optimizer

PERMUTED_MNIST = [
    "data=permuted_mnist",
    "data.num_tasks=250",
    "data.tasks_at_once=auto",
    "inference=one_shot",
    "inference.objective=entropy",
    "inference.layers=first",
    "inference.candidates=32",
    "inference.candidate_objective=superfluous",
    "eval_at=[]",
    "logger=none",
]


class Row(NamedTuple):
    """One target.

    Attributes:
        what: is measured.
        measured: the figure.
        target: at most (or at least) this.
        at_least: it is a lower bound.
    """

    what: str
    measured: float
    target: float
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def of_file(num_tasks: int = 8) -> list[Row]:
    """The bank's file against the entropy of its masks, at three sparsities."""
    rows = []
    for sparsity in (0.5, 0.9, 0.98):
        method = SupSup(LeNet(output_size=100), rule="topk", sparsity=sparsity)
        for task in range(num_tasks):
            method.begin_task(task)
            method.finish_task(task)
        limit = 0.0  # bytes
        for size, kept in zip(method.layout.sizes, method.rule.kept, strict=True):
            on = torch.tensor(kept / size, dtype=torch.float64)
            limit -= num_tasks * size * (on * on.log2() + (1 - on) * (1 - on).log2()).item() / 8
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bank.safetensors"
            method.save(path)
            measured = (path.stat().st_size - 4000) / limit
        rows.append(Row(f"bank file less 4 kB / entropy limit, sparsity {sparsity}", measured, 1.02))
    return rows


def of_old_tasks(num_tasks: int = 20) -> Row:
    """Logits of task 0 that differ after later tasks are trained."""
    method = SupSup(LeNet(output_size=100))
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(128, 1, 28, 28, generator=draw), torch.randint(10, (128,), generator=draw)
    first = torch.empty(0)
    for task in range(num_tasks):
        method.train()
        method.begin_task(task)
        optimizer = default_optimizer(method.trainable())
        for _ in range(20):
            optimizer.zero_grad()
            cross_entropy(method(images, task), labels).backward()
            optimizer.step()
        method.finish_task(task)
        method.eval()
        with torch.no_grad():
            logits = method(images, 0)
        first = logits if task == 0 else first
    return Row(f"logits of task 0 that differ after {num_tasks - 1} more", (logits != first).sum().item(), 0)


def permuted_mnist(folder: Path) -> tuple[list[Row], dict[str, float]]:
    """250 tasks with train.py, end to end."""
    started = perf_counter()
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, root / "train.py", *PERMUTED_MNIST, f"hydra.run.dir={folder}"], check=True)
    result = json.loads((folder / "results.json").read_text())
    seconds = {"minutes": (perf_counter() - started) / 60, "train_minutes": result["train_seconds"] / 60}
    return [
        Row("PermutedMNIST, 250 tasks: average accuracy", result["average_accuracy"], 0.960, at_least=True),
        Row("PermutedMNIST, 250 tasks: tasks found", result["task_inference_accuracy"], 0.995, at_least=True),
    ], seconds


def draw_at_once(rows: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(5, 4))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    counts = [row["tasks_at_once"] for row in rows]
    axes.semilogx(counts, [row["ms_per_step_and_task"] for row in rows], "o-", base=2, color="black")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("tasks trained at once")
    axes.set_ylabel("milliseconds per step and task, LeNet")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--permuted-mnist", action="store_true")
    options = parser.parse_args()
    train_step.quiet()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}", flush=True)
    rows, figures = [], {}

    figures["growth"] = growth.measure_all([10, 50, 100, 500, 1000, 2500])  # first, as it reads the process's memory
    with tempfile.TemporaryDirectory() as folder:
        rows.append(Row("seconds to train task 500 / task 5", growth.late_over_early(5, 500, Path(folder)), 1.1))

    figures["steps"] = []
    for name in train_step.NETWORKS:
        step = train_step.measure(name, rounds=3)
        print("  ".join(f"{key} {v:.2f}" if isinstance(v, float) else v for key, v in step.items()), flush=True)
        figures["steps"].append(step)
        rows.append(Row(f"masked step / dense step, {step['network']}", step["masked_over_dense"], 1.3))
        name = f"compiled masked step / compiled dense step, {step['network']}"
        rows.append(Row(name, step["compiled_over_compiled_dense"], 1.1))
    figures["at_once"] = train_step.measure_at_once(rounds=3)

    figures["packed_bits"] = packed_bits.measure(2500, 315_200, rounds=7)
    rows += [Row(name, figures["packed_bits"]["ratios"][name], limit) for name, limit in packed_bits.TARGETS.items()]
    rows += [*of_file(), of_old_tasks()]
    if options.permuted_mnist:
        with tempfile.TemporaryDirectory() as folder:
            found, figures["permuted_mnist"] = permuted_mnist(Path(folder))
        rows += found

    for step in figures["steps"]:
        ratio = step["lightning_over_masked"]
        print(f"a task through Lightning / the bare masked loop, {step['network']}: {ratio:.2f}")
    for row in figures["at_once"]:
        print(f"{row['tasks_at_once']} tasks at once: {row['times_as_fast']:.2f} times as fast as one by one")
    print(f"\n{'':64} {'measured':>9} {'target':>9}")
    for row in rows:
        bound = ">=" if row.at_least else "<="
        print(f"{row.what:64} {row.measured:9.4g} {bound} {row.target:6.4g}  {'' if row.is_met else 'MISSED'}")
    if options.out:
        growth.draw(figures["growth"], options.out / "growth.png")
        draw_at_once(figures["at_once"], options.out / "tasks_at_once.png")
    if options.json:
        targets = [{**row._asdict(), "is_met": row.is_met} for row in rows]
        options.json.write_text(json.dumps({"machine": machine, "targets": targets, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
