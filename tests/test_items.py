"""Labels and images are what a data set's items say, and both halves are of one kind."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset
from torchvision.datasets import MNIST

from supsup_lightning import ContinualDataModule
from supsup_lightning.data.datasets import labels_of
from supsup_lightning.data.items import as_tensor
from supsup_lightning.errors import DataError

IMAGES = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(60) % 10


class Digits(Dataset):
    def __init__(self):
        self.data, self.targets = IMAGES, LABELS

    def __len__(self):
        return 60

    def __getitem__(self, position):
        return self.data[position], int(self.targets[position])


class Parity(Digits):
    def __getitem__(self, position):
        image, label = super().__getitem__(position)
        return image, label % 2


class Coarse(Subset):
    def __getitem__(self, position):
        image, label = self.dataset[self.indices[position]]
        return image, label // 5

    def __getitems__(self, positions):
        return [self[position] for position in positions]


class Pet(Digits):
    def __init__(self):
        super().__init__()
        self._labels = LABELS.tolist()

    def __getitem__(self, position):
        return self.data[position], int(self.targets[position] > 4)


class EightNumbers(Digits):
    """Labels like those of torchvision's QMNIST."""

    def __init__(self):
        super().__init__()
        self.targets = torch.stack([LABELS, *[LABELS * 0] * 7], 1)

    def __getitem__(self, position):
        return self.data[position], int(self.targets[position][0])


class Noisy(Digits):
    """One label in twenty is another."""

    def __getitem__(self, position):
        image, label = super().__getitem__(position)
        return image, (label + 1) % 10 if position % 20 == 7 else label


class FirstHalf(TensorDataset):
    def __len__(self):
        return 30


@pytest.mark.parametrize(
    "dataset",
    [
        Parity(),
        Coarse(Digits(), range(60)),
        Pet(),
        EightNumbers(),
        Noisy(),
        FirstHalf(IMAGES, LABELS),
        Subset(Parity(), [3, -1, 0]),
        ConcatDataset([Parity(), Subset(Coarse(Digits(), range(60)), [7])]),
        Subset(TensorDataset(IMAGES, LABELS.view(-1, 1)), torch.tensor([3, -1])),
        StackDataset(IMAGES, LABELS),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_labels_are_those_of_the_items(dataset):
    assert labels_of(dataset, "training").tolist() == [int(dataset[place][1]) for place in range(len(dataset))]


def test_images_are_those_of_the_items():
    class Scaled(TensorDataset):
        def __getitem__(self, position):
            image, label = super().__getitem__(position)
            return (image - 0.5) / 0.29, label

    dataset = Scaled(IMAGES, LABELS)
    for in_memory in (True, False):
        data = ContinualDataModule.split(
            dataset, dataset, classes_per_task=10, class_order="fixed", batch_size=60, in_memory=in_memory
        )
        images, labels = next(iter(data.test_loader(0)))
        torch.testing.assert_close(images, (IMAGES - 0.5) / 0.29)
        assert torch.equal(labels, LABELS)


def test_a_torchvision_data_set_is_read_without_an_image_unless_its_labels_are_transformed(mnist_root, caplog):
    caplog.set_level(logging.INFO)
    mnist = MNIST(mnist_root, train=False)
    assert torch.equal(labels_of(mnist, "test"), mnist.targets)
    assert "Reading" not in caplog.text
    few = Subset(MNIST(mnist_root, train=False, target_transform=lambda label: label % 2), range(20))
    assert torch.equal(labels_of(few, "test"), mnist.targets[:20] % 2)
    assert "Read the labels of 20 test items" in caplog.text


@pytest.mark.parametrize(
    ("label", "as_number"),
    [
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        (torch.tensor([3]), 3),
        (np.array([[3.0]]), 3),
        (True, 1),
        (np.True_, 1),
        (3.0, 3),
        ([3], 3),
        (3.5, None),
        (float("nan"), None),
        (torch.eye(4)[1], None),
        ("cat", None),
        (None, None),
        ({"id": 3}, None),
    ],
)
def test_a_label_is_a_whole_number_in_any_form(label, as_number):
    items = [(IMAGES[0], label)] * 2
    if as_number is None:
        with pytest.raises(DataError, match="not integers, one per image"):
            labels_of(items, "training")
    else:
        assert labels_of(items, "training").tolist() == [as_number] * 2


@pytest.mark.parametrize(
    "form",
    [
        lambda image, label, place: (image, label, place),
        lambda image, label, place: [image, label, {"file": place}],
        lambda image, label, place: {"image": image, "label": label},
        lambda image, label, place: {"index": place, "pixel_values": image, "labels": label},
    ],
)
def test_items_of_any_form(form):
    items = [form(image, label, place) for place, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True))]
    data = ContinualDataModule.split(items, items, classes_per_task=10, class_order="fixed", batch_size=60)
    images, labels = next(iter(data.test_loader(0)))
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (((IMAGES[0], IMAGES[1]), 0), "has a tuple of 2 as its input, and a network here takes one tensor"),
        ({"picture": IMAGES[0], "label": 0}, "is a dict with 'picture', 'label': exactly one of image, "),
        ({"image": IMAGES[0], "fine_label": 0}, "exactly one of label, labels"),
        ((5, 1, IMAGES[0]), "Image 0 of the training data set is no image but int"),
        (IMAGES[0], "has no labels: it must be .image, label., not a Tensor"),
    ],
)
def test_items_of_no_use_are_refused(item, message):
    with pytest.raises(DataError, match=message):
        ContinualDataModule.permuted([item] * 4, [item] * 4, num_tasks=1).setup()


