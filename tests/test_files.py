"""Images in files: folders and tables, workers, and what happens to those that cannot be read."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from supsup_lightning import ContinualDataModule
from supsup_lightning.data import Domains, ImageCSV, ImageFolder, Reading, Split, Whole
from supsup_lightning.data.workers import ImageFiles, Workers
from supsup_lightning.errors import ConfigurationError, DataError
from tests.conftest import two_classes_of_images

SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of listings of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    return two_classes_of_images(tmp_path / "tree")


def module(source, root, **options) -> ContinualDataModule:
    options = {"input_shape": SHAPE, "batch_size": 4, "epochs_per_task": 2, "num_workers": 0, **options}
    data = ContinualDataModule(Whole(source), root=root, **options)
    data.setup()
    return data


def test_a_tree_without_halves_holds_out_a_share_of_each_class(tree):
    train, test = ImageFolder(test_share=0.3).listings(tree)
    assert train.classes == test.classes == ["dark", "light"]
    assert (train.labels.count(0), train.labels.count(1)) == (7, 7)
    assert (test.labels.count(0), test.labels.count(1)) == (3, 3)
    assert not set(train.paths) & set(test.paths)
    assert ImageFolder(test_share=0.3).listings(tree) == (train, test)


def test_a_tree_with_halves_keeps_them_and_matches_classes_by_name(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "halves" / "train")
    shutil.copytree(tree / "light", tmp_path / "halves" / "val" / "light")
    train, test = ImageFolder("halves").listings(tmp_path)
    assert len(train.paths) == 20
    assert set(test.labels) == {1}
    (tmp_path / "halves" / "val" / "grey").mkdir()
    shutil.copy(tree / "dark" / "0.png", tmp_path / "halves" / "val" / "grey")
    with pytest.raises(DataError, match="val has the class grey, which .*train has not"):
        ImageFolder("halves").listings(tmp_path)


def test_other_folders_than_the_halves_are_not_taken_for_classes(tree, tmp_path, caplog):
    (tree / ".ipynb_checkpoints").mkdir()
    assert ImageFolder().listings(tree)[0].classes == ["dark", "light"]
    shutil.copytree(tree, tmp_path / "halves" / "train")
    train, test = ImageFolder("halves").listings(tmp_path)  # only `train`: a share of it is held out
    assert (len(train.paths), len(test.paths)) == (16, 4)
    for half in ("val", "test"):
        shutil.copytree(tree, tmp_path / "halves" / half)
    _, test = ImageFolder("halves").listings(tmp_path)
    assert {path.parent.parent.name for path in test.paths} == {"test"}
    assert "val is not used" in caplog.text


def test_a_listing_has_a_digest_that_moves_with_the_folder(tree, tmp_path):
    before = ImageFolder().digest(tree)
    moved = shutil.copytree(tree, tmp_path / "elsewhere")
    assert ImageFolder().digest(moved) == before
    with (moved / "dark" / "0.png").open("ab") as file:
        file.write(b"more")
    resized = ImageFolder().digest(moved)
    (moved / "dark" / "0.png").rename(moved / "light" / "new.png")
    assert len({before, resized, ImageFolder().digest(moved)}) == 3


def test_domains_have_the_same_classes_by_name(tree, tmp_path):
    other = two_classes_of_images(tmp_path / "other", classes=("bright", "dark"))
    alike = two_classes_of_images(tmp_path / "alike")
    assert Domains([ImageFolder(tree), ImageFolder(alike)]).length(tmp_path) == 2
    with pytest.raises(ConfigurationError, match=r"different classes: \['dark', 'light'\] and \['bright', 'dark'\]"):
        Domains([ImageFolder(tree), ImageFolder(other)]).length(tmp_path)


def test_mistakes_in_a_tree_are_named(tmp_path):
    with pytest.raises(DataError, match="nothing does not exist; set data.root"):
        ImageFolder("nothing").listings(tmp_path)
    (tmp_path / "tree").mkdir()
    with pytest.raises(DataError, match="tree has no folders; images must be in one folder per class"):
        ImageFolder("tree").listings(tmp_path)
    (tmp_path / "tree" / "empty").mkdir()
    with pytest.raises(DataError, match="class folder .*tree/empty has no images"):
        ImageFolder("tree").listings(tmp_path)
    with pytest.raises(ConfigurationError, match="test_share=1"):
        ImageFolder(test_share=1)


def test_a_table_says_the_same_as_its_tree(tree):
    by_table, by_tree = ImageCSV().listings(tree), ImageFolder().listings(tree)
    assert by_table[0].classes == by_tree[0].classes
    assert {*by_table[0].paths, *by_table[1].paths} == {*by_tree[0].paths, *by_tree[1].paths}
    lines = list(csv.DictReader((tree / "labels.csv").open()))
    with (tree / "halves.csv").open("w") as file:
        file.write("image,kind,half\n")
        for number, line in enumerate(lines):
            kind = {"dark": "10", "light": "9"}[line["label"]]
            file.write(f"{line['path']},{kind},{'test' if number % 4 == 0 else 'train'}\n")
    train, test = ImageCSV("halves.csv", path_column="image", label_column="kind", split_column="half").listings(tree)
    assert train.classes == ["9", "10"]  # numbers in their own order
    assert (len(train.paths), len(test.paths)) == (15, 5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\na.png,1\n", "has no column 'path'; it has file, label"),
        ("", "has no column 'path'; it has none"),
        ("path,label\na.png,\n", "Line 2 of .* has no label"),
        ("path,label\na.png,0.5\nb.png,1\n", "has the label 0.5; labels are words or integers"),
        ("path,label,split\na.png,1,other\n", "says 'other' in line 2; it may say train or test"),
        ("path,label,split\na.png,1,train\n", "leaves no images for training or none for the test"),
    ],
)
def test_mistakes_in_a_table_are_named(table, message, tmp_path):
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        ImageCSV().listings(tmp_path)
    with pytest.raises(DataError, match=r"none.csv cannot be read"):
        ImageCSV("none.csv").listings(tmp_path)


def test_images_in_memory_and_by_workers_are_the_same(tree):
    kinds = {
        "memory": {"in_memory": True},
        "main process": {"in_memory": False, "num_workers": 0},
        "workers": {"in_memory": False, "num_workers": 2},
    }
    batches = {}
    for kind, options in kinds.items():
        data = module(ImageFolder(), tree, **options)
        batches[kind] = [data.train_loader(0, epoch=1), data.val_loader(0), data.test_loader(0)]
        batches[kind] = [torch.cat([images for images, _ in loader]) for loader in batches[kind]]
    for kind in ("main process", "workers"):
        for expected, found in zip(batches["memory"], batches[kind], strict=True):
            # memory is normalised by all training images, files by at most 1000 evenly spaced ones: here the same
            torch.testing.assert_close(found, expected)


def test_random_crops_depend_on_the_image_and_not_on_the_workers(tree):
    options = {"in_memory": False, "augment": "resized_crop"}
    batches = []
    for workers in (0, 1, 2):
        data = module(ImageFolder(), tree, num_workers=workers, **options)
        batches.append([images for epoch in range(2) for images, _ in data.train_loader(0, epoch=epoch)])
    for other in batches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(batches[0], other, strict=True))
    plain = module(ImageFolder(), tree, in_memory=False)
    assert not torch.equal(next(iter(plain.train_loader(0)))[0], batches[0][0])
    state = torch.get_rng_state()
    next(iter(module(ImageFolder(), tree, **options).train_loader(0)))
    assert torch.equal(torch.get_rng_state(), state)  # reading in the main process draws from nobody's generator


def test_two_passes_at_once_do_not_mix(tree):
    data = module(ImageFolder(), tree, in_memory=False, num_workers=1)
    loader = data.test_loader(0)
    alone = [images for images, _ in loader]
    both = list(zip(loader, data.test_loader(0), strict=True))
    for expected, ((one, _), (two, _)) in zip(alone, both, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(two, expected)


def test_workers_outlive_an_epoch(tree):
    store = Workers(ImageFiles(sorted(tree.glob("*/*.png")), SHAPE), num_workers=1)
    positions = torch.arange(20).split(5)
    pids = []
    for _ in range(2):
        list(store.batches(positions, seeds=None, device=torch.device("cpu")))
        (pool,) = store._pools.values()
        pids.append([worker.pid for worker in pool.loader._iterator._workers])
    assert pids[0] == pids[1]


def test_files_of_any_kind_come_in_one_shape(tmp_path):
    for mode, name in (
        ("L", "grey.png"),
        ("1", "bits.png"),
        ("RGBA", "alpha.png"),
        ("CMYK", "print.jpg"),
        ("P", "p.gif"),
    ):
        Image.new(mode, (17, 9)).save(tmp_path / name)
    paths = sorted(tmp_path.iterdir())
    for shape in ((3, 8, 8), (1, 5, 7)):
        for resized_crop in (False, True):
            files = ImageFiles(paths, shape, resized_crop=resized_crop)
            for position in range(len(paths)):
                assert files.fetch(position).shape == files.fetch_random(position).shape == shape
                assert files.fetch(position).dtype == torch.uint8


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("damage", ["missing", "truncated", "no image"])
def test_an_image_that_cannot_be_read_is_named_or_skipped_and_counted(tree, in_memory, damage, caplog):
    table = ImageCSV()  # which still lists the image when it is gone
    path = table.listings(tree)[0].paths[3]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:60] if damage == "truncated" else b"no image")

    with pytest.raises(DataError, match=rf"{path}.*data.on_error=skip"):
        list(module(table, tree, in_memory=in_memory).train_loader(0))

    table = ImageCSV()
    data = module(table, tree, in_memory=in_memory, on_error="skip", steps_per_task=8, epochs_per_task=None)
    batches = list(data.train_loader(0)) + list(data.val_loader(0))
    assert all(len(images) == len(labels) for images, labels in batches)
    assert data.num_skipped() == 1
    assert str(path) in caplog.text
    if in_memory is False and damage != "missing":
        assert {len(images) for images, _ in data.train_loader(0)} == {3, 4}


def test_a_batch_without_one_readable_image_is_an_error(tree):
    for path in (tree / "dark").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="Not one image of a whole batch can be read"):
        module(table_of_dark_images(tree), tree, in_memory=False, on_error="skip", batch_size=2)


def table_of_dark_images(tree: Path) -> ImageCSV:
    """One class, called two."""
    lines = [f"dark/{n}.png,{n % 2},{'train' if n < 6 else 'test'}" for n in range(10)]
    (tree / "dark.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    return ImageCSV("dark.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": None}, r"data.input_shape=None must be \[channels, height, width\]"),
        ({"input_shape": (4, 8, 8)}, r"data.input_shape=\[4, 8, 8\] must be"),
        ({"augment": "resized_crop", "in_memory": True}, "set data.in_memory=false with it"),
    ],
)
def test_options_of_files_that_cannot_be_are_refused(tree, options, message):
    with pytest.raises(ConfigurationError, match=message):
        module(ImageFolder(), tree, **options)


def test_small_sets_are_read_at_once_and_others_by_workers(tree, monkeypatch):
    train, _ = ImageFolder().load(tree, Reading(input_shape=SHAPE, num_workers=0))
    assert not isinstance(train.store, Workers)
    monkeypatch.setattr("supsup_lightning.data.folders._MOST_BYTES_IN_MEMORY", 20 * 3 * 8 * 8 - 1)
    train, _ = ImageFolder().load(tree, Reading(input_shape=SHAPE, num_workers=0))
    assert isinstance(train.store, Workers)


def test_classes_of_folders_are_split(tmp_path):
    tree = two_classes_of_images(tmp_path / "many", classes=("a", "b", "c", "d"), per_class=5)
    data = ContinualDataModule(Split(ImageFolder(), classes_per_task=2), root=tree, input_shape=SHAPE, batch_size=4)
    data.setup()
    assert data.num_tasks == 2
    assert data.num_classes == (2, 2)
    assert set(next(iter(data.train_loader(1)))[1].tolist()) == {0, 1}


def test_folders_named_like_halves_are_no_classes(tree, tmp_path):
    for train, test in (("training", "testing"), ("train", "valid")):
        shutil.copytree(tree, tmp_path / train / train)
        shutil.copytree(tree, tmp_path / train / test)
        assert ImageFolder(train).listings(tmp_path)[0].classes == ["dark", "light"]
    shutil.copytree(tree, tmp_path / "half" / "val")
    with pytest.raises(DataError, match="half has the folder val, but none named train"):
        ImageFolder("half").listings(tmp_path)


def test_a_class_needs_an_image_in_each_half(tree):
    for path in list((tree / "light").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="the class light has one image, too few for training and test"):
        ImageFolder().listings(tree)
    lines = ["path,label,split", *(f"dark/{n}.png,{n % 2},train" for n in range(8)), "dark/8.png,2,test"]
    (tree / "labels.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"ImageCSV has no training images of its class 2 \(of 3\)"):
        module(ImageCSV(), tree)
