"""Torch data sets and LightningDataModules as tasks."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from supsup_lightning import GG, ContinualDataModule, DataModuleSequence, Given, SupSup
from supsup_lightning.data.datasets import labels_of
from supsup_lightning.data.images import Memory
from supsup_lightning.data.workers import Workers
from supsup_lightning.errors import ConfigurationError, DataError
from tests.conftest import fit


class Pictures(Dataset):
    """PIL images whose brightness is their label; labels are read from items unless they are `targets`."""

    def __init__(self, count=30, *, labels=(3, 7, 8), attribute=False, noisy=False):
        self.labels_of_items = [labels[number % len(labels)] for number in range(count)]
        self.noisy = noisy
        if attribute:
            self.targets = self.labels_of_items

    def __len__(self):
        return len(self.labels_of_items)

    def __getitem__(self, position):
        noise = int(torch.randint(0, 9, ())) if self.noisy else 0
        label = self.labels_of_items[position]
        pixels = np.full((6, 5, 3), noise + (20 * label if isinstance(label, int) else 0), np.uint8)
        return Image.fromarray(pixels), label


@pytest.mark.parametrize("attribute", [True, False])
def test_labels_are_found_and_numbered_from_0(attribute):
    data = ContinualDataModule.split(
        Pictures(attribute=attribute),
        Pictures(9, attribute=attribute),
        classes_per_task=3,
        class_order="fixed",
        batch_size=6,
    )
    data.setup()
    assert data.num_classes == (3,)
    assert data.input_shape == (3, 6, 5)
    images, labels = next(iter(data.test_loader(0)))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.dtype == torch.float32
    brightness = images.mean((1, 2, 3))
    assert brightness[0] < brightness[1] < brightness[2]


def test_float_images_are_taken_as_they_are_and_bytes_are_normalised():
    floats = TensorDataset(torch.rand(20, 1, 4, 4), torch.arange(20) % 2)
    data = ContinualDataModule.permuted(floats, floats, num_tasks=2, batch_size=5)
    images, _ = next(iter(data.test_loader(0)))
    assert torch.equal(images.flatten(1).sort(1).values, floats.tensors[0][:5].flatten(1).sort(1).values)
    raw = TensorDataset(torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8), torch.arange(20) % 2)
    data = ContinualDataModule.split(raw, raw, classes_per_task=2, batch_size=20)
    images, _ = next(iter(data.test_loader(0)))
    torch.testing.assert_close(images.mean().item(), 0.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(correction=0).item(), 1.0)


def test_tensors_stay_in_memory_and_items_are_asked_for_anew():
    tensors = TensorDataset(torch.rand(20, 1, 4, 4), torch.arange(20) % 2)
    assert isinstance(
        ContinualDataModule.split(tensors, tensors, classes_per_task=2).test_loader(0).images.store, Memory
    )
    noisy = Pictures(noisy=True)
    data = ContinualDataModule.split(noisy, Pictures(9), classes_per_task=3, batch_size=6, epochs_per_task=2)
    assert isinstance(data.test_loader(0).images.store, Workers)
    first, again, second = (next(iter(data.train_loader(0, epoch=epoch)))[0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)  # what a data set draws is seeded by the image and the epoch
    assert not torch.equal(first, second)
    data = ContinualDataModule.split(noisy, Pictures(9), classes_per_task=3, batch_size=6, in_memory=True)
    assert isinstance(data.train_loader(0).images.store, Memory)


def test_labels_come_through_the_wrappers_of_torch():
    pictures = Pictures(9, attribute=True)
    assert labels_of(Subset(pictures, [2, 0]), "training").tolist() == [8, 3]
    assert labels_of(ConcatDataset([pictures, Subset(pictures, [1])]), "training").tolist()[-2:] == [8, 7]
    pictures.target_transform = lambda label: label  # items may then say something else than the attribute
    pictures.labels_of_items = [label + 1 for label in pictures.labels_of_items]
    assert labels_of(pictures, "training").tolist()[:3] == [4, 8, 9]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (TensorDataset(torch.rand(4, 3)), None, r"training data set \(TensorDataset\) has no labels"),
        (TensorDataset(torch.rand(4, 3), torch.rand(4)), None, "labels of the training data set are not integers"),
        (TensorDataset(torch.rand(4, 3), torch.eye(4).long()), None, r"not integers, one per image: .*\(4,\)"),
        (Pictures(4, labels=("cat", "dog")), None, "not integers"),
        (Pictures(4, labels=(0.5, 1.5)), None, "not integers"),
        (Pictures(4, labels=(1,)), None, "Datasets has 1 class"),
        (Pictures(4, labels=(0, 1)), Pictures(4, labels=(0, 2)), "test data have the label 2, which the training"),
        (Subset(Pictures(4), []), None, "The training data set is empty"),
    ],
)
def test_labels_that_are_none_are_refused(train, test, message):
    with pytest.raises(DataError, match=message):
        ContinualDataModule.permuted(train, test or train, num_tasks=1).setup()


class Blobs(L.LightningDataModule):
    """Points around as many centres as there are classes."""

    def __init__(self, num_classes, *, seed=0, labels=None):
        super().__init__()
        self.num_classes, self.seed, self.labels = num_classes, seed, labels
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)
        draw = torch.Generator().manual_seed(self.seed)
        labels = torch.arange(120) % self.num_classes
        centres = torch.randn(self.num_classes, 8, generator=draw) * 8
        points = centres[labels] + torch.randn(120, 8, generator=draw)
        self.points = TensorDataset(points, labels if self.labels is None else self.labels(labels))

    def train_dataloader(self):
        return DataLoader(self.points, batch_size=24, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.points, batch_size=50)


class ValidatedBlobs(Blobs):
    def val_dataloader(self):
        return DataLoader(self.points, batch_size=60)


def points_network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 200, bias=False), nn.ReLU(), nn.Linear(200, 20, bias=False))


@pytest.mark.parametrize(
    "length", [{"epochs_per_task": 12}, {"steps_per_task": 60}, {}], ids=["epochs", "steps", "one pass"]
)
def test_each_data_module_is_a_task(length, tmp_path):
    modules = [Blobs(3), ValidatedBlobs(5, seed=1), Blobs(2, seed=2)]
    data = DataModuleSequence(modules, **length)
    module, trainer = fit(SupSup(points_network()), data, folder=tmp_path, scenario=GG, inference=Given())
    trainer.test(module, data, verbose=False)
    accuracy, _ = module.test_accuracy.compute()
    assert module.num_classes == (3, 5, 2)
    assert module.method.tasks.tolist() == [0, 1, 2]
    assert trainer.global_step == 3 * {"epochs_per_task": 60, "steps_per_task": 60}.get(*length or ["no"], 5)
    assert module.test_accuracy.images.tolist() == [120] * 3
    if length:
        assert accuracy.min() > 0.9
    assert all(part.calls.count("fit") == part.calls.count("test") == 1 for part in modules)


def test_training_on_a_sequence_is_reproducible(tmp_path):
    banks = []
    for _ in range(2):
        torch.manual_seed(torch.seed())
        module, _ = fit(
            SupSup(points_network()),
            DataModuleSequence([Blobs(3), Blobs(4, seed=1)], epochs_per_task=3),
            folder=tmp_path,
            scenario=GG,
            inference=Given(),
        )
        banks.append(module.method.bank.packed)
    assert torch.equal(*banks)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DataModuleSequence([]), ConfigurationError, "data.modules is empty"),
        (
            lambda: DataModuleSequence([Blobs(0)]),
            ConfigurationError,
            "num_classes=0; give data.num_classes",
        ),
        (lambda: DataModuleSequence([Blobs]), ConfigurationError, r"data.modules\[0\] is no LightningDataModule"),
        (lambda: DataModuleSequence([L.LightningDataModule()]), ConfigurationError, "defines no train_dataloader"),
        (lambda: DataModuleSequence([Blobs(3)], num_classes=[3, 4]), ConfigurationError, "has 2 numbers for 1 tasks"),
        (
            lambda: DataModuleSequence([Blobs(3)], steps_per_task=1, epochs_per_task=1),
            ConfigurationError,
            "are both given",
        ),
        (lambda: list(DataModuleSequence([Blobs(3)], num_classes=2).train_loader(0)), DataError, "labels from 0 to 2"),
        (
            lambda: list(DataModuleSequence([Blobs(3, labels=lambda y: y + 0.5)]).test_loader(0)),
            DataError,
            "labels of task 0 .* are not integers",
        ),
        (
            lambda: DataModuleSequence([Blobs(3)], input_shape=[9]).example(),
            ConfigurationError,
            r"data.input_shape=\[9\], but the inputs of task 0 have shape \[8\]",
        ),
        (lambda: DataModuleSequence([Blobs(3)]).test_loader(1), ConfigurationError, "Task 1 is not among those"),
    ],
)
def test_mistakes_in_a_sequence_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_module_that_knows_no_tasks_is_refused(tmp_path):
    class Plain(Blobs):
        num_epochs = 1

    with pytest.raises(ConfigurationError, match=r"data \(Plain\) know no tasks; give it a ContinualDataModule"):
        fit(SupSup(points_network()), Plain(3), folder=tmp_path)


def test_a_module_made_from_datasets_is_validated():
    halves = [TensorDataset(torch.rand(count, 8), torch.arange(count) % 3) for count in (12, 6, 9)]
    made = L.LightningDataModule.from_datasets(*halves, batch_size=3)
    data = DataModuleSequence([made], num_classes=3)
    assert [len(loader(0)) for loader in (data.train_loader, data.val_loader, data.test_loader)] == [4, 2, 3]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (TensorDataset(torch.zeros(4, 8, 8, dtype=torch.uint8), torch.arange(4) % 2), r"bytes must be \(channels, "),
        ([(torch.rand(1, 4 + number, 4), number % 2) for number in range(4)], r"Image 1 of .* has shape \(1, 5, 4\)"),
        (iter([]), "has no length or no positions; give a map-style Dataset"),
    ],
)
def test_images_that_make_no_batch_are_refused(dataset, message):
    data = ContinualDataModule.permuted(dataset, dataset, num_tasks=1, batch_size=4)
    with pytest.raises(DataError, match=message):
        list(data.test_loader(0))


def test_double_precision_becomes_single():
    for dataset in (
        TensorDataset(torch.rand(4, 3, dtype=torch.float64), torch.arange(4) % 2),
        [(np.random.default_rng(0).random(3), number % 2) for number in range(4)],
    ):
        data = ContinualDataModule.permuted(dataset, dataset, num_tasks=1)
        assert next(iter(data.test_loader(0)))[0].dtype == torch.float32
        assert data.input_shape == (3,)


class RandomBrightness(Pictures):
    """Draws from all three generators that a data set may use."""

    def __getitem__(self, position):
        image, label = super().__getitem__(position)
        drawn = int(torch.randint(0, 5, ())) + random.randrange(5) + int(np.random.randint(5))  # noqa: NPY002
        return Image.fromarray(np.asarray(image) // 2 + drawn), label


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_a_data_set_draws_depends_on_image_seed_and_epoch_alone(in_memory):
    batches = []
    for number, workers in enumerate((0, 2, 0)):
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        data = ContinualDataModule.split(
            RandomBrightness(),
            RandomBrightness(9),
            classes_per_task=3,
            batch_size=6,
            epochs_per_task=2,
            in_memory=in_memory,
            num_workers=workers,
        )
        loaders = [data.train_loader(0, epoch=0), data.train_loader(0, epoch=1), data.val_loader(0)]
        batches.append([torch.cat([images for images, _ in loader]) for loader in loaders])
    for other in batches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(batches[0], other, strict=True))
