"""Loaders of users' data modules: each batch is what it says, or one error names the cause."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from supsup_lightning import GG, DataModuleSequence, Given, SupSup
from supsup_lightning.errors import ConfigurationError, DataError
from tests.conftest import fit

DRAW = torch.Generator().manual_seed(0)
LABELS = torch.arange(64) % 2
IMAGES = torch.randn(64, 1, 4, 4, generator=DRAW) + LABELS.view(-1, 1, 1, 1)


class Module(L.LightningDataModule):
    num_classes = 2

    def __init__(self, train, test=None, val=None):
        super().__init__()
        self.train_dataloader, self.test_dataloader = train, test or plain
        if val is not None:
            self.val_dataloader = val


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(IMAGES, LABELS, strict=True)


class Announced(Stream):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


class Drifting(BatchSampler):
    """One batch fewer each time it is asked."""

    def __init__(self):
        super().__init__(SequentialSampler(range(64)), 16, False)
        self.length = 5

    def __len__(self):
        self.length = max(1, self.length - 1)
        return self.length


def plain(images=IMAGES, labels=LABELS, *more, **options):
    return DataLoader(TensorDataset(images, labels, *more), 16, **options)


def collated(form):
    def collate(items):
        images, labels = zip(*items, strict=True)
        return form(torch.stack(images), torch.stack(labels))

    return lambda: DataLoader(TensorDataset(IMAGES, LABELS), 16, collate_fn=collate)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))


def counted(data, folder):
    module, trainer = fit(SupSup(network()), data, folder=folder, scenario=GG, inference=Given())
    trainer.test(module, data, verbose=False)
    return module.test_accuracy


FORMS = {
    "three parts": lambda: plain(IMAGES, LABELS, torch.arange(64)),
    "a dict": collated(lambda images, labels: {"image": images, "label": labels}),
    "hugging face": collated(lambda images, labels: {"labels": labels, "pixel_values": images}),
    "a list": collated(lambda images, labels: [images, labels]),
    "a column of labels": collated(lambda images, labels: (images, labels[:, None])),
    "whole floats": collated(lambda images, labels: (images, labels.float())),
    "truth values": collated(lambda images, labels: (images, labels.bool())),
    "a list of labels": collated(lambda images, labels: (images, labels.tolist())),
    "arrays": collated(lambda images, labels: (images.double().numpy(), labels.numpy())),
    "persistent workers": lambda: plain(num_workers=1, persistent_workers=True),
    "a list of a loader": lambda: [plain()],
    "a list of batches": lambda: list(plain()),
    "without a length": lambda: DataLoader(Stream(), 16),
    "too long a length": lambda: DataLoader(Announced(1000), 16),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_usual_form(form):
    make = FORMS[form]
    data = DataModuleSequence([Module(make, make, make)], steps_per_task=6)
    data.setup()
    for loader in (data.test_loader(0), data.val_loader(0)):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(images, IMAGES)  # each once
        assert torch.equal(labels, LABELS)
    images, labels = zip(*data.train_loader(0), strict=True)
    assert torch.equal(torch.cat(images), torch.cat([IMAGES, IMAGES[:32]]))  # six batches: a pass and a half
    assert torch.cat(labels).dtype == torch.int64


def test_iterable_and_short_test_sets_are_tested_to_their_end(tmp_path):
    data = DataModuleSequence([Module(plain, FORMS["without a length"]), Module(plain, FORMS["too long a length"])])
    assert counted(data, tmp_path).images.tolist() == [64, 64]


BAD = torch.where(torch.arange(64).view(-1, 1, 1, 1) == 37, torch.nan, IMAGES)

REFUSED = {
    "two inputs": (collated(lambda images, labels: ((images, images), labels)), "has a tuple of 2 as its input"),
    "no label": (collated(lambda images, labels: images), r"has no labels: it must be \(image, label\), not a Tensor"),
    "unknown names": (collated(lambda images, labels: {"a": images, "b": labels}), "is a dict with 'a', 'b'"),
    "one-hot": (
        collated(lambda images, labels: (images, torch.eye(2)[labels])),
        r"torch.float32 of shape \(16, 2\) for 16 images. One-hot labels",
    ),
    "words": (collated(lambda images, labels: (images, ["cat"] * 16)), "labels of task 0 .* are not integers"),
    "labels from 1": (lambda: plain(IMAGES, LABELS + 1), r"labels from 1 to 2 \(image 1: 2\), where its 2 classes"),
    "a negative label": (lambda: plain(IMAGES, LABELS - 1), "labels from -1 to 0"),
    "a NaN": (lambda: plain(BAD), "Image 5 of batch 2 of the (training|test) loader of task 0 .* has the value nan"),
    "drop_last": (lambda: plain(IMAGES[:10], LABELS[:10], drop_last=True), "There is no batch .* with drop_last=True"),
    "no image": (lambda: plain(IMAGES[:0], LABELS[:0]), "There is no batch in the (training|test) loader of task 0"),
    "no list": (lambda: [], "There is no batch in the"),
    "None": (lambda: None, "_dataloader returns NoneType; it has to return a DataLoader"),
    "empty batches": (lambda: [(IMAGES[:0], LABELS[:0])], "There is no image in the first batches of the"),
    "an iterator": (lambda: iter(plain()), r"_dataloader returns an iterator \(_SingleProcess"),
    "two loaders": (lambda: [plain(), plain()], "_dataloader returns 2 loaders; a task has one"),
    "named loaders": (lambda: {"a": plain()}, "_dataloader returns 1 loaders; a task has one"),
}


@pytest.mark.parametrize("half", ["train", "test"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_before_training(case, half):
    make, message = REFUSED[case]
    module = Module(make) if half == "train" else Module(plain, make)
    data = DataModuleSequence([module], steps_per_task=6)
    with pytest.raises((DataError, ConfigurationError), match=message):
        data.setup()


def test_a_length_is_needed_or_given():
    data = DataModuleSequence([Module(FORMS["without a length"])])
    with pytest.raises(ConfigurationError, match="data.steps_per_task is needed: the training loader of task 0"):
        data.setup()


def test_a_test_loader_that_has_more_than_it_says_is_refused():
    data = DataModuleSequence([Module(plain, lambda: DataLoader(Announced(32), 16))], steps_per_task=2)
    with pytest.raises(DataError, match="says that it has 2 batches, and has more"):
        data.setup()


def test_an_epoch_keeps_its_length(caplog):
    sampler = Drifting()
    module = Module(lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_sampler=sampler))
    data = DataModuleSequence([module], epochs_per_task=3)
    assert [len(list(data.train_loader(0, epoch=epoch))) for epoch in range(3)] == [4, 4, 4]
    assert "an epoch has as many as at first" in caplog.text


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((IMAGES * 50).byte(), "images of task 0 have type torch.float32, the .* images torch.uint8"),
        (IMAGES * 255, "images of task 0 .* were not prepared alike"),
        ((IMAGES + 4) / 8, "were not prepared alike"),
        (IMAGES.repeat(1, 3, 1, 1), r"have shape \(1, 4, 4\), the .* images \(3, 4, 4\)"),
    ],
)
@pytest.mark.parametrize("half", ["validation", "test"])
def test_halves_of_different_kinds_are_refused(images, message, half):
    other = {"validation": "val"}.get(half, half)
    data = DataModuleSequence([Module(plain, **{other: lambda: plain(images)})])
    with pytest.raises(DataError, match=message):
        data.setup()


def test_tokens_of_any_length_and_an_empty_validation_are_taken(caplog):
    tokens = torch.randint(100, (64, 9))
    module = Module(lambda: plain(tokens), lambda: plain(tokens[:, :7]), lambda: plain(tokens[:0], LABELS[:0]))
    data = DataModuleSequence([module])
    data.setup()
    assert data.val_loader(0) == []
    assert "validation loader of task 0 (Module) is empty" in caplog.text


def test_looking_at_batches_changes_no_draw():
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    data = DataModuleSequence([Module(lambda: plain(shuffle=True))])
    data.setup()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
