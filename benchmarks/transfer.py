"""How many steps until a task is learned, by where its scores start (`mask.init`)? (docs/methods.md)

    SUPSUP_DATA=<folder with MNIST/raw> python benchmarks/transfer.py rotated_mnist
    SUPSUP_DATA=<folder with cifar-100-python> python benchmarks/transfer.py split_cifar100

Trains the tasks in turn with each choice, and asks for the accuracy on a task's validation images every few steps.
Prints, as means over all tasks but the first: steps until the accuracy that is given is reached (a task that never
reaches it counts with all of its steps), accuracy after few steps, and at the end.
"""

import argparse
import os
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from supsup_lightning import ContinualDataModule, GEMResNet18, LeNet, OneShot, SupSup
from supsup_lightning.data import CIFAR100, MNIST, Rotated, Split
from supsup_lightning.methods.starting_scores import CHOICES
from supsup_lightning.schedules import cosine


class Setting(NamedTuple):
    """What is learned."""

    data: ContinualDataModule
    network: nn.Module
    mask: dict
    steps: int
    every: int  # steps from one measurement to the next
    reach: float  # accuracy


def setting(name: str, num_tasks: int) -> Setting:
    root = os.environ.get("SUPSUP_DATA", "data")
    if name == "rotated_mnist":
        data = ContinualDataModule(Rotated(MNIST(), degrees=10), num_tasks=num_tasks, root=root, steps_per_task=500)
        return Setting(data, LeNet(output_size=10), {}, 500, 10, 0.93)
    stream = Split(CIFAR100(), classes_per_task=5)
    data = ContinualDataModule(
        stream, num_tasks=num_tasks, root=root, steps_per_task=180, augment="crop_flip", validation_share=0.2
    )
    mask = {"rule": "topk", "allocation": "erdos_renyi", "budget": 32}
    return Setting(data, GEMResNet18(output_size=5, base_channels=8), mask, 180, 10, 0.6)


@torch.no_grad()
def accuracy(method: SupSup, data: ContinualDataModule, task: int) -> float:
    method.eval()
    right = count = 0
    for images, labels in data.val_loader(task):
        right += (method(images, task).argmax(1) == labels).sum().item()
        count += len(labels)
    method.train()
    return right / count


def curves(init: str, of: Setting) -> list[list[float]]:
    """Accuracy of each task after every few steps."""
    method = SupSup(of.network, init=init, **of.mask)
    found = []
    for task in range(of.data.num_tasks):
        method.begin_task(task)
        if init == "nearest" and task:
            images, _ = next(iter(of.data.train_loader(task)))
            with torch.no_grad():
                method.start_like(int(OneShot("entropy", images="batch")(method, images, 10)[0]))
        optimizer = Adam(method.trainable(), lr=1e-3, betas=(0.9, 0.99))
        schedule = cosine(optimizer, of.steps)
        curve = []
        for step, (images, labels) in enumerate(of.data.train_loader(task)):
            if step % of.every == 0:
                curve.append(accuracy(method, of.data, task))
            loss = cross_entropy(method(images, task), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found.append([*curve, accuracy(method, of.data, task)])
        method.finish_task(task)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("rotated_mnist", "split_cifar100"))
    parser.add_argument("--tasks", type=int, default=6)
    options = parser.parse_args()
    of = setting(options.data, options.tasks)
    of.data.prepare_data()
    of.data.setup()
    few = 5 * of.every
    print(f"| mask.init | steps to {of.reach} | accuracy at 0 | after {few} steps | after {of.steps} |")
    print("|---|---|---|---|---|")
    for init in CHOICES:
        later = curves(init, of)[1:]
        reached = [next((i * of.every for i, a in enumerate(curve) if a >= of.reach), of.steps) for curve in later]
        means = [sum(curve[place] for curve in later) / len(later) for place in (0, 5, -1)]
        print(f"| {init} | {sum(reached) / len(reached):.0f} | {' | '.join(f'{m:.3f}' for m in means)} |", flush=True)


if __name__ == "__main__":
    main()
