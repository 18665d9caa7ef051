"""What the discriminant costs beside gradients: finding the tasks of a batch of 128 images, by the number of tasks.

LeNet 300-100 on images of 28 x 28 pixels with random masks, and sums of random images of ten classes per task over
projected features: time does not depend on what they hold. Milliseconds to find a task for every image by: the
discriminant; one gradient for all images together, which gives them one task; one gradient per image; every mask tried.
Also the seconds to solve the discriminant once, after its tasks have changed.

    python benchmarks/discriminant.py --tasks 10 50 250 2500
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch

from supsup_lightning import ContinualModule, Discriminant, Exhaustive, LeNet, OneShot, SupSup
from supsup_lightning.gate.class_sums import TaskSums

_CLASSES = 10
_IMAGES = 128
_PER_TASK = 300  # images in the sums


def main() -> None:
    """Print one line per number of tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 50, 250, 2500])
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("| tasks | discriminant | one gradient | one per image | every mask | solving, s | sums in memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for number in options.tasks:
        print(_line(number, options), flush=True)


def _line(number: int, options: argparse.Namespace) -> str:
    method = SupSup(LeNet(output_size=100))
    module = ContinualModule(method, inference=Discriminant("projection", num_features=options.features))
    gate = method.gate
    assert gate is not None
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, 1, 28, 28, generator=draw)
    gate.choose_features(method, images, keeps_neighbours=False)
    labels = torch.arange(_PER_TASK) % _CLASSES
    for task in range(number):
        method.begin_task(task)
        method.finish_task(task)
        features = torch.randn(_PER_TASK, options.features, generator=draw)
        sums = TaskSums.of([(features, labels)], num_labels=_CLASSES)
        assert sums is not None
        gate.sums.add(task, sums)
    started = perf_counter()
    gate.discriminant(method.tasks)
    solving = perf_counter() - started
    ways = (module.inference, OneShot(images="batch"), OneShot(images="each"), Exhaustive(images="each"))
    times = [_milliseconds(partial(way, method, images, _CLASSES), options.rounds) for way in ways]
    held = sum(value.nbytes for value in gate.sums.state_dict().values()) / 1e6
    return f"| {number} | {' | '.join(f'{time:.1f}' for time in times)} | {solving:.2f} | {held:.1f} |"


def _milliseconds(find: Callable[[], object], rounds: int) -> float:
    """Median, after one round to warm up."""
    times = []
    for _ in range(rounds + 1):
        started = perf_counter()
        find()
        times.append(1000 * (perf_counter() - started))
    return median(times[1:])


if __name__ == "__main__":
    main()
