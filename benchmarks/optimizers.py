"""Which optimizer makes masks that are accurate and still told apart by one gradient? (docs/optimizers.md)

    SUPSUP_DATA=<folder with MNIST/raw> python benchmarks/optimizers.py [--tasks 10] [--steps 1000] [--only adam]

Trains PermutedMNIST tasks with LeNet, output_size 100, once for each optimizer below, each with a cosine schedule
unless it says constant. Prints, on validation images alone: accuracy with the task given; and the share of images
that find their task among all, each image by itself, by the one-shot gradient of G (superfluous) and H (entropy).
"""

import argparse
import os
from time import perf_counter

import torch
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, RMSprop

from supsup_lightning import LeNet, OneShot, PermutedMNIST, SupSup
from supsup_lightning.schedules import constant, cosine

OPTIMIZERS = {
    "rmsprop 1e-4 constant (paper)": (lambda p: RMSprop(p, lr=1e-4), constant),
    "rmsprop 1e-3": (lambda p: RMSprop(p, lr=1e-3), cosine),
    "adam 5e-4": (lambda p: Adam(p, lr=5e-4), cosine),
    "adam 1e-3": (lambda p: Adam(p, lr=1e-3), cosine),
    "adam 1e-3, betas 0.9 0.99": (lambda p: Adam(p, lr=1e-3, betas=(0.9, 0.99)), cosine),
    "adam 2e-3": (lambda p: Adam(p, lr=2e-3), cosine),
    "sgd 0.5 nesterov 0.9": (lambda p: SGD(p, lr=0.5, momentum=0.9, nesterov=True), cosine),
    "sgd 2 nesterov 0.9": (lambda p: SGD(p, lr=2.0, momentum=0.9, nesterov=True), cosine),
}
IMAGES = 256  # of each task find their task one by one


def measure(make_optimizer, make_schedule, data: PermutedMNIST) -> tuple[float, dict[str, float]]:
    method = SupSup(LeNet(output_size=100))
    for task in range(data.num_tasks):
        method.begin_task(task)
        optimizer = make_optimizer(method.trainable())
        schedule = make_schedule(optimizer, data.steps_per_task)
        for images, labels in data.train_loader(task):
            loss = cross_entropy(method(images, task), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        method.finish_task(task)
    accuracy, found = [], {"superfluous": [], "entropy": []}
    with torch.no_grad():
        for task in range(data.num_tasks):
            images, labels = next(iter(data.val_loader(task)))
            accuracy.append((method(images, task)[:, :10].argmax(1) == labels).float().mean())
            for objective, shares in found.items():
                tasks = OneShot(objective, images="each")(method, images[:IMAGES], max(data.num_classes))
                shares.append((tasks == task).float().mean())
    return torch.stack(accuracy).mean().item(), {name: torch.stack(v).mean().item() for name, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", default="", help="only optimizers whose name contains this")
    options = parser.parse_args()
    data = PermutedMNIST(
        root=os.environ.get("SUPSUP_DATA", "data"), num_tasks=options.tasks, steps_per_task=options.steps
    )
    data.prepare_data()
    data.setup()
    print(f"| {'optimizer':30} | accuracy, task given | task found, G | task found, H | s per task |")
    print("|---|---|---|---|---|")
    for name, (make_optimizer, make_schedule) in OPTIMIZERS.items():
        if options.only in name:
            started = perf_counter()
            accuracy, found = measure(make_optimizer, make_schedule, data)
            seconds = (perf_counter() - started) / options.tasks
            print(
                f"| {name:30} | {accuracy:.4f} | {found['superfluous']:.4f} | {found['entropy']:.4f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
