import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from supsup_lightning import ContinualDataModule, PermutedDigits, PermutedMNIST
from supsup_lightning.data import MNIST, Digits, Permuted, Reading
from supsup_lightning.data.images import InOrder
from supsup_lightning.errors import ConfigurationError, DataError


def permuted_digits() -> Permuted:
    stream = Permuted(Digits())
    stream.load(Path(), Reading())
    return stream


def order_of(seed: int, task: int) -> tuple[int, ...]:
    transform = permuted_digits().task(task, seed=seed).train.transform
    transform(torch.zeros(1, 64))
    return tuple(transform.order.tolist())


def test_permutations_are_independent_across_seeds_and_tasks():
    orders = {order_of(seed, task) for seed in range(4) for task in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert order_of(1, 2) == order_of(1, 2)


def test_batches_are_normalised_permuted_images(digits):
    train, test = Digits().load(Path(), Reading())
    images, labels = next(iter(digits.test_loader(1)))
    raw = test.store.pixels[:128].float()
    expected = ((raw - train.mean) / train.std).flatten(1)[:, list(order_of(0, 1))].view(128, 1, 8, 8)
    torch.testing.assert_close(images, expected)
    assert torch.equal(labels, test.labels[:128])
    pixels = train.store.pixels.float()
    torch.testing.assert_close(train.mean.item(), pixels.mean().item())
    torch.testing.assert_close(train.std.item(), pixels.std(correction=0).item())


def test_the_validation_split_is_of_the_training_images_and_no_other(digits):
    training, validation = digits._halves(0)
    assert len(training) + len(validation) == 1437
    assert len(validation) == 72
    assert len(digits._task(0).test) == 360
    assert sorted([*training.positions.tolist(), *validation.positions.tolist()]) == list(range(1437))


def test_a_number_of_steps_is_one_epoch_of_that_many_full_batches(digits):
    loader = digits.train_loader(0)
    batches = list(loader)
    assert len(loader) == len(batches) == 40
    assert all(len(images) == 128 for images, _ in batches)
    seen = torch.cat(loader.order)
    counts = seen.bincount(minlength=len(digits._halves(0)[0]))
    assert counts.max() - counts.min() <= 1  # pass after pass, each image once


def test_epochs_and_tasks():
    data = PermutedDigits(num_tasks=3, epochs_per_task=4)
    data.setup()
    assert data.num_epochs == 12
    assert [[*data.timetable.tasks(e)] for e in (0, 3, 4, 11)] == [[0], [0], [1], [2]]
    assert [data.timetable.begins_trial(e) for e in (0, 3, 4)] == [True, False, True]
    assert [data.timetable.ends_task(e) for e in (0, 3, 4)] == [False, True, False]
    assert data.steps_per_epoch(0) == 1365 // 128
    first, second = data.train_loader(0, epoch=0), data.train_loader(0, epoch=1)
    assert not torch.equal(first.order[0], second.order[0])
    assert torch.equal(first.order[0], data.train_loader(0, epoch=0).order[0])


def test_processes_share_every_batch(digits, monkeypatch):
    whole = digits.train_loader(0)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(digits, "processes", lambda rank=rank: (rank, 2))
        shares.append(digits.train_loader(0))
    for batch, one, two in zip(whole.order, *(share.order for share in shares), strict=True):
        assert sorted(batch.tolist()) == sorted([*one.tolist(), *two.tolist()])
        assert len(one) == len(two) == 64
    monkeypatch.setattr(digits, "processes", lambda: (0, 3))
    with pytest.raises(ConfigurationError, match="data.batch_size=128 does not divide by 3 processes"):
        digits.train_loader(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_task": 5, "epochs_per_task": 5}, "are both given"),
        ({"num_tasks": 0}, "data.num_tasks=0 must be an integer of at least 1"),
        ({"batch_size": 1.5}, "data.batch_size=1.5 must be"),
        ({"steps_per_task": -1}, "data.steps_per_task=-1 must be"),
        ({"validation_share": 0}, "data.validation_share=0 must lie between 0 and 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        PermutedDigits(**options)


def test_a_wrong_input_shape_is_refused():
    data = PermutedDigits(input_shape=(1, 28, 28))
    message = r"data.input_shape=\[1, 28, 28\], but the images of task 0 have shape \[1, 8, 8\]; .* data.resize=true"
    with pytest.raises(ConfigurationError, match=message):
        data.setup()


def test_mnist_is_read_whole(mnist_root):
    data = PermutedMNIST(root=mnist_root, num_tasks=2)
    data.prepare_data()
    data.setup()
    assert isinstance(data, ContinualDataModule)
    images = data.train_loader(0).images
    assert len(images) == 57000
    assert len(data._task(0).test) == 10000
    assert images.mean.item() == pytest.approx(0.1307 * 255, abs=0.02)
    assert images.std.item() == pytest.approx(0.3081 * 255, abs=0.02)
    assert images.store.pixels.dtype == torch.uint8


@pytest.mark.parametrize("damage", ["truncated", "empty", "unreadable"])
def test_a_damaged_file_is_named(mnist_root, tmp_path, damage):
    shutil.copytree(Path(mnist_root) / "MNIST", tmp_path / "MNIST")
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()
    data = PermutedMNIST(root=tmp_path)
    data.prepare_data()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte (is damaged|cannot be read)"):
        data.setup()


def write_idx(folder: Path, half: str, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        (folder / f"{half}-{kind}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())


def test_idx_files_are_checked_before_they_are_believed(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    images, labels = np.arange(20 * 3 * 2).reshape(20, 3, 2), np.arange(20) % 10

    def whole() -> None:
        for half in ("train", "t10k"):
            write_idx(raw, half, images, labels)

    whole()
    processed = tmp_path / "MNIST" / "processed"  # which torchvision would take instead, and unpickle
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(1, 3, 2, dtype=torch.uint8), torch.zeros(1)), processed / name)
    train, test = MNIST().load(tmp_path, Reading())
    assert torch.equal(train.store.pixels, torch.from_numpy(images.astype(np.uint8)).unsqueeze(1))
    assert torch.equal(test.labels, torch.from_numpy(labels))

    def damaged(change, message: str) -> None:
        whole()
        change()
        with pytest.raises(DataError, match=message):
            MNIST().load(tmp_path, Reading())

    def overwrite(name: str, at: int, data: bytes) -> None:
        content = bytearray((raw / name).read_bytes())
        content[at : at + len(data)] = data
        (raw / name).write_bytes(content)

    damaged(lambda: write_idx(raw, "train", images, labels[:-1]), "has 20 images, and .* has 19 labels")
    damaged(lambda: write_idx(raw, "t10k", images, labels + 5), "has the label 14 at place 9; there are 10 classes")
    damaged(lambda: write_idx(raw, "t10k", images[:, :2], labels), r"the shape \[1, 3, 2\] and test images \[1, 2, 2\]")
    damaged(lambda: write_idx(raw, "t10k", images[:0], labels[:0]), "is empty: its header announces 0 x 3 x 2")
    image_file, label_file = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    for at, data in ((0, b"\1"), (2, b"\x0d"), (3, b"\1"), (3, b"\xff")):
        damaged(lambda at=at, data=data: overwrite(image_file.name, at, data), "begins with .* where 00000803 is due")
    damaged(lambda: overwrite(image_file.name, 4, b"\xff" * 12), "is damaged: 136 bytes where its header announces")
    damaged(lambda: shutil.copy(image_file, label_file), "where 00000801 is due")


def test_batches_in_order_are_made_when_asked_for():
    for count in (0, 1, 2, 5, 7, 8, 9):
        for size in (1, 2, 3, 4):
            for world_size in (1, 2, 3):
                for rank in range(world_size):
                    batches = list(torch.arange(count).split(size))
                    if len(batches) > 1 and len(batches[-1]) == 1:
                        batches[-2:] = [torch.cat(batches[-2:])]
                    expected = [batch.tolist() for batch in batches[rank::world_size]] or [[]]
                    found = InOrder(range(count), size, slice(rank, None, world_size))
                    assert [batch.tolist() for batch in found] == expected
                    assert len(found) == len(expected)
