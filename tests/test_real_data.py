"""The published data sets, where $SUPSUP_DATA has them: read whole, checked, and learned."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torchvision

from supsup_lightning import GG, ContinualDataModule, GEMResNet18, Given, LeNet, SupSup
from supsup_lightning.data import CIFAR10, CIFAR100, KMNIST, FashionMNIST, ImageFolder, Permuted, Split, Whole
from supsup_lightning.errors import DataError
from tests.conftest import QUIET, fit, run_here
from tests.test_command_line import results


@pytest.fixture
def data(request):
    """Gives the folder of data sets if it has all these parts."""

    def folder(*parts: str) -> Path:
        root = Path(os.environ.get("SUPSUP_DATA", ""))
        missing = [part for part in parts if not (root / part).exists()]
        if missing:
            pytest.skip(f"{missing[0]} is not here: set SUPSUP_DATA to a folder that holds it")
        return root

    return folder


def accuracies(data: ContinualDataModule, network, folder: Path) -> list[float]:
    module, trainer = fit(SupSup(network), data, folder=folder, scenario=GG, inference=Given())
    trainer.test(module, data, verbose=False)
    return module.test_accuracy.compute()[0].tolist()


def test_fashion_mnist_is_learned(data, tmp_path):
    root = data("FashionMNIST/raw/train-images-idx3-ubyte")
    stream = ContinualDataModule(Permuted(FashionMNIST()), root=root, num_tasks=2, steps_per_task=150)
    assert min(accuracies(stream, LeNet(output_size=100), tmp_path)) > 0.75
    images = stream.train_loader(0).images
    assert (images.mean / 255).item() == pytest.approx(0.2860, abs=1e-4)
    assert (images.std / 255).item() == pytest.approx(0.3530, abs=1e-4)


def test_kmnist_is_read_in_the_layout_of_mnist(data, tmp_path):
    """Only the test half is published here: it stands for both."""
    root = data("KMNIST/raw/t10k-images-idx3-ubyte")
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        for half in ("train", "t10k"):
            shutil.copy(root / "KMNIST" / "raw" / f"t10k-{kind}", raw / f"{half}-{kind}")
    stream = ContinualDataModule(Split(KMNIST(), classes_per_task=5), root=tmp_path, steps_per_task=150)
    assert min(accuracies(stream, LeNet(output_size=50), tmp_path)) > 0.8


def test_cifar_100_is_read_whole_and_learned(data, tmp_path):
    root = data("cifar-100-python/train")
    stream = ContinualDataModule(
        Split(CIFAR100(), classes_per_task=5), root=root, num_tasks=2, steps_per_task=200, augment="crop_flip"
    )
    stream.setup()
    images = stream.stream.train
    assert images.store.pixels.shape == (50_000, 3, 32, 32)
    torch.testing.assert_close(images.mean.flatten() / 255, torch.tensor([0.5071, 0.4865, 0.4409]), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std.flatten() / 255, torch.tensor([0.2673, 0.2564, 0.2762]), atol=1e-4, rtol=0)
    plain = torchvision.datasets.CIFAR100(root)
    assert torch.equal(images.store.pixels[7], torchvision.transforms.v2.functional.pil_to_tensor(plain[7][0]))
    assert images.labels[7] == plain[7][1]
    assert min(accuracies(stream, LeNet(output_size=50, input_shape=(3, 32, 32)), tmp_path)) > 0.35


def test_gem_resnet_keeps_the_logits_of_its_first_task_bit_for_bit(data, tmp_path):
    stream = ContinualDataModule(
        Split(CIFAR100(), classes_per_task=5),
        root=data("cifar-100-python/train"),
        num_tasks=2,
        steps_per_task=8,
        batch_size=32,
        augment="crop_flip",
    )
    method = SupSup(GEMResNet18(output_size=5), rule="topk", allocation="erdos_renyi", budget=16)
    images = next(iter(stream.test_loader(0)))[0]
    logits = []

    class Watch(L.Callback):
        @torch.no_grad()
        def on_train_epoch_end(self, trainer, pl_module):
            logits.append(pl_module.eval().method(images, 0))
            pl_module.train()

    fit(method, stream, folder=tmp_path, callbacks=[Watch()], scenario=GG, inference=Given())
    assert torch.equal(*logits)
    assert not torch.equal(method.bank.statistics[0], method.bank.statistics[1])


def test_a_damaged_cifar_file_is_named(data, tmp_path):
    shutil.copytree(data("cifar-100-python/train") / "cifar-100-python", tmp_path / "cifar-100-python")
    with (tmp_path / "cifar-100-python" / "test").open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(DataError, match="cifar-100-python/test is damaged: its MD5 sum is not f0ef6b0ae"):
        ContinualDataModule(Split(CIFAR100(), classes_per_task=5), root=tmp_path).setup()


def test_cifar_10_is_read_in_torchvisions_layout(tmp_path, monkeypatch):
    """Small files of the same form, with their own checksums."""

    class Small(torchvision.datasets.CIFAR10):
        pass

    folder = tmp_path / Small.base_folder
    folder.mkdir()
    draw = np.random.default_rng(0)

    def write(name: str, contents: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(contents))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(count: int) -> dict:
        return {"data": draw.integers(0, 256, (count, 3072), np.uint8), "labels": [n % 10 for n in range(count)]}

    Small.train_list = [[name, write(name, batch(30))] for name, _ in Small.train_list]
    Small.test_list = [["test_batch", write("test_batch", batch(20))]]
    Small.meta = {**Small.meta, "md5": write("batches.meta", {"label_names": list("abcdefghij")})}
    monkeypatch.setattr(CIFAR10, "dataset", Small)
    stream = ContinualDataModule(Split(CIFAR10(), classes_per_task=2, class_order="fixed"), root=tmp_path, batch_size=6)
    stream.prepare_data()
    stream.setup()
    assert stream.num_tasks == 5
    assert len(stream.stream.train) == 150
    assert next(iter(stream.train_loader(4)))[0].shape == (6, 3, 32, 32)
    stored = pickle.loads((folder / "test_batch").read_bytes())["data"]
    assert torch.equal(stream.stream.test.store.pixels, torch.from_numpy(stored).view(-1, 3, 32, 32))


def test_a_tree_of_photographs_is_read_by_workers(data):
    root = data("tiny-imagenet-subset/train")
    stream = ContinualDataModule(
        Split(ImageFolder("tiny-imagenet-subset"), classes_per_task=10),
        root=root,
        input_shape=(3, 64, 64),
        in_memory=False,
        augment="resized_crop",
        num_workers=1,
        batch_size=64,
        epochs_per_task=1,
    )
    stream.setup()
    assert stream.num_tasks == 2
    assert (len(stream.stream.train), len(stream.stream.test)) == (10_000, 1_000)
    images, labels = next(iter(stream.train_loader(1)))  # greyscale files among them
    assert images.shape == (64, 3, 64, 64)
    assert set(labels.tolist()) == set(range(10))
    assert abs(images.mean()) < 0.3


@pytest.mark.slow
def test_a_mixture_of_published_sets_is_learned(data, tmp_path, monkeypatch):
    root = data("MNIST/raw", "FashionMNIST/raw", "cifar-100-python", "images_background_small1/Greek")
    options = ["data=mixed", f"data.root={root}", "data.steps_per_task=150", "scenario=gg", "data.num_workers=0"]
    run_here(monkeypatch, tmp_path, *options, "hydra.run.dir=run", *QUIET)
    result = results(tmp_path / "run")
    assert result["num_classes"] == [10, 10, 5, 5, 24]
    mnist, fashion, *cifar, omniglot = result["accuracy_per_task"]
    assert mnist > 0.85
    assert fashion > 0.7
    assert min(cifar) > 0.3
    assert omniglot > 0.2  # of 24 characters


def test_a_whole_data_set_is_one_task(data):
    stream = ContinualDataModule(Whole(FashionMNIST()), root=data("FashionMNIST/raw/train-images-idx3-ubyte"))
    assert stream.num_tasks == 1
