"""Images to infer are of the kind that the network was trained on."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from supsup_lightning import ContinualDataModule, ContinualModule, OneShot, SupSup
from supsup_lightning.errors import DataError
from tests.conftest import fit

LABELS = torch.arange(80) % 4
BYTES = (torch.randint(0, 60, (80, 1, 8, 8)) + LABELS.view(-1, 1, 1, 1) * 60).clamp(0, 255).byte()
OPTIONS = {"inference": OneShot("entropy", images="batch")}


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tensors = TensorDataset(BYTES, LABELS)
    found = {}
    for name in ("split", "permuted"):
        options = {"steps_per_task": 3, "batch_size": 16}
        data = (
            ContinualDataModule.split(tensors, tensors, classes_per_task=2, **options)
            if name == "split"
            else ContinualDataModule.permuted(tensors, tensors, num_tasks=2, **options)
        )
        module, _ = fit(SupSup(network()), data, folder=tmp_path_factory.mktemp(name), **OPTIONS)
        found[name] = module, data
    return found


def test_bytes_are_normalised_where_that_is_all_that_the_data_module_does(trained):
    module, data = trained["split"]
    images, _ = next(iter(data.test_loader(1)))
    raw = data._task(1).test
    ours = module.infer(raw.store.pixels[raw.positions[:16]])
    assert all(torch.equal(*pair) for pair in zip(ours, module.infer(images), strict=True))
    module, _ = trained["permuted"]
    with pytest.raises(DataError, match="Images to infer are bytes .*take images from one of its loaders"):
        module.infer(BYTES)


def test_half_precision_becomes_what_the_network_was_trained_on(trained):
    module, data = trained["split"]
    images, _ = next(iter(data.test_loader(0)))
    images = images.half()
    assert all(torch.equal(*pair) for pair in zip(module.infer(images), module.infer(images.float()), strict=True))


def _with_a_nan(images):
    images[2, 0, 3, 4] = torch.nan
    return images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images.double(), r"are torch.float64, and the network was trained on torch.float32: images.to"),
        (lambda images: images.long(), "are torch.int64"),
        (lambda images: images.numpy(), r"have to be a tensor \(batch, \*shape\), not ndarray"),
        (lambda images: images[0], r"must have shape \(batch, 1, 8, 8\), not \(1, 8, 8\). Add the batch's dimension"),
        (lambda images: images.movedim(1, -1), r"must have shape \(batch, 1, 8, 8\), not \(16, 8, 8, 1\)"),
        (lambda images: images[..., :7], "must have shape"),
        (_with_a_nan, r"Image 2 of those to infer has the value nan at \[0, 3, 4\]"),
    ],
)
def test_other_images_are_refused(trained, change, message):
    module, data = trained["permuted"]
    images, _ = next(iter(data.test_loader(0)))
    with pytest.raises(DataError, match=message):
        module.infer(change(images.clone()))


def test_what_inputs_are_comes_with_a_checkpoint_and_older_ones_go_without(trained):
    module, data = trained["split"]
    fresh = ContinualModule(SupSup(network()), **OPTIONS)
    fresh.load_state_dict(module.state_dict())
    assert all(torch.equal(*pair) for pair in zip(fresh.infer(BYTES), module.infer(BYTES), strict=True))
    with pytest.raises(DataError, match="torch.float64"):
        fresh.infer(torch.rand(2, 1, 8, 8).double())
    old = {**module.state_dict(), "_extra_state": {"num_classes": (2, 2)}}
    fresh = ContinualModule(SupSup(network()), **OPTIONS)
    fresh.load_state_dict(old)
    images, _ = next(iter(data.test_loader(0)))
    assert torch.equal(fresh.infer(images)[0], module.infer(images)[0])
    assert all(not len(part) for part in module.infer(images[:0]))
