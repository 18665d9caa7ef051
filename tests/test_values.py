"""NaN and infinite values are found and named, wherever they are."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from supsup_lightning import GG, ContinualDataModule, Given, SupSup
from supsup_lightning.data.values import Watch, check_numbers
from supsup_lightning.errors import ConfigurationError, DataError, TrainingDiverged
from tests.conftest import fit

LABELS = torch.arange(200) % 2
IMAGES = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + LABELS.view(-1, 1, 1, 1) * 3


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))


def with_value(place: int, value: float) -> TensorDataset:
    images = IMAGES.clone()
    images[place, 0, 1, 2] = value
    return TensorDataset(images, LABELS)


class Items(Dataset):
    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, position):
        return self.tensors[position]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_in_memory_it_is_found_before_training(value):
    good = TensorDataset(IMAGES, LABELS)
    for half, halves in {"training": (with_value(150, value), good), "test": (good, with_value(150, value))}.items():
        data = ContinualDataModule.permuted(*halves, num_tasks=2, steps_per_task=2, batch_size=32)
        with pytest.raises(DataError, match=rf"Image 150 of the {half} data has the value {value} at \[0, 1, 2\]"):
            data.setup()


def test_one_class_of_nan_has_no_accuracy(tmp_path):
    images = IMAGES.clone()
    images[LABELS == 0] = torch.nan
    halves = TensorDataset(IMAGES, LABELS), TensorDataset(images, LABELS)
    data = ContinualDataModule.permuted(*halves, num_tasks=1, steps_per_task=2, batch_size=32)
    with pytest.raises(DataError, match="Image 0 of the test data .* and 99 of the next 200"):
        fit(SupSup(network()), data, folder=tmp_path, scenario=GG, inference=Given())


@pytest.mark.parametrize("workers", [0, 2])
def test_item_by_item_it_is_found_where_it_is_read(workers):
    bad = Items(with_value(151, torch.nan))
    data = ContinualDataModule.split(bad, bad, classes_per_task=2, steps_per_task=20, num_workers=workers)
    for loader in (data.train_loader(0), data.test_loader(0)):
        with pytest.raises(DataError, match=r"Image 151 of the (training|test) data set has the value nan"):
            list(loader)


def test_what_an_augmentation_makes_is_looked_at(tmp_path):
    tensors = TensorDataset(IMAGES, LABELS)
    data = ContinualDataModule.permuted(
        tensors, tensors, num_tasks=1, batch_size=32, steps_per_task=3, augment=lambda pixels, _: pixels / 0
    )
    with pytest.raises(DataError, match="of the training images of task 0 has the value .*inf"):
        fit(SupSup(network()), data, folder=tmp_path, scenario=GG, inference=Given())


def test_the_loss_guard_tells_data_from_learning_rates(tmp_path, monkeypatch):
    tensors = TensorDataset(IMAGES, LABELS)
    data = ContinualDataModule.permuted(tensors, tensors, num_tasks=1, batch_size=32, steps_per_task=8)
    with pytest.raises(TrainingDiverged, match="at its step .*, from images without NaN.*Lower the learning rate"):
        fit(
            SupSup(network()),
            data,
            folder=tmp_path,
            scenario=GG,
            inference=Given(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=float("inf")),
        )
    monkeypatch.setattr(Watch, "look", lambda *_: None)  # as on an accelerator, until the end of the pass
    data.augment = lambda pixels, draws: pixels * torch.nan
    with pytest.raises(DataError, match="The images of the batch in task 0 at its step 0 hold a NaN"):
        fit(SupSup(network()), data, folder=tmp_path, scenario=GG, inference=Given())


def test_what_is_large_is_a_number():
    check_numbers(torch.full((3, 4), 3e38), "Image {}".format)
    with pytest.raises(DataError, match=r"Image 1 has the value inf at \[0\]"):
        check_numbers(torch.tensor([[3e38], [torch.inf], [-torch.inf]]), "Image {}".format)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (8, 8, 3)])
def test_what_has_no_height_and_width_is_neither_turned_nor_cropped(shape):
    tensors = TensorDataset(torch.rand(20, *shape), torch.arange(20) % 2)
    for make in (
        lambda: ContinualDataModule.rotated(tensors, tensors, degrees=90),
        lambda: ContinualDataModule.permuted(tensors, tensors, num_tasks=1, augment="crop_flip"),
        lambda: ContinualDataModule.permuted(tensors, tensors, num_tasks=1, input_shape=(1, 4, 4), resize=True),
    ):
        with pytest.raises(ConfigurationError, match=r"needs images of shape \(channels, height, width\), and these"):
            make().setup()


def test_a_second_try_looks_again():
    bad = with_value(3, torch.nan)
    data = ContinualDataModule.permuted(bad, bad, num_tasks=1)
    for _ in range(2):
        with pytest.raises(DataError, match="Image 3 of the training data"):
            data.setup()
