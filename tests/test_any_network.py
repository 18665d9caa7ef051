"""Networks of a user's own: whatever is in them, tasks are learned, kept bit for bit, and found."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from supsup_lightning import GG, Exhaustive, GEMResNet18, Given, OneShot, PermutedDigits, SupSup
from supsup_lightning.data import ContinualDataModule, Digits, Split
from supsup_lightning.errors import ConfigurationError
from tests.conftest import fit, random_images


class RowReader(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 40, bias=False)

    def forward(self, images):
        return self.head(self.lstm(images[:, 0])[0][:, -1])


class Transformer(nn.Module):
    """A small vision transformer over patches of 2 x 2, with `nn.MultiheadAttention` in it."""

    def __init__(self, size=32):
        super().__init__()
        self.patches = nn.Conv2d(1, size, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, 16, size) * 0.02)
        self.norm = nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))
        self.head = nn.Linear(size, 40)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT + self.positions  # (batch, 16, size)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


class Tied(nn.Module):
    """The same weights twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 40, bias=False)

    def forward(self, images):
        return self.head(self.second(self.first(images.flatten(1)).relu()).relu())


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, affine=False),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(288, 40, bias=False),
    )


class Watch(L.Callback):
    """The logits of task 0 after every task, in evaluation."""

    def __init__(self):
        self.logits = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.eval()
        self.logits.append(pl_module.method(random_images(20), 0))
        pl_module.train()


@pytest.mark.parametrize(
    ("network", "lowest"),
    [(RowReader, 0.8), (Transformer, 0.6), (Tied, 0.85), (convolutions, 0.9)],
    ids=["lstm", "attention", "tied", "batchnorm"],
)
def test_tasks_are_learned_kept_and_found(network, lowest, tmp_path):
    # Permutations are hard on a network that reads rows: it gets classes to tell apart instead.
    data = ContinualDataModule(Split(Digits(), classes_per_task=5), steps_per_task=150)
    torch.manual_seed(0)
    method = SupSup(network())
    watch = Watch()
    optimizer = partial(torch.optim.Adam, lr=4e-3)
    options = {"scenario": GG, "inference": Given(), "optimizer": optimizer}
    module, trainer = fit(method, data, folder=tmp_path, callbacks=[watch], **options)
    trainer.test(module, data, verbose=False)
    assert module.test_accuracy.compute()[0].min() > lowest
    assert torch.equal(*watch.logits)
    for images in ("batch", "each"):
        module.inference = OneShot("entropy", images=images)
        assert module.infer(random_images(3))[0].shape == (3,)
    method.eval().save(tmp_path / "bank.safetensors")
    torch.manual_seed(1)
    fresh = SupSup(network()).eval()
    fresh.load(tmp_path / "bank.safetensors")
    assert all(torch.equal(fresh(random_images(4), task), method(random_images(4), task)) for task in range(2))


def test_weights_that_are_tied_are_masked_once_and_left_out_of_checkpoints():
    method = SupSup(Tied())
    assert method.layout.names == ("first.weight", "head.weight")
    assert not any("network" in name for name in method.state_dict())
    method.begin_task(0)
    method(random_images(2), 0).sum().backward()
    weights = method.effective(0)["first.weight"]
    images = random_images(5).flatten(1)
    expected = (((images @ weights.T).relu() @ weights.T).relu()) @ method.effective(0)["head.weight"].T
    torch.testing.assert_close(method(images.view(5, 1, 8, 8), 0), expected)


@pytest.mark.parametrize("images", [1, "each"])
def test_one_image_cannot_decide_where_a_layer_has_one_value_a_channel(images, tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 40))
    data = PermutedDigits(num_tasks=2, steps_per_task=5)
    with pytest.raises(ConfigurationError, match="one image has none .* Use inference.images=batch"):
        fit(SupSup(network), data, folder=tmp_path, inference=OneShot("entropy", images=images))
    module, _ = fit(SupSup(network), data, folder=tmp_path, inference=OneShot("entropy", images="batch"))
    assert module.infer(random_images(4))[0].shape == (4,)
    fit(
        SupSup(network), PermutedDigits(num_tasks=1, steps_per_task=1), folder=tmp_path, inference=Exhaustive("entropy")
    )


def test_the_network_is_tried_in_training_as_well_and_left_as_it_was(tmp_path):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20))

        def forward(self, images):
            logits = self.body(images)
            return (logits, logits) if self.training else logits

    network = Auxiliary()
    before = {name: value.clone() for name, value in network.state_dict().items() if "running" in name}
    with pytest.raises(ConfigurationError, match="in training and in evaluation; got tuple in training"):
        fit(SupSup(network), PermutedDigits(num_tasks=1, steps_per_task=1), folder=tmp_path, inference=Exhaustive())
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def average_in_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    method = SupSup(GEMResNet18(output_size=5, input_shape=(1, 8, 8), base_channels=2))
    method.begin_task(0)
    method.train()
    method(random_images(8, seed=rank), 0)
    own = method.live.statistics[0].clone()
    method.finish_task(0)
    torch.save((own, method.bank.statistics), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_agree_on_the_statistics(tmp_path):
    torch.multiprocessing.spawn(average_in_process, args=(str(tmp_path),), nprocs=2)
    (own, kept), (other, also_kept) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(own, other)
    torch.testing.assert_close(kept[0], (own + other) / 2)
    assert torch.equal(kept, also_kept)
