"""What a mask costs: one masked training step against the plain dense step; what Lightning's loop adds to it, and how
that and the rest are shared by tasks that are trained at once.

    python benchmarks/train_step.py [--rounds 3] [--json results.json]

Batches of 128 random images (only time is measured), the same optimizer, images laid out alike. `measure`: milliseconds
of a dense and of a masked step, both as they are and compiled, and of a masked one through `Trainer.fit` (a whole task
over its steps: data, validation, boundary and checkpoint included). `measure_at_once`: milliseconds per step and task
through `Trainer.fit` for several tasks at once. All are timed in turns in one run and the median is taken, so that a
noisy machine disturbs all of them alike.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from supsup_lightning import ContinualDataModule, ContinualModule, FullyConnected, GEMResNet18, LeNet, SupSup
from supsup_lightning.callbacks import LossGuard, TaskBoundary
from supsup_lightning.module import default_optimizer
from supsup_lightning.schedules import cosine

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # network, images, steps to time
    "LeNet": (lambda: LeNet(output_size=100), GREY, 300),
    "FC 1024": (lambda: FullyConnected(output_size=500), GREY, 100),
    "ResNet-18": (lambda: GEMResNet18(output_size=20, input_shape=COLOUR), COLOUR, 8),
}
ACCELERATOR = "gpu" if torch.cuda.is_available() else "cpu"  # of `measure_at_once`; the other loops are a CPU's
AT_ONCE = (1, 8, 64, 256) if ACCELERATOR == "gpu" else (1, 2, 4, 8, 16, 32)


def make_data(shape: tuple[int, ...], steps: int, *, num_tasks: int = 1, tasks_at_once: int = 1) -> ContinualDataModule:
    """Noise."""
    draw = torch.Generator().manual_seed(0)

    def images(count: int) -> TensorDataset:
        pixels = torch.randint(0, 256, (count, *shape), generator=draw, dtype=torch.uint8)
        return TensorDataset(pixels, torch.randint(0, 10, (count,), generator=draw))

    data = ContinualDataModule.permuted(
        images(60_000 if shape == GREY else 5_000),
        images(1_000),
        num_tasks=num_tasks,
        steps_per_task=steps,
        tasks_at_once=tasks_at_once,
    )
    data.setup()
    return data


def bare_loop(parameters, forward, data: ContinualDataModule) -> float:
    """Milliseconds per step of the plainest loop over the same batches, with the same optimizer and schedule."""
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


def masked_loop(method: SupSup, data: ContinualDataModule) -> float:
    method.begin_task(0)
    milliseconds = bare_loop(method.trainable(), lambda images: method(images, 0), data)
    method.finish_task(0)
    method.bank.remove(0)
    return milliseconds


class FitClock(L.Callback):
    """Seconds from the start of training to its end: batches, validation, task boundaries, checkpoints."""

    def on_train_start(self, trainer, pl_module):
        self.started = perf_counter()

    def on_train_end(self, trainer, pl_module):
        self.seconds = perf_counter() - self.started


def lightning_loop(method: SupSup, data: ContinualDataModule, accelerator: str = "cpu") -> float:
    """Milliseconds per step and task of whole tasks in `Trainer.fit`, all of a run but evaluations of old tasks."""
    module = ContinualModule(method)
    module.plan_training(data, accelerator=accelerator)
    clock = FitClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
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


def in_turns(loops: dict[str, Callable[[int], float]], steps: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per round of each loop, given a number of steps; one short round warms up."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            milliseconds = loop(steps if number else 2)
            if number:
                times[name].append(milliseconds)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """The median over rounds."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def measure(name: str, rounds: int) -> dict[str, float | str]:
    """Dense, masked, compiled and through Lightning."""
    network, shape, steps = NETWORKS[name]
    dense, masked, compiled = network(), SupSup(network()), SupSup(network(), compile=True)
    dense_compiled = torch.compile(network())
    times = in_turns(
        {
            "dense": lambda steps: bare_loop(
                dense.parameters(), lambda images: dense(masked.base.laid_out(images)), make_data(shape, steps)
            ),
            "masked": lambda steps: masked_loop(masked, make_data(shape, steps)),
            "dense compiled": lambda steps: bare_loop(
                dense_compiled.parameters(),
                lambda images: dense_compiled(masked.base.laid_out(images)),
                make_data(shape, steps),
            ),
            "masked compiled": lambda steps: masked_loop(compiled, make_data(shape, steps)),
            "lightning": lambda steps: lightning_loop(SupSup(network()), make_data(shape, steps)),
        },
        steps,
        rounds,
    )
    return {
        "network": name,
        **{f"{loop}_ms": statistics.median(values) for loop, values in times.items()},
        "masked_over_dense": ratio(times, "masked", "dense"),
        "compiled_over_compiled_dense": ratio(times, "masked compiled", "dense compiled"),
        "lightning_over_masked": ratio(times, "lightning", "masked"),
    }


def measure_at_once(rounds: int, steps: int = 100) -> list[dict[str, float]]:
    """LeNet through Lightning, several tasks at once; each round trains the same number of tasks in all."""
    num_tasks = max(AT_ONCE)
    loops = {
        str(count): lambda steps, count=count: lightning_loop(
            SupSup(LeNet(output_size=100)),
            make_data(GREY, steps, num_tasks=num_tasks if steps > 2 else count, tasks_at_once=count),
            ACCELERATOR,
        )
        for count in AT_ONCE
    }
    times = in_turns(loops, steps, rounds)
    return [
        {
            "tasks_at_once": count,
            "ms_per_step_and_task": statistics.median(times[str(count)]),
            "times_as_fast": ratio(times, "1", str(count)),
        }
        for count in AT_ONCE
    ]


def quiet() -> None:
    """No words but the figures."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    quiet()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, batch 128")
    rows = []
    for name in NETWORKS:
        rows.append(measure(name, options.rounds))
        print("  ".join(f"{key} {v:.2f}" if isinstance(v, float) else v for key, v in rows[-1].items()), flush=True)
    at_once = measure_at_once(options.rounds)
    for row in at_once:
        print("  ".join(f"{key} {value:.2f}".removesuffix(".00") for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps({"steps": rows, "at_once": at_once}, indent=2) + "\n")


if __name__ == "__main__":
    main()
