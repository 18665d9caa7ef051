"""What a mask costs: one masked training step against the plain dense step, and the share of Lightning's loop.

    python benchmarks/train_step.py [--steps 500] [--rounds 3] [--json results.json]

Prints, for LeNet 300-100 and FC 1024-1024 on images of 28 x 28, batch 128, the same optimizer: milliseconds of a
dense step, of a masked step, of a masked step through `Trainer.fit` (a whole task over its steps: validation, boundary
and checkpoint included), and their ratios. All are timed in turns
in one run and the median is taken, so that a noisy machine disturbs all of them alike. The images are random: only
time is measured.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import warnings
from time import perf_counter

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from supsup_lightning import ContinualDataModule, ContinualModule, FullyConnected, LeNet, SupSup
from supsup_lightning.callbacks import LossGuard, TaskBoundary
from supsup_lightning.module import default_optimizer
from supsup_lightning.schedules import cosine

TARGET_MASKED = 1.3  # DESIGN: masked step over dense step
TARGET_LIGHTNING = 1.5  # a task through Lightning over the bare masked loop
NETWORKS = {"LeNet": (LeNet, 100), "FC 1024": (FullyConnected, 500)}


def random_images(count: int) -> TensorDataset:
    """Noise in the form of MNIST."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=draw, dtype=torch.uint8)
    return TensorDataset(pixels, torch.randint(0, 10, (count,), generator=draw))


def make_data(steps: int, *, num_tasks: int = 1) -> ContinualDataModule:
    data = ContinualDataModule.permuted(
        random_images(60_000), random_images(10_000), num_tasks=num_tasks, steps_per_task=steps
    )
    data.setup()
    return data


def dense_loop(network: torch.nn.Module, data: ContinualDataModule) -> float:
    return bare_loop(list(network.parameters()), network, data)


def masked_loop(method: SupSup, data: ContinualDataModule) -> float:
    method.begin_task(0)
    return bare_loop(method.trainable(), lambda images: method(images, 0), data)


def bare_loop(parameters, forward, data: ContinualDataModule) -> float:
    """Milliseconds a step of the plainest loop over the same batches, with the same optimizer and schedule."""
    started = perf_counter()
    optimizer = default_optimizer(parameters)
    schedule = cosine(optimizer, data.steps_per_task)
    for images, labels in data.train_loader(0):
        loss = cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return 1000 * (perf_counter() - started) / data.steps_per_task


class FitClock(L.Callback):
    """Seconds from the start of training to its end: batches, validation, task boundaries, checkpoints."""

    def on_train_start(self, trainer, pl_module):
        self.started = perf_counter()

    def on_train_end(self, trainer, pl_module):
        self.seconds = perf_counter() - self.started


def lightning_loop(method: SupSup, data: ContinualDataModule) -> float:
    """Milliseconds a step of a whole task through `Trainer.fit`, all of a run but evaluations of old tasks."""
    module = ContinualModule(method)
    clock = FitClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=data.num_epochs,
            reload_dataloaders_every_n_epochs=1,
            callbacks=[TaskBoundary(), LossGuard(), ModelCheckpoint(folder, filename="last"), clock],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
    return 1000 * clock.seconds / data.steps_per_task / data.num_tasks


def measure(name: str, steps: int, rounds: int) -> dict[str, float | str]:
    network, output_size = NETWORKS[name]
    times: dict[str, list[float]] = {"dense": [], "masked": [], "lightning": []}
    for warm_up in [True] + [False] * rounds:
        data = make_data(10 if warm_up else steps)
        taken = {
            "dense": dense_loop(network(output_size=output_size), data),
            "masked": masked_loop(SupSup(network(output_size=output_size)), data),
            "lightning": lightning_loop(SupSup(network(output_size=output_size)), data),
        }
        if not warm_up:
            for loop, milliseconds in taken.items():
                times[loop].append(milliseconds)
    median = {f"{loop}_ms": statistics.median(values) for loop, values in times.items()}

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    return {
        "network": name,
        **median,
        "masked_over_dense": ratio("masked", "dense"),
        "lightning_over_masked": ratio("lightning", "masked"),
        "lightning_share": 1 - 1 / ratio("lightning", "masked"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, batch 128")
    print(f"targets: masked/dense at most {TARGET_MASKED}, Lightning/masked at most {TARGET_LIGHTNING}\n")
    columns = "{:10} {:>10} {:>10} {:>13} {:>13} {:>17} {:>16}"
    print(
        columns.format(
            "network", "dense ms", "masked ms", "Lightning ms", "masked/dense", "Lightning/masked", "Lightning share"
        )
    )
    rows = []
    for name in NETWORKS:
        row = measure(name, options.steps, options.rounds)
        rows.append(row)
        numbers = [f"{row[key]:.2f}" for key in ("dense_ms", "masked_ms", "lightning_ms")]
        ratios = [f"{row[key]:.2f}" for key in ("masked_over_dense", "lightning_over_masked")]
        print(columns.format(name, *numbers, *ratios, f"{row['lightning_share']:.0%}"), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
