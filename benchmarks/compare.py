"""All methods on the same data and network, in one table and one picture: what does a byte buy? (docs/methods.md)

    SUPSUP_DATA=<folder with MNIST/raw> python benchmarks/compare.py permuted_mnist
    SUPSUP_DATA=<folder with cifar-100-python> python benchmarks/compare.py split_cifar100
    ... split_cifar100 --full       the paper's size (20 tasks, 250 epochs): for a GPU

Each row is a run of train.py with a directory of its own under outputs/compare; what is there is not run again. More
overrides, after --, go to every run (trainer=gpu, say). Writes table.md and accuracy_against_bytes.png beside them.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from supsup_lightning import SupSup
from supsup_lightning.cli.command_line import run_name
from supsup_lightning.networks import GEMResNet18
from supsup_lightning.report import drawing
from supsup_lightning.report.plots import Point, accuracy_against_bytes
from supsup_lightning.report.summary import read_json

ROOT = Path(__file__).parent.parent


class Row(NamedTuple):
    """A run: its name, the methods that share a colour, and overrides."""

    name: str
    family: str
    overrides: str


# Learning rates: 1e-3 or 3e-3 (Adam), whichever was better in a first try on three tasks; factors of BatchE 0.1.
BASELINES = [
    Row("PSP", "PSP", "method=psp"),
    Row("BatchE", "BatchE", "method=batch_ensemble"),
    Row("BatchE, random trunk", "BatchE", "method=batch_ensemble method.trunk=random"),
    Row("separate heads", "separate heads", "method=separate_heads"),
    Row("separate heads, random trunk", "separate heads", "method=separate_heads method.trunk=random"),
    Row("small networks", "small networks", "method=small_networks optimizer.lr=3e-3"),
    Row("lower bound", "lower bound", "method=lower_bound"),
]

PERMUTED_MNIST = [
    Row("upper bound", "upper bound", "method=upper_bound optimizer.lr=3e-3"),
    Row("SupSup", "SupSup", "method=supsup optimizer=sgd"),
    Row("SupSup, 90 % off", "SupSup", "method=supsup optimizer=sgd mask.rule=topk mask.sparsity=0.9"),
    *BASELINES,
]
# The task is found by one image of a batch.
HIDDEN = [
    Row("SupSup, task hidden", "", "method=supsup scenario=gnu network.output_size=100"),
    *(
        Row(
            f"BatchE, task hidden, {objective}",
            "",
            f"method=batch_ensemble scenario=gnu inference=exhaustive inference.objective={objective}",
        )
        for objective in ("entropy", "max_probability")
    ),
]
PUBLISHED_MNIST = [
    Point("published, Kang et al. 2022: SupSup 0.963", None, 0.9631, "SupSup"),
    Point("published, Kang et al. 2022: joint training 0.967", None, 0.9670, "joint"),
]

TOPK = "mask.rule=topk mask.allocation=erdos_renyi"
SPLIT_CIFAR100 = [
    Row("upper bound", "upper bound", "method=upper_bound"),
    *(Row(f"SupSup, budget {b}", "SupSup", f"method=supsup {TOPK} mask.budget={b}") for b in (2, 8, 32)),
    Row("SupSup, transfer, budget 32", "SupSup", f"method=supsup {TOPK} mask.budget=32 mask.init=transfer"),
    *BASELINES,
]


def published_cifar100() -> list[Point]:
    """Accuracies of the paper, whose bytes are counted here: 20 tasks of the whole network."""
    points = []
    for budget, accuracy, name in ((1, 0.7756, "budget 1"), (32, 0.8957, "budget 32"), (32, 0.9166, "transfer")):
        method = SupSup(GEMResNet18(output_size=5), rule="topk", allocation="erdos_renyi", budget=budget)
        method.begin_task(0)
        method.finish_task(0)
        path = ROOT / "outputs" / "compare" / f"published_{budget}.safetensors"
        method.save(path)
        points.append(
            Point(f"published: {name}, 20 tasks", 20 * path.stat().st_size, accuracy, "SupSup", published=True)
        )
        path.unlink()
    dense = 4 * sum(parameter.numel() for parameter in GEMResNet18(output_size=5).parameters())
    return [*points, Point("published: lower bound, 20 tasks", dense, 0.245, "lower bound", published=True)]


def overrides(row: Row, common: Sequence[str]) -> list[str]:
    """A row's own, and the common ones that it does not replace."""
    return list({option.partition("=")[0]: option for option in [*common, *row.overrides.split()]}.values())


def run(row: Row, folder: Path, common: Sequence[str]) -> dict[str, Any]:
    """The results of a row, which is run unless they are there."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides(row, common)]
    print(row.name, flush=True)
    subprocess.run([*command, f"hydra.run.dir={folder}", "resume=true", "logger=none"], check=True, cwd=ROOT)
    return read_json(folder / "results.json")


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    columns = ["method", "scenario", "accuracy", "forgetting", "bytes in memory", "of these, per task"]
    columns += ["bytes in the file", "CAP", "s per task"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, result in results.items():
        forgotten = result["forgetting"]
        lines.append(
            f"| {name} | {result['scenario'].upper()} | {result['average_accuracy']:.4f} | "
            f"{'' if forgotten is None else f'{forgotten:.4f}'} | {result['kept_bytes_in_all']:,} | "
            f"{result['mask_bytes_per_task']:,} | {result['model_bytes']:,} | {result['cap']:.2f} | "
            f"{result['train_seconds'] / result['num_tasks']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("permuted_mnist", "split_cifar100"))
    parser.add_argument("--full", action="store_true", help="SplitCIFAR100 in the paper's size")
    parser.add_argument("overrides", nargs="*", help="for every run")
    options = parser.parse_args()
    common = ["scenario=gg", f"data={options.data}", "eval_at=all"]
    if options.data == "permuted_mnist":
        rows, published, title = PERMUTED_MNIST + HIDDEN, PUBLISHED_MNIST, "PermutedMNIST, 10 tasks, LeNet 300-100"
        common += ["data.num_tasks=10", "data.steps_per_task=1000", "network=lenet", "network.output_size=10"]
    else:
        rows, published = SPLIT_CIFAR100, published_cifar100()
        common += ["network=gem_resnet18", "network.output_size=5"]
        if options.full:
            title = "SplitCIFAR100, 20 tasks, GEM ResNet-18, 250 epochs"
            common += ["data.epochs_per_task=250", "optimizer.weight_decay=1e-4"]
        else:
            title = "SplitCIFAR100, 4 tasks, GEM ResNet-18 of 8 base channels, 6 epochs"
            common += ["data.num_tasks=4", "data.epochs_per_task=6", "network.base_channels=8"]
    name = options.data + ("_full" if options.full else "")
    if options.overrides:  # other runs, in a folder of their own
        title += f" ({' '.join(options.overrides)})"
        name += f"-{run_name(','.join(options.overrides))}"
    common += options.overrides
    folder = ROOT / "outputs" / "compare" / name
    results = {}
    for row in rows:
        directory = folder / row.name.replace(" ", "_").replace(",", "").replace("%", "percent")
        results[row.name] = run(row, directory, common)
    (folder / "table.md").write_text(table(results) + "\n")
    print(table(results))
    points = [
        Point(row.name, results[row.name]["model_bytes"], results[row.name]["average_accuracy"], row.family)
        for row in rows
        if row.family
    ]
    figure = accuracy_against_bytes([*points, *published], title=title)
    print(drawing.save(figure, folder / "accuracy_against_bytes.png"))


if __name__ == "__main__":
    main()
