"""Integers as options: of any type, but no truth values."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from supsup_lightning import ContinualDataModule, DataModuleSequence, OneShot
from supsup_lightning.data import Mixed, Whole
from supsup_lightning.data.datasets import Datasets
from supsup_lightning.discovery import Blocks, Recurring, Unannounced
from supsup_lightning.errors import ConfigurationError, check_whole
from tests.test_datasets import Blobs

FOUR = [4, np.int64(4), np.uint8(4), torch.tensor(4)]


@pytest.mark.parametrize("four", FOUR, ids=lambda four: type(four).__name__)
def test_whole_numbers_of_any_type_are_taken_and_kept_as_python_s(four):
    tensors = TensorDataset(torch.rand(40, 1, 4, 4), torch.arange(40) % 4)
    options = {"steps_per_task": four, "batch_size": four, "tasks_at_once": four, "num_workers": four, "seed": four}
    data = ContinualDataModule.permuted(tensors, tensors, num_tasks=four, input_shape=(1, four, four), **options)
    data.setup()
    assert len(data.train_loader(3)) == data.num_tasks == 4
    sequence = DataModuleSequence([Blobs(4), Blobs(4)], num_classes=four, steps_per_task=four)
    stream = Unannounced(sequence, Recurring(rounds=four), steps_per_epoch=four)
    mixture = Mixed([Whole(Datasets(tensors, tensors))] * 2, num_tasks=[np.int64(1), None])
    found = [data.identity(), stream.identity(), vars(OneShot(images=four)), vars(mixture), vars(Blocks(tasks=[four]))]
    assert not [value for part in found for value in _values(part) if isinstance(value, (np.generic, torch.Tensor))]
    assert ContinualDataModule.split(tensors, tensors, classes_per_task=four).num_tasks == 1


def _values(part):
    if isinstance(part, dict):
        return [value for inner in part.values() for value in _values(inner)]
    return [value for inner in part for value in _values(inner)] if isinstance(part, (list, tuple)) else [part]


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 4.0, "4", None, np.array([4, 4]), torch.ones(2)])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ConfigurationError, match="data.num_tasks=.* must be an integer of at least 1"):
        check_whole("data.num_tasks", value)
    with pytest.raises(ConfigurationError, match="num_classes"):
        DataModuleSequence([Blobs(4)], num_classes=[value])