def test_a_subset_by_a_mask_is_refused_and_messages_stay_short():
    items = [(image, int(label)) for image, label in zip(IMAGES, LABELS, strict=True)]  # [True] is the second
    mask = (LABELS < 5).tolist()
    for masked in (Subset(items, mask), Subset(TensorDataset(IMAGES, LABELS), torch.tensor(mask))):
        with pytest.raises(DataError, match="training data set is a Subset by a mask"):
            labels_of(masked, "training")
    with pytest.raises(DataError, match="not integers") as error:
        labels_of([(1, IMAGES[0])], "training")
    assert len(str(error.value)) < 300


def test_a_label_that_is_drawn_is_refused():
    class Turned(Digits):  # the label says how an image was turned, anew each time
        def __getitem__(self, position):
            turns = int(torch.randint(4, ()))
            return self.data[position].rot90(turns, (1, 2)), turns

    data = ContinualDataModule.permuted(Turned(), Turned(), num_tasks=1, batch_size=30, steps_per_task=1)
    assert len(next(iter(data.test_loader(0)))[1]) == 30  # the same draws each time
    with pytest.raises(DataError, match="of the training data set has the label . now, and had . when all"):
        list(data.train_loader(0))


def _halves(train, test):
    return TensorDataset(train, LABELS), TensorDataset(test, LABELS)


NORMALISED = (IMAGES - 0.5) / 0.29


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (IMAGES, (IMAGES * 255).byte(), "have type torch.float32, the test images torch.uint8"),
        ((IMAGES * 255).byte(), IMAGES, "have type torch.uint8, the test images torch.float32"),
        (IMAGES.half(), IMAGES, "have type torch.float16, the test images torch.float32"),
        (IMAGES, IMAGES.repeat(1, 3, 1, 1), r"have shape \(1, 8, 8\), the test images \(3, 8, 8\)"),
        (IMAGES, IMAGES[..., :7], r"have shape \(1, 8, 8\), the test images \(1, 8, 7\)"),
        (IMAGES, IMAGES * 255, r"alike: training from .* to 0.9.*, test from .* to 255 \(mean 126, std 73"),
        (NORMALISED, IMAGES, "not prepared alike"),
        (IMAGES, IMAGES * 2 - 1, "not prepared alike"),
        ((IMAGES.pow(4) - 0.286) / 0.353, IMAGES.pow(4), "not prepared alike"),
        (IMAGES, IMAGES * 0, "not prepared alike"),
        ((IMAGES * 255).byte(), (IMAGES > 0.5).byte(), "not prepared alike"),
    ],
)
def test_halves_of_different_kinds_are_refused(train, test, message, in_memory):
    data = ContinualDataModule.permuted(*_halves(train, test), num_tasks=2, in_memory=in_memory)
    with pytest.raises(DataError, match=message):
        data.setup()


def test_halves_that_differ_a_little_are_taken(caplog):
    few = TensorDataset(NORMALISED[:3] * 1.5, LABELS[:3])
    ContinualDataModule.permuted(TensorDataset(NORMALISED, LABELS), few, num_tasks=1).setup()
    assert "none of the training data's labels 3, 4, 5, 6, 7, 8, 9" in caplog.text
    with_noise = IMAGES.pow(4) + torch.randn(60, 1, 8, 8) * 0.2
    ContinualDataModule.permuted(*_halves(with_noise, IMAGES.pow(4)), num_tasks=1).setup()
    dim = _halves((IMAGES * 255).byte(), (IMAGES * 50).byte())
    ContinualDataModule.permuted(*dim, num_tasks=1).setup()
    ContinualDataModule.permuted(*_halves(IMAGES * 255, IMAGES * 255), num_tasks=1).setup()
    assert "floats with a standard deviation of 7" in caplog.text


def test_an_augmentation_keeps_type_and_shape():
    raw = TensorDataset((IMAGES * 255).byte(), LABELS)
    for augment in (lambda pixels, draws: pixels.float(), lambda pixels, draws: pixels[..., 1:]):
        data = ContinualDataModule.permuted(raw, raw, num_tasks=1, batch_size=10, augment=augment)
        with pytest.raises(DataError, match="data.augment makes .* it has to keep both"):
            next(iter(data.train_loader(0)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
def test_an_image_of_pillow_is_what_it_shows(mode):
    grey = Image.fromarray(np.full((4, 4), 255, np.uint8))
    pixels = as_tensor(grey.convert("RGB").convert(mode), "It")
    assert pixels.shape[0] == {"1": 1, "L": 1, "RGBA": 4}.get(mode, 3)
    assert pixels.dtype == torch.uint8
    assert pixels.float().min() > 250
