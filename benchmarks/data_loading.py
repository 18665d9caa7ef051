"""Images per second of each way in which data are served, beside a plain torchvision DataLoader that does the same.

    SUPSUP_DATA=<folder> python benchmarks/data_loading.py --tree <folder with train and val>

Both sides are timed in turns in one run, each over the same number of images; the median of their rounds counts.
Needs MNIST/raw and cifar-100-python in $SUPSUP_DATA; the tree of images may be any of photographs.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from supsup_lightning import ContinualDataModule
from supsup_lightning.data import CIFAR100, MNIST, ImageFolder, Whole

BATCH = 128
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="folder with train and val, each with one folder per class")
    parser.add_argument("--size", type=int, default=64, help="height and width that the tree's images are brought to")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    root = Path(os.environ["SUPSUP_DATA"])
    print(f"{'images per second':<44}{'ours':>12}{'DataLoader':>12}{'ratio':>8}")
    for name, images, ours, plain in paths(root, arguments):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for side, batches in zip(times, (ours, plain), strict=True):
                side.append(seconds(batches, images))
        rates = [images / median(side) for side in times]
        print(f"{name:<44}{rates[0]:>12,.0f}{rates[1]:>12,.0f}{rates[0] / rates[1]:>8.1f}", flush=True)


def paths(root: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, int, Callable, Callable]]:
    """Name, number of images, our batches, and those of a plain DataLoader."""
    workers = arguments.workers

    def plain(dataset: torch.utils.data.Dataset, batch_size: int = BATCH) -> DataLoader:
        options = {"num_workers": workers, "persistent_workers": True, "drop_last": True}
        return DataLoader(dataset, batch_size=batch_size, shuffle=True, **options)

    def scaled(*transforms: v2.Transform, mean: list[float], std: list[float]) -> v2.Compose:
        return v2.Compose([*transforms, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    data = ContinualDataModule(Whole(MNIST()), root=root, epochs_per_task=1)
    mnist = plain(datasets.MNIST(root, transform=scaled(mean=[0.1307], std=[0.3081])))
    yield "MNIST in memory", 20_000, lambda: data.train_loader(0), lambda: mnist

    colour = {"mean": [0.5071, 0.4865, 0.4409], "std": [0.2673, 0.2564, 0.2762]}
    crops = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    augmented = ContinualDataModule(Whole(CIFAR100()), root=root, epochs_per_task=1, augment="crop_flip")
    cifar = plain(datasets.CIFAR100(root, transform=scaled(*crops, **colour)))
    yield "CIFAR-100 in memory, crop and flip", 20_000, lambda: augmented.train_loader(0), lambda: cifar

    if arguments.tree is None:
        return
    shape = (3, arguments.size, arguments.size)
    options = {"root": arguments.tree, "input_shape": shape, "epochs_per_task": 1, "num_workers": workers}
    files = ContinualDataModule(Whole(ImageFolder()), in_memory=False, augment="resized_crop", **options)
    crops = [v2.RandomResizedCrop(arguments.size, antialias=True), v2.RandomHorizontalFlip()]
    tree = plain(datasets.ImageFolder(arguments.tree / "train", transform=scaled(*crops, **colour)))
    name = f"files, random crops of {arguments.size}, {workers} workers"
    yield name, 5_000, lambda: files.train_loader(0), lambda: tree
    memory = ContinualDataModule(Whole(ImageFolder()), in_memory=True, augment="crop_flip", **options)
    yield "the same files in memory, crop and flip", 5_000, lambda: memory.train_loader(0), lambda: tree


def seconds(batches: Callable[[], Iterable], images: int) -> float:
    """To get so many images, the first batch, which starts workers and reads files, not counted."""
    iterator = iter(batches())
    next(iterator)
    started, seen = perf_counter(), 0
    while seen < images:
        seen += len(next(iterator)[0])
    return perf_counter() - started


if __name__ == "__main__":
    main()
