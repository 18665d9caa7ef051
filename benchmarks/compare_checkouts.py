"""Do two checkouts of this project give the same results, bit for bit?

    python benchmarks/compare_checkouts.py BEFORE AFTER --out FOLDER [--name after] [--jobs demo nns ...]

Runs the same small jobs with each checkout's own train.py, then compares banks byte by byte, training losses and
accuracies by step (metrics.csv), and results.json but for times, memory and versions. `resumed` is stopped and resumed;
`older_checkpoint` is begun by BEFORE and finished by AFTER; both are compared with the run that was not stopped, too.

Outputs in FOLDER that are there are not made again: give a changed AFTER another --name. `resnet` needs CIFAR-100 in
$SUPSUP_DATA and is left out without it. Compile the C kernel in both checkouts first (python -m pip install -e .).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

QUIET = ["logger=csv", "~callbacks.progress", "~callbacks.figures", "seed=1", "trainer.log_every_n_steps=5"]
FEW = ["data.num_tasks=3", "data.steps_per_task=40"]
LONG = ["data.num_tasks=3", "data.steps_per_task=null", "data.epochs_per_task=8"]
UNSEEN = [option for option in QUIET if option != "logger=csv"]

JOBS: dict[str, list[str]] = {
    "demo": ["data.num_tasks=5", "data.steps_per_task=150", "inference=one_shot", "inference.images=each", *QUIET],
    "nns": ["scenario=nns", "data.num_tasks=4", "data.steps_per_task=120", *QUIET],
    "combined": [
        *["scenario=nns", "data.num_tasks=4", "data.steps_per_task=200"],
        *["discovery.on_unknown=auto", "discovery.combine_from=2", "discovery.trial_steps=40", "inference=exhaustive"],
        *["inference.objective=entropy", "inference.images=batch", *QUIET],
    ],
    "hopfield": ["experiment=split_mnist_hopfield", *FEW, "data=split_digits", "data.epochs_per_task=null", *QUIET],
    "at_once": ["data.tasks_at_once=3", "data.num_tasks=5", "data.steps_per_task=40", "inference=one_shot", *QUIET],
    "at_once_norm": [
        *["data.tasks_at_once=2", *FEW, "network=gem_resnet18", "+network.width=0.1", "network.output_size=20"],
        *["inference=one_shot", "inference.images=batch", *QUIET],
    ],
    "resnet": [
        *["experiment=split_cifar100_supsup", "data.num_tasks=2", "data.steps_per_task=4", "data.epochs_per_task=null"],
        *["data.batch_size=16", "+network.width=0.25", "+trainer.limit_test_batches=2", "eval_at=[]", *QUIET],
    ],
    "batch_ensemble": ["method=batch_ensemble", "scenario=gg", *FEW, *QUIET],
    "psp": ["method=psp", "scenario=gg", *FEW, *QUIET],
    "separate_heads": ["method=separate_heads", "scenario=gg", *FEW, *QUIET],
    "upper_bound": ["method=upper_bound", "scenario=gg", *FEW, *QUIET],
    "lower_bound": ["method=lower_bound", "scenario=gg", *FEW, *QUIET],
    "small_networks": ["method=small_networks", "scenario=gg", *FEW, *QUIET],
    "auto_sparsity": ["mask.rule=topk", "mask.sparsity=auto", *FEW, *QUIET],
    "transfer": ["mask.init=transfer", *FEW, *QUIET],
    "nearest": ["mask.init=nearest", *FEW, *QUIET],
    "topk_sgd": ["mask.rule=topk", "mask.sparsity=0.5", "optimizer=sgd", *FEW, *QUIET],
    "rmsprop": ["optimizer=rmsprop", *FEW, *QUIET],
    "patience": [*LONG, "data.patience=1", *QUIET],
    "whole": [*LONG, *UNSEEN, "logger=none"],
    "resumed": [*LONG, *UNSEEN, "logger=none"],
    "older_checkpoint": [*LONG, *UNSEEN, "logger=none"],
}
# Of results.json: what may differ between two runs of the same code.
VARYING = {
    *("train_seconds", "seconds_per_task", "inference_ms_per_batch", "peak_memory_bytes", "versions", "identity"),
}


def train(checkout: Path, folder: Path, overrides: list[str], *, stop: bool = False) -> None:
    """One run of a checkout's train.py; its output goes to a file beside the folder.

    Args:
        checkout: to run.
        folder: output directory.
        overrides: Hydra's.
        stop: end it with SIGTERM once there is a checkpoint.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(checkout / "train.py"), *overrides, f"hydra.run.dir={folder}"]
    if data := os.environ.get("SUPSUP_DATA"):
        command.append(f"data.root={data}")
    with (folder.parent / f"{folder.name}.txt").open("a") as output:
        process = subprocess.Popen(command, env=environment, cwd=checkout, stdout=output, stderr=output)
        while stop and process.poll() is None:
            if (folder / "checkpoints" / "last.ckpt").exists():
                process.terminate()
                break
            time.sleep(0.02)
        status = process.wait()
    if status != (143 if stop else 0):
        raise SystemExit(f"{' '.join(command)} ended with {status}; see {output.name}")


def run(name: str, before: Path, checkout: Path, folder: Path) -> None:
    """One job of a checkout, unless its results are there."""
    if (folder / "results.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun_by = {"resumed": checkout, "older_checkpoint": before}.get(name)
    if begun_by is not None:
        train(begun_by, folder, JOBS[name], stop=True)
    train(checkout, folder, [*JOBS[name], *([] if begun_by is None else ["resume=true"])])


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the outputs of two runs."""
    different = []
    banks = [folder / "mask_bank.safetensors" for folder in (one, other)]
    if banks[0].read_bytes() != banks[1].read_bytes():
        different.append("mask_bank.safetensors")
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    keys = sorted({*results[0], *results[1]} - VARYING)
    different += [f"results.json {key}" for key in keys if results[0].get(key) != results[1].get(key)]
    losses = [[row for path in sorted(folder.rglob("metrics.csv")) for row in logged(path)] for folder in (one, other)]
    if losses[0] != losses[1]:
        different.append("metrics.csv")
    return different


def logged(path: Path) -> list[tuple[str | None, ...]]:
    """Step, loss and accuracy of training and validation, as a CSV logger has written them."""
    names = ("step", "train/loss", "train/accuracy", "val/accuracy")
    with path.open() as file:
        return [tuple(row.get(name) for name in names) for row in csv.DictReader(file)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="after", help="folder of AFTER's outputs in OUT")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    options = parser.parse_args()
    before, after, out = options.before.resolve(), options.after.resolve(), options.out.resolve()
    failed = False
    for name in options.jobs:
        if name == "resnet" and not os.environ.get("SUPSUP_DATA"):
            print(f"{name:18} left out: no SUPSUP_DATA", flush=True)
            continue
        run(name, before, before, out / "before" / name)
        run(name, before, after, out / options.name / name)
        different = differences(out / "before" / name, out / options.name / name)
        if name in ("resumed", "older_checkpoint") and "whole" in options.jobs:
            different += differences(out / options.name / "whole", out / options.name / name)
        failed |= bool(different)
        print(f"{name:18} {'; '.join(different) or 'equal'}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
