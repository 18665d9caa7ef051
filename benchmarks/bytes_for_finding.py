"""What do bytes buy: sums of the gate, or stored images? Single test images, class and task both hidden.

Data split by two classes per task, all classes asked at once, so that class accuracy is that of images whose task and
class are right. On the same convolution features throughout:

sums            the gate's linear discriminant, by its number of features; bytes as in a bank file
images, LDA     so many stored images per class, one byte per pixel, on which the same discriminant is solved
images, mean    the nearest mean of a class's stored images, after the features are brought to unit variance
images, nearest the nearest stored image, likewise

    SUPSUP_DATA=<folder> python benchmarks/bytes_for_finding.py --out docs/bytes_for_finding.png

No mask has a part in it, and no image but the stored ones. Writes the picture, and prints a table.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.ticker import EngFormatter
from torch import Tensor

from supsup_lightning import ContinualDataModule, ContinualModule, Discriminant, LeNet, SupSup
from supsup_lightning.data import MNIST, FashionMNIST, Split
from supsup_lightning.gate import Gate
from supsup_lightning.gate.class_sums import ClassSums, TaskSums
from supsup_lightning.gate.linear_discriminant import LinearDiscriminant
from supsup_lightning.report import drawing

_FEATURES = (90, 225, 441, 1053, 2304)
_STORED = (1, 3, 10, 30, 100, 300, 1000)  # images per class
_TASKS = 5
_CLASSES = 2
_SOURCES = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}
Point = tuple[float, float]  # bytes, accuracy
Images = tuple[Tensor, Tensor, Tensor]  # features, labels and tasks


def main() -> None:
    """Print one line per way and size; draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=sorted(_SOURCES), default=[*_SOURCES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/bytes_for_finding.png"))
    options = parser.parse_args()
    print("| data | way | size | bytes | class accuracy |\n|---|---|---|---|---|")
    with drawing.style():
        figure = drawing.new(drawing.WIDE, 2.8)
        for axes, name in zip(figure.subplots(1, len(options.data), squeeze=False)[0], options.data, strict=True):
            curves: dict[str, list[Point]] = {}
            for way, size, held, accuracy in _measured(name, options.seed):
                print(f"| {name} | {way} | {size} | {held} | {accuracy:.4f} |", flush=True)
                curves.setdefault(way, []).append((held, accuracy))
            for (way, points), look in zip(curves.items(), drawing.LOOKS, strict=False):
                axes.plot(*zip(*points, strict=True), label=way, **look._asdict())
            axes.set(xscale="log", xlabel="bytes kept to find classes", ylabel="class accuracy", title=f"Split {name}")
            axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
            axes.legend()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, dpi=200)


def _measured(name: str, seed: int) -> Iterator[tuple[str, int, int, float]]:
    root = Path(os.environ.get("SUPSUP_DATA", "data"))
    data = ContinualDataModule(Split(_SOURCES[name](), classes_per_task=_CLASSES, class_order="fixed"), root=root)
    data.setup()
    for number in _FEATURES:
        gate, train, test = _features(data, number, seed)
        sums = _sums(train)
        gate.sums.merge(sums)
        held = sum(value.nbytes for value in gate.kept().values())
        yield "sums", number, held, _accuracy(sums.rounded(), test)
    features, labels, tasks = train
    deviation = (sums.scatter(0).diagonal() / len(labels)).sqrt().float().clamp(min=1e-6)
    pixels = data.example()[0].numel()
    for count in _STORED:
        stored = torch.cat([_first(labels, tasks, task, label, count) for task in range(_TASKS) for label in range(2)])
        own = (features[stored], labels[stored], tasks[stored])
        held = len(stored) * pixels
        yield "images, LDA", count, held, _accuracy(_sums(own), test)
        scaled, asked = own[0] / deviation, test[0] / deviation
        yield "images, nearest", count, held, _right(_nearest(asked, scaled), own, test)
        means = torch.stack(
            [scaled[(own[2] == t) & (own[1] == label)].mean(0) for t in range(_TASKS) for label in range(2)]
        )
        named = (means, torch.arange(2).repeat(_TASKS), torch.arange(_TASKS).repeat_interleave(2))
        yield "images, mean", count, held, _right(_nearest(asked, means), named, test)


def _features(data: ContinualDataModule, number: int, seed: int) -> tuple[Gate, Images, Images]:
    method = SupSup(LeNet(output_size=10), seed=seed)
    gate = ContinualModule(method, inference=Discriminant("convolution", num_features=number)).method.gate
    assert gate is not None
    gate.choose_features(method, data.example(), keeps_neighbours=True)
    gate.prepare(data.each_image(0, half="training"))
    halves = []
    for loaders in (
        [data.each_image(task, half="training") for task in range(_TASKS)],
        [data.test_loader(task) for task in range(_TASKS)],
    ):
        parts = [
            (gate.features(method, images), labels, torch.full_like(labels, task))
            for task, loader in enumerate(loaders)
            for images, labels in loader
        ]
        halves.append(tuple(torch.cat(column) for column in zip(*parts, strict=True)))
    return gate, halves[0], halves[1]  # type: ignore[return-value]


def _sums(images: Images) -> ClassSums:
    features, labels, tasks = images
    sums = ClassSums()
    for task in range(_TASKS):
        own = TaskSums.of([(features[tasks == task], labels[tasks == task])], num_labels=_CLASSES)
        assert own is not None
        sums.add(task, own)
    return sums


def _accuracy(sums: ClassSums, test: Images) -> float:
    discriminant = LinearDiscriminant(sums, torch.arange(_TASKS), regularisation="auto")
    found = torch.cat([discriminant.log_posterior(part).argmax(1) for part in test[0].split(2000)])
    return _right(found, (test[0], discriminant.labels, discriminant.places), test)


def _right(found: Tensor, named: Images, test: Images) -> float:
    """Share of test images whose found row of ``named`` has their label and their task."""
    _, labels, tasks = named
    return float(((labels[found] == test[1]) & (tasks[found] == test[2])).float().mean())


def _nearest(asked: Tensor, known: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, known).argmin(1) for part in asked.split(500)])


def _first(labels: Tensor, tasks: Tensor, task: int, label: int, count: int) -> Tensor:
    """Places of the first images of a class; their order is random."""
    return ((tasks == task) & (labels == label)).nonzero().flatten()[:count]


if __name__ == "__main__":
    main()
