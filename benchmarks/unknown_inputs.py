"""Does the gate tell inputs of no task from its own? AUROC, and the share refused where about 95 % of its own pass.

A bank of five tasks of two classes is learned (sums alone: masks have no part in it). Its test images are known; those
of other data sets, brought to the same mean and deviation, are unknown. Control: the largest posterior of a class.

    SUPSUP_DATA=<folder> python benchmarks/unknown_inputs.py
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from supsup_lightning import ContinualDataModule, ContinualModule, Discriminant, LeNet, SupSup
from supsup_lightning.data import MNIST, FashionMNIST, Split
from supsup_lightning.data.idx import read_idx

_FOREIGN = ("MNIST", "FashionMNIST", "KMNIST", "notMNIST")


def main() -> None:
    """Print one line per pair of data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=2304)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root = Path(os.environ.get("SUPSUP_DATA", "data"))
    print("| bank | inputs | AUROC by distance | by relative distance | by posterior | refused | refused, relative |")
    print("|---|---|---|---|---|---|---|")
    for source in (MNIST(), FashionMNIST()):
        known = type(source).__name__
        data = ContinualDataModule(Split(source, classes_per_task=2, class_order="fixed"), root=root, seed=options.seed)
        module = _learned(data, options)
        tested = [_judged(module, torch.cat([images for images, _ in data.test_loader(task)])) for task in range(5)]
        own = tuple(torch.cat(parts) for parts in zip(*tested, strict=True))
        print(f"| {known} | its own | | | | {own[3].mean():.4f} | {own[4].mean():.4f} |")
        draw = torch.Generator().manual_seed(options.seed)
        foreign = {name: _raw(root, name) for name in _FOREIGN if name != known}
        foreign["noise"] = torch.randint(0, 256, (2000, 1, 28, 28), generator=draw, dtype=torch.uint8)
        prepare = data._task(0).test.prepare
        for name, pixels in foreign.items():
            if pixels is None:
                print(f"| {known} | {name} | not in {root.name}/ | | |")
                continue
            other = _judged(module, prepare(pixels))
            areas = [_area(own[column], other[column]) for column in (0, 1, 2)]
            shown = [f"{value:.4f}" for value in (*areas, other[3].mean(), other[4].mean())]
            print(f"| {known} | {name} | {' | '.join(shown)} |", flush=True)


def _learned(data: ContinualDataModule, options: argparse.Namespace) -> ContinualModule:
    data.setup()
    inference = Discriminant("convolution", num_features=options.features, unknown=0.05)
    module = ContinualModule(SupSup(LeNet(output_size=10), seed=options.seed), inference=inference)
    gate, method = module.method.gate, module.method
    assert gate is not None
    gate.choose_features(method, data.example(), keeps_neighbours=True)
    gate.prepare(data.each_image(0, half="training"))
    for task in range(5):
        method.begin_task(task)
        method.finish_task(task)
        gate.learn(method, task, data.each_image(task, half="training"), num_classes=2)
        gate.judge(method, task, data.each_image(task, half="validation"), num_classes=2, relative=True)
    return module


def _judged(module: ContinualModule, images: Tensor) -> tuple[Tensor, ...]:
    """Distance from the nearest class, the relative one, 1 minus the largest posterior, and whether it is refused by
    distance and by relative distance; ``(batch,)`` each.
    """
    gate, method = module.method.gate, module.method
    assert gate is not None
    discriminant, parts = gate.discriminant(method.tasks), []
    limits = [gate.furthest(method.tasks, refused=0.05, relative=each) for each in (False, True)]
    for batch in images.split(1000):
        features = gate.features(method, batch)
        log_posterior = discriminant.log_posterior(features)
        places = discriminant.of_tasks(log_posterior).argmax(1)
        distances = [each(features).amin(1) for each in (discriminant.distances, discriminant.relative_distances)]
        doubt = 1 - log_posterior.exp().amax(1)
        refused = [(far > limit[places]).float() for far, limit in zip(distances, limits, strict=True)]
        parts.append((*distances, doubt, *refused))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _area(known: Tensor, unknown: Tensor) -> float:
    scores = torch.cat([known, unknown]).double()
    ranks = scores.argsort().argsort() / len(scores)  # `binary_auroc` takes what is outside of [0, 1] for logits
    truth = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))]).long()
    return binary_auroc(ranks, truth).item()


def _raw(root: Path, name: str) -> Tensor | None:
    """Test images, ``(images, 1, 28, 28)`` uint8."""
    path = root / name / "raw" / "t10k-images-idx3-ubyte"
    return read_idx(path, dimensions=3).unsqueeze(1) if path.exists() else None


if __name__ == "__main__":
    main()
