"""How surely do images recover a mask of SplitMNIST from a Hopfield memory, and how sure is it? (docs/hopfield.md)

    SUPSUP_DATA=<folder with MNIST/raw> python benchmarks/hopfield_recovery.py [--seeds 0 1 2] [--batches 4]

Trains the five tasks of conf/experiment/split_mnist_hopfield.yaml for each seed, and then prints two tables. The first:
for several descents and numbers of images, the share of test batches that end at their task's mask without a unit that
differs, after how many steps they are there to stay, and the milliseconds that a recovery takes. The second: the
confidence for test batches of the five tasks, and for images of none or of several.
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from time import perf_counter

import lightning as L
import torch
from torch import Tensor

from supsup_lightning import GNS, ContinualDataModule, ContinualModule, HopfieldRecovery, HopNet, HopSupSup
from supsup_lightning.bank.hopfield_memory import PUBLISHED, Descent
from supsup_lightning.data import MNIST, FashionMNIST, Split
from supsup_lightning.report.metrics import RecoveryStatistics

DESCENTS = {
    "projected, step 0.1": Descent(step_size=0.1),
    "projected, step 0.2": Descent(step_size=0.2),
    "projected, step 0.4 (default)": Descent(),
    "projected, step 0.8": Descent(step_size=0.8),
    "projected, step 1.6": Descent(step_size=1.6),
    "published, step 500 / 4": replace(PUBLISHED, step_size=PUBLISHED.step_size / 4),
    "published, step 500": PUBLISHED,
    "published, step 500 x 4": replace(PUBLISHED, step_size=PUBLISHED.step_size * 4),
}
CLASSES = 10


def split_mnist(seed: int, source=MNIST) -> ContinualDataModule:
    stream = Split(source(), classes_per_task=2, relabel=False)
    data = ContinualDataModule(stream, root=os.environ.get("SUPSUP_DATA", "data"), epochs_per_task=1, seed=seed)
    data.prepare_data()
    data.setup()
    return data


def train(data: ContinualDataModule, seed: int) -> HopSupSup:
    method = HopSupSup(HopNet(output_size=CLASSES), seed=seed)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
    module = ContinualModule(method, scenario=GNS, inference=HopfieldRecovery(), optimizer=optimizer)
    callbacks = [callback for callback in module.task_callbacks(data) if "Evaluate" not in type(callback).__name__]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=data.num_epochs,
        reload_dataloaders_every_n_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    return method.eval()


def batches(data: ContinualDataModule, task: int, count: int) -> list[Tensor]:
    return [images for images, _ in list(data.test_loader(task))[:count]]


def recovered(descent: Descent, runs: list[tuple[ContinualDataModule, HopSupSup]], *, images: int, count: int) -> str:
    inference, statistics, started = HopfieldRecovery(descent=descent), RecoveryStatistics(), perf_counter()
    for data, method in runs:
        masks = method.reference_masks()
        for task in range(len(masks)):
            for batch in batches(data, task, count):
                found = inference.recover(method, batch[:images], CLASSES)
                distances = found.recovery.distances(masks)[:, task]
                statistics.update(distances, confidence=found.confidence)
    took = 1000 * (perf_counter() - started) / int(statistics.batches)
    result = statistics.compute()
    steps = "" if result["steps_mean"] is None else f"{result['steps_mean']:.1f}, {result['steps_max']}"
    return f"{result['recovered']:.3f} | {steps} | {took:.0f}"


def confidences(runs: list[tuple[ContinualDataModule, HopSupSup]], count: int) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    inference = HopfieldRecovery()
    draw = torch.Generator().manual_seed(0)
    for data, method in runs:
        fashion = split_mnist(data.seed, FashionMNIST)
        tasks = [batches(data, task, count) for task in range(data.num_tasks)]
        asked = [("digits of a task", batch) for own in tasks for batch in own]
        asked += [
            ("half of one task, half of another", torch.cat([a[:64], b[:64]])) for a, b in zip(*tasks[:2], strict=True)
        ]
        asked += [
            ("digits of all tasks", torch.cat([batch[:25] for batch in together]))
            for together in zip(*tasks, strict=True)
        ]
        asked += [("clothes (FashionMNIST)", batch) for task in range(5) for batch in batches(fashion, task, count)]
        asked += [("noise", torch.randn(128, 1, 28, 28, generator=draw)) for _ in range(count)]
        for name, batch in asked:
            values.setdefault(name, []).append(inference.recover(method, batch, CLASSES).confidence)
        # Digits of the last task, before it was learned.
        before = HopSupSup(HopNet(output_size=CLASSES), seed=data.seed).eval()
        for mask in method.reference_masks()[:-1]:
            before.memory.store(2.0 * mask - 1)
        for batch in tasks[-1]:
            found = inference.recover(before, batch, CLASSES).confidence
            values.setdefault("digits of a task to come", []).append(found)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=4, help="test batches of each task")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        data = split_mnist(seed)
        runs.append((data, train(data, seed)))
    print("| descent | images | recovered | steps, mean and most | ms |")
    print("|---|---|---|---|---|")
    for name, descent in DESCENTS.items():
        print(f"| {name} | 128 | {recovered(descent, runs, images=128, count=options.batches)} |", flush=True)
    for images in (64, 32, 16, 8):
        print(
            f"| projected, step 0.4 | {images} | {recovered(Descent(), runs, images=images, count=options.batches)} |"
        )
    print("\n| images | confidence, least | mean | most |")
    print("|---|---|---|---|")
    for name, found in confidences(runs, options.batches).items():
        print(f"| {name} | {min(found):.2f} | {sum(found) / len(found):.2f} | {max(found):.2f} |")


if __name__ == "__main__":
    main()
