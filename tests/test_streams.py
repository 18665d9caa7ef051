"""Streams and the loaders over them: which images and labels a task sees."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms.v2 import functional as F

from supsup_lightning import ContinualDataModule
from supsup_lightning.data import (
    CropFlip,
    Datasets,
    Digits,
    Domains,
    Images,
    Mixed,
    Permuted,
    Reading,
    Rotated,
    Split,
    Whole,
    halves,
)
from supsup_lightning.data.images import bring_to
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError


class Random:
    """Random images of any shape; every class has ten for training and four for the test."""

    def __init__(self, *, classes: int = 7, shape: tuple[int, ...] = (3, 6, 5), seed: int = 0) -> None:
        self.classes, self.shape, self.seed = classes, shape, seed

    def prepare(self, root: Path) -> None:
        pass

    def num_classes(self, root: Path) -> int:
        return self.classes

    def num_skipped(self) -> int:
        return 0

    def load(self, root: Path, reading: Reading) -> tuple[Images, Images]:
        draw = torch.Generator().manual_seed(self.seed)
        pixels = torch.randint(0, 256, (self.classes * 14, *self.shape), generator=draw, dtype=torch.uint8)
        labels = torch.arange(self.classes).repeat(14)
        split = 10 * self.classes
        return halves(pixels[:split], labels[:split], pixels[split:], labels[split:])


def loaded(stream):
    stream.load(Path(), Reading())
    return stream


def classes_of(stream: Split, seed: int) -> list[list[int]]:
    """The data set's own labels of each task, found by the images' positions."""
    own = [stream.train.labels[stream.task(task, seed=seed).train.positions] for task in range(stream.length(Path()))]
    return [sorted(set(labels.tolist())) for labels in own]


def test_a_split_has_every_class_once_in_an_order_of_the_seed():
    stream = loaded(Split(Random(classes=8), classes_per_task=2))
    for seed in range(3):
        classes = classes_of(stream, seed)
        assert len(classes) == 4
        assert sorted(label for task in classes for label in task) == list(range(8))
    assert classes_of(stream, 0) != classes_of(stream, 1)
    assert classes_of(stream, 0) == classes_of(stream, 0)
    assert classes_of(loaded(Split(Random(classes=8), classes_per_task=2, class_order="fixed")), 5) == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    order = [6, 1, 0, 5]
    assert classes_of(loaded(Split(Random(classes=8), classes_per_task=2, class_order=order)), 5) == [[1, 6], [0, 5]]


def test_labels_of_a_split_run_from_0_or_stay():
    relabelled = loaded(Split(Random(classes=6), classes_per_task=3)).task(1, seed=0)
    assert relabelled.num_classes == 3
    assert sorted(set(relabelled.train.labels.tolist())) == [0, 1, 2]
    assert len(relabelled.train) == 30
    assert len(relabelled.test) == 12
    stream = loaded(Split(Random(classes=6), classes_per_task=3, relabel=False))
    kept = stream.task(1, seed=0)
    assert kept.num_classes == 6
    assert torch.equal(kept.train.labels, stream.train.labels[kept.train.positions])
    # train and test agree about which class has which number
    number = dict(
        zip(stream.train.labels[relabelled.train.positions].tolist(), relabelled.train.labels.tolist(), strict=True)
    )
    assert all(
        number[own] == label
        for own, label in zip(
            stream.test.labels[relabelled.test.positions].tolist(), relabelled.test.labels.tolist(), strict=True
        )
    )


def test_classes_that_do_not_divide_leave_a_smaller_last_task(caplog):
    stream = loaded(Split(Random(classes=8), classes_per_task=3))
    with caplog.at_level("INFO"):
        assert stream.length(Path()) == 3
    assert "The last task has 2 classes, the others 3." in caplog.text
    assert [stream.task(task, seed=0).num_classes for task in range(3)] == [3, 3, 2]
    assert Split(Random(classes=7), classes_per_task=3).length(Path()) == 2
    assert "the last one is left out" in caplog.text
    data = ContinualDataModule(Split(Random(classes=8), classes_per_task=3))
    data.setup()
    assert data.num_tasks == 3
    assert data.num_classes == (3, 3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split(Random(), classes_per_task=1), "classes_per_task=1 must be an integer of at least 2"),
        (lambda: Split(Random(), classes_per_task=8).length(Path()), "classes_per_task=8 is more than the 7 classes"),
        (lambda: Split(Random(), classes_per_task=2, class_order="sorted"), "choose one of random, fixed"),
        (lambda: Split(Random(), classes_per_task=2, class_order=[1.7, 0]), "class_order=1.7 must be an integer"),
        (lambda: Split(Random(), classes_per_task=2, class_order=["cat"]), "class_order='cat' must be an integer"),
        (
            lambda: Split(Random(), classes_per_task=2, class_order=[1, 1]).length(Path()),
            "must name classes from 0 to 6, each once",
        ),
        (lambda: Rotated(Random(), degrees=0), "degrees=0 must lie between 0 and 360"),
        (lambda: ContinualDataModule(Permuted(Random())).num_tasks, "data.num_tasks is needed: Permuted has no end"),
        (
            lambda: ContinualDataModule(Rotated(Random()), num_tasks=37).setup(),
            "data.num_tasks=37 is more than the 36 tasks of Rotated",
        ),
        (lambda: Mixed([Permuted(Random())]).length(Path()), r"streams\[0\] \(Permuted\) has no end"),
        (lambda: Mixed([Whole(Random())], num_tasks=[2]).length(Path()), "2 tasks are wanted of Whole, which has 1"),
        (lambda: Mixed([Whole(Random())], num_tasks=[1, 1]), "1 streams are mixed, with 2 numbers"),
        (
            lambda: Domains([Random(), Random(classes=3)]).length(Path()),
            r"have different classes: \[7, 3\]",
        ),
        (lambda: ContinualDataModule(Whole(Random()), resize=True), "data.resize=true needs data.input_shape"),
        (lambda: ContinualDataModule(Whole(Random()), augment="flip"), "data.augment='flip' is not known"),
        (lambda: ContinualDataModule(Whole(Random()), on_error="ignore"), "choose one of raise, skip"),
        (lambda: ContinualDataModule(Whole(Random()), num_workers=-1), "data.num_workers=-1"),
    ],
)
def test_bad_options_of_streams_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_one_class_is_nothing_to_learn():
    with pytest.raises(DataError, match="Random has 1 class"):
        loaded(Whole(Random(classes=1)))


def test_rotations_turn_the_images_and_fill_with_black():
    stream = loaded(Rotated(Digits(), degrees=90))
    assert stream.length(Path()) == 4
    upright, turned = (stream.task(task, seed=0).test for task in (0, 1))
    pixels = stream.test.store.pixels[:5]
    torch.testing.assert_close(turned.prepare(pixels), upright.prepare(pixels).rot90(1, (2, 3)), atol=1e-4, rtol=1e-4)
    oblique = (
        loaded(Rotated(Digits(), degrees=45))
        .task(1, seed=0)
        .test.prepare(torch.full((1, 1, 8, 8), 16, dtype=torch.uint8))
    )
    black = -stream.train.mean / stream.train.std
    torch.testing.assert_close(oblique[0, 0, 0, 0], black.flatten()[0])
    assert Rotated(Random(), degrees=7).length(Path()) == 52  # the 52nd task stands at 357 degrees


def test_permutations_mix_all_channels_after_normalisation():
    stream = loaded(Permuted(Random()))
    task = stream.task(3, seed=1).train
    pixels = stream.train.store.pixels[:4]
    plain = stream.train.prepare(pixels).flatten(1)
    permuted = task.prepare(pixels).flatten(1)
    assert torch.equal(plain.sort(1).values, permuted.sort(1).values)
    assert not torch.equal(plain, permuted)


def test_mixed_tasks_have_their_own_classes_and_one_input_shape():
    streams = [
        Whole(Random(classes=3, shape=(1, 9, 9))),
        Split(Random(classes=4, shape=(3, 6, 5)), classes_per_task=2),
        Permuted(Random(classes=7, shape=(3, 6, 5))),
    ]
    data = ContinualDataModule(
        Mixed(streams, num_tasks=[None, None, 2]), input_shape=(3, 8, 8), resize=True, batch_size=8, epochs_per_task=1
    )
    data.setup()
    assert data.num_classes == (3, 2, 2, 7, 7)
    for task in range(5):
        images, labels = next(iter(data.train_loader(task)))
        assert images.shape == (8, 3, 8, 8)
        assert labels.max() < data.num_classes[task]
        assert data.steps_per_epoch(task) == max(1, len(data._halves(task)[0]) // 8)
    orders = [data.stream.task(task, seed=0).train.transform for task in (3, 4)]
    for transform in orders:
        transform(torch.zeros(1, 90))
    assert not torch.equal(orders[0].order, orders[1].order)
    with pytest.raises(ConfigurationError, match="images of task 0 have shape"):
        ContinualDataModule(Mixed(streams[:2]), input_shape=(3, 6, 5)).setup()


def test_grey_becomes_colour_and_colour_its_brightness():
    grey = torch.randn(2, 1, 4, 4)
    assert torch.equal(bring_to(grey, (3, 4, 4)), grey.expand(-1, 3, -1, -1))
    colour = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(bring_to(colour, (1, 4, 4)), F.rgb_to_grayscale(colour), atol=2e-3, rtol=0)
    assert bring_to(grey, (1, 7, 9)).shape == (2, 1, 7, 9)


def test_augmentation_is_drawn_image_by_image_and_again_in_every_epoch():
    data = ContinualDataModule(Whole(Random(shape=(3, 9, 9))), augment="crop_flip", batch_size=16, epochs_per_task=3)
    data.setup()
    plain = ContinualDataModule(Whole(Random(shape=(3, 9, 9))), batch_size=16, epochs_per_task=3)
    plain.setup()
    loader = data.train_loader(0)
    (images, _), (same, _), (other, _) = (
        next(iter(part)) for part in (loader, data.train_loader(0), plain.train_loader(0))
    )
    assert torch.equal(images, same)
    assert images.shape == other.shape
    assert not torch.equal(images, other)
    assert not torch.equal(loader.draws, data.train_loader(0, epoch=1).draws)
    # evaluation is never augmented
    assert torch.equal(next(iter(data.val_loader(0)))[0], next(iter(plain.val_loader(0)))[0])
    assert torch.equal(next(iter(data.test_loader(0)))[0], next(iter(plain.test_loader(0)))[0])


def test_crop_and_flip_equal_torchvisions_on_each_image():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 9, 7), generator=draw, dtype=torch.uint8)
    draws = torch.randint(2**31, (20, 3), generator=draw)
    for flip in (True, False):
        result = CropFlip(padding=2, flip=flip)(pixels, draws)
        for image, (top, left, mirrored), found in zip(pixels, draws.tolist(), result, strict=True):
            expected = F.crop(F.pad(image, [2] * 4), top % 5, left % 5, 9, 7)
            expected = F.horizontal_flip(expected) if flip and mirrored % 2 else expected
            assert torch.equal(found, expected)


def test_processes_share_augmented_batches(monkeypatch):
    data = ContinualDataModule(Whole(Random(shape=(3, 9, 9))), augment="crop_flip", batch_size=16, epochs_per_task=1)
    data.setup()
    whole = next(iter(data.train_loader(0)))[0]
    monkeypatch.setattr(data, "processes", lambda: (1, 2))
    assert torch.equal(next(iter(data.train_loader(0)))[0], whole[1::2])


def test_a_single_image_left_over_joins_the_last_test_batch():
    pixels, labels = torch.rand(33, 1, 2, 2), torch.arange(33) % 2
    stream = Whole(Datasets(TensorDataset(pixels, labels), TensorDataset(pixels, labels)))
    sizes = [len(batch) for batch in ContinualDataModule(stream, batch_size=16).test_loader(0).order]
    assert sizes == [16, 17]


def test_a_checkpoint_of_other_tasks_is_refused():
    data, other = (
        ContinualDataModule(Split(Random(classes=8), classes_per_task=count), num_tasks=2) for count in (2, 3)
    )
    for module in (data, other):
        module.setup()
    with pytest.raises(MismatchError, match=r"data.num_classes=\[2, 2\] there, \[3, 3\] here"):
        other.load_state_dict(data.state_dict())
    data.load_state_dict(data.state_dict())


def test_a_validation_share_that_leaves_nothing_to_train_on_is_refused():
    data = ContinualDataModule(Whole(Random(classes=2)), validation_share=0.99)
    with pytest.raises(
        ConfigurationError, match="validation_share=0.99 leaves 0 of the 2 classes of task 0 to train on"
    ):
        data.setup()


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda: Split(Digits(), classes_per_task=2), lambda: Split(Digits(), classes_per_task=2, class_order="fixed")),
        (lambda: Split(Digits(), classes_per_task=2), lambda: Split(Digits(), classes_per_task=2, relabel=False)),
        (lambda: Rotated(Digits(), degrees=72), lambda: Rotated(Digits(), degrees=70)),
        (lambda: Permuted(Digits()), lambda: Permuted(Random(classes=10, shape=(1, 8, 8)))),
        (
            lambda: Mixed([Whole(Digits()), Split(Digits(), classes_per_task=5)]),
            lambda: Mixed([Split(Digits(), classes_per_task=5), Whole(Digits())]),
        ),
    ],
    ids=["order", "labels", "angle", "images", "mixture"],
)
def test_a_checkpoint_of_another_stream_is_refused(one, two):
    data, same, other = (ContinualDataModule(make(), num_tasks=3) for make in (one, one, two))
    for module in (data, same, other):
        module.setup()
    same.load_state_dict(data.state_dict())
    with pytest.raises(MismatchError, match="made with other options: data"):
        other.load_state_dict(data.state_dict())


def test_crops_of_files_are_refused_where_there_are_none():
    with pytest.raises(ConfigurationError, match="resized_crop has no effect on Digits"):
        ContinualDataModule(Whole(Digits()), augment="resized_crop").setup()
    with pytest.raises(ConfigurationError, match="data.input_shape=64 must be a list of integers"):
        ContinualDataModule(Whole(Digits()), input_shape=64)


def test_a_process_without_a_test_batch_gets_one_without_images(monkeypatch):
    data = ContinualDataModule(Rotated(Digits()), num_tasks=2, input_shape=(3, 9, 9), resize=True, batch_size=1000)
    data.setup()
    monkeypatch.setattr(data, "processes", lambda: (1, 2))
    ((images, labels),) = data.test_loader(1)
    assert images.shape[0] == len(labels) == 0
