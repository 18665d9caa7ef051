"""Which image files there are, of which class and half: trees, tables, links, and the cache of listings."""

import json
import logging
import os
import shutil
import time
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from supsup_lightning.data import ImageCSV, ImageFolder, Reading, listing, tree
from supsup_lightning.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of listings of the test's own, that believes folders changed just now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tree, "_CLOCK_TICK", 0)
    return tmp_path / "cache" / "supsup_lightning"


def files(folder: Path, *names: str) -> Path:
    """Files of a few bytes, each its own; listing opens none."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def grid(*folders: str, per_class: int = 5) -> list[str]:
    return [f"{folder}/{number}.png" for folder in folders for number in range(per_class)]


def names(listing, folder: Path) -> set[tuple[str, str]]:
    """Path and class of each image."""
    return {
        (path.relative_to(folder).as_posix(), listing.classes[label])
        for path, label in zip(listing.paths, listing.labels, strict=True)
    }


def table(folder: Path, text: str, **options) -> tuple:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.csv").write_text(text)
    return ImageCSV(**options).listings(folder)


@pytest.mark.parametrize(
    "classes", [("dark", "light"), ("9", "10", "100"), ("class_9", "class_10"), ("1", "01", "two")]
)
def test_a_tree_and_a_table_say_the_same(classes, tmp_path):
    folder = files(tmp_path / "tree", *grid(*classes, *(f"{name}/more" for name in classes), per_class=9))
    lines = [f"{path.relative_to(folder)},{path.relative_to(folder).parts[0]}" for path in folder.rglob("*.png")]
    lines.sort(key=lambda line: line[::-1])
    by_tree = ImageFolder().listings(folder)
    assert table(folder, "\n".join(["path,label", *lines])) == by_tree
    assert len(by_tree[1].paths) == 4 * len(classes)
    expected = {"9": ["9", "10", "100"], "class_9": ["class_10", "class_9"], "1": ["01", "1", "two"]}
    assert by_tree[0].classes == expected.get(classes[0], ["dark", "light"])


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training", "Testing"), ("TRAIN", "TEST"), ("train_images", "test_images"), ("train", "Valid")],
)
def test_halves_are_known_by_any_writing(train, test, tmp_path):
    folder = files(tmp_path, *grid(f"{train}/a", f"{train}/b"), *grid(f"{test}/a", f"{test}/b", per_class=2))
    training, tested = ImageFolder().listings(folder)
    assert training.classes == ["a", "b"]
    assert (len(training.paths), len(tested.paths)) == (10, 4)


def test_of_several_halves_test_is_taken_if_it_has_labels_and_the_rest_is_named(tmp_path, caplog):
    folder = files(tmp_path / "tree", *grid("train/a", "train/b", "val/a", "val/b", "test/a", "extra"))
    assert {path.parts[-3] for path in ImageFolder().listings(folder)[1].paths} == {"test"}
    assert "tests take the images of test; extra, val is not used" in caplog.text
    shutil.rmtree(folder / "test")
    files(folder, *grid("test/images"))  # without labels, as those of competitions
    assert {path.parts[-3] for path in ImageFolder().listings(folder)[1].paths} == {"val"}
    shutil.rmtree(folder / "val")
    shutil.rmtree(folder / "test")
    files(folder, *grid("test"))
    train, test = ImageFolder().listings(folder)
    assert (len(train.paths), len(test.paths)) == (8, 2)
    assert "tests take the images of a share of train; extra, test is not used" in caplog.text


def test_a_class_may_have_the_name_of_a_half(tmp_path):
    files(tmp_path / "vehicles", *grid("bus", "train"))
    assert ImageFolder("vehicles").listings(tmp_path)[0].classes == ["bus", "train"]
    files(tmp_path / "vehicles", *grid("test"))
    with pytest.raises(DataError, match="vehicles/train has no folders"):
        ImageFolder("vehicles").listings(tmp_path)


def test_what_systems_leave_behind_is_no_image(tmp_path, caplog):
    folder = files(tmp_path / "tree", *grid("a", "b"))
    before = ImageFolder().listings(folder)
    hidden = (".ipynb_checkpoints", "a/.ipynb_checkpoints", "a/deep/@eaDir", "b/.thumbnails", "__MACOSX/a", ".git/b")
    files(folder, *grid(*hidden), "a/._0.png", "a/Thumbs.db", "loose.png", "a/animated.gif")
    assert ImageFolder().listings(folder) == before
    for name in hidden:
        assert f"{name.removesuffix('/a').removesuffix('/b')} (hidden)" in caplog.text
    for name in ("a/._0.png (hidden)", "loose.png (in no folder of a class)", "a/animated.gif (another format)"):
        assert name in caplog.text


@pytest.mark.parametrize(
    "folders",
    [
        ("seg_train/forest", "seg_train/sea", "seg_test/forest", "seg_test/sea"),
        ("seg_train/seg_train/forest", "seg_test/seg_test/forest", "seg_pred/seg_pred"),
        ("imagesTrain/sea", "imagesTest/sea"),
    ],
)
def test_halves_of_other_names_are_not_taken_for_classes(folders, tmp_path):
    files(tmp_path / "tree", *grid(*folders))
    with pytest.raises(DataError, match="would be taken for classes; if they are halves, name them train and test"):
        ImageFolder("tree").listings(tmp_path)


def test_halves_within_classes_are_refused_and_other_folders_within_all_of_them_pointed_out(tmp_path, caplog):
    files(tmp_path / "tree", *grid("cat/train", "cat/test", "dog/train", "dog/test"))
    with pytest.raises(DataError, match=r"have halves in them \(test, train\); expected are .*/train/<class>/<image>"):
        ImageFolder("tree").listings(tmp_path)
    files(tmp_path / "domains", *grid("photo/cat", "photo/dog", "sketch/cat", "sketch/dog"))
    ImageFolder("domains").listings(tmp_path)
    assert "are its folders photo, sketch; each of them has the folders cat, dog" in caplog.text
    files(tmp_path / "things", *grid("train_station", "test_tube"))
    assert ImageFolder("things").listings(tmp_path)[0].classes == ["test_tube", "train_station"]


def test_links_neither_multiply_images_nor_go_on_for_ever(tmp_path, caplog):
    folder = files(tmp_path / "data" / "tree", *grid("a", "b"))
    before = [names(half, folder) for half in ImageFolder().listings(folder)]
    (folder / "a" / "self").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to("..")
    (folder / "b" / "out").symlink_to(tmp_path)
    (folder / "all").symlink_to(".")
    (folder / "b" / "ring").symlink_to("ring")
    (folder / "b" / "again.png").symlink_to("0.png")
    (folder / "a" / "more").mkdir()
    (folder / "a" / "more" / "x").symlink_to("../other")
    files(folder, "a/other/5.png")
    (folder / "a" / "other" / "y").symlink_to("../more")
    train, test = ImageFolder().listings(folder)
    found = names(train, folder) | names(test, folder)
    assert found == before[0] | before[1] | {("a/other/5.png", "a")}
    assert len(train.paths) + len(test.paths) == 11
    assert "a/self (a link back), a/up (a link back)" in caplog.text
    assert "repetitions left out: 1, first" in caplog.text


def test_folders_of_classes_and_images_may_be_links(tmp_path):
    files(tmp_path / "elsewhere", *grid("x", "y"))
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "elsewhere" / "x")
    (folder / "b").mkdir()
    for path in (tmp_path / "elsewhere" / "y").iterdir():
        (folder / "b" / path.name).symlink_to(path)
    train, test = ImageFolder().listings(folder)
    assert len(names(train, folder) | names(test, folder)) == 10


def test_a_file_of_two_classes_or_halves_is_an_error(tmp_path):
    folder = files(tmp_path / "tree", *grid("a", "b"))
    (folder / "b" / "more").symlink_to("../a")
    with pytest.raises(DataError, match="is listed twice, as a and as b .*is the same file.* Remove it"):
        ImageFolder().listings(folder)
    (folder / "b" / "more").unlink()
    halves = tmp_path / "halves"
    shutil.copytree(folder, halves / "train")
    (halves / "test").symlink_to("train")
    with pytest.raises(DataError, match="is for training and for the test .*is the same file"):
        ImageFolder().listings(halves)

    for label, message in (("b", "is listed twice, as a and as b"), ("a", None)):
        text = f"path,label\na/0.png,a\na/1.png,a\nb/0.png,b\nb/1.png,b\na/../a/0.png,{label}\n"
        if message:
            with pytest.raises(DataError, match=message):
                table(folder, text)
        else:
            assert sum(len(half.paths) for half in table(folder, text)) == 4
    with pytest.raises(DataError, match="a/0.png is for training and for the test. Remove"):
        table(folder, "path,label,split\na/0.png,a,train\na/1.png,a,test\na/0.png,a,test\n")


def test_copies_of_test_images_are_counted(tmp_path, caplog):
    for number in range(6):
        for half in ("train", "test"):
            path = tmp_path / half / "ab"[number % 2] / f"{half}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 40 * number + (half == "test" and number > 1)).save(path)
    ImageFolder().load(tmp_path, Reading(input_shape=(1, 8, 8), num_workers=0))
    assert "copies of test images, byte by byte: 2, first" in caplog.text


def test_copies_of_held_out_images_are_held_out(tmp_path, caplog):
    folder = files(tmp_path / "tree", *grid("a", "b", per_class=10))
    train, test = ImageFolder().listings(folder)
    shutil.copy(test.paths[0], folder / "a" / "copy of it.png")
    shutil.copy(train.paths[0], folder / "a" / "zzz.png")
    for path in (folder / "b").iterdir():
        path.write_text("all the same")
    train, test = ImageFolder().listings(folder)
    contents = [{path.read_text() for path in half.paths if path.parent.name == "a"} for half in (train, test)]
    assert not contents[0] & contents[1]
    assert len(train.paths) + len(test.paths) == 22
    assert (train.labels.count(1), test.labels.count(1)) == (8, 2)  # not to be told apart: as without copies
    assert "copies of images that are held out for the test are held out as well: 1, first" in caplog.text


def test_copies_are_not_looked_for_among_very_many_files(tmp_path, caplog, monkeypatch):
    folder = files(tmp_path / "tree", *grid("train/a", "train/b", "test/a"))
    for path in folder.rglob("*.png"):
        path.write_text("all the same")
    monkeypatch.setattr(listing, "_MOST_COMPARED", 14)
    with caplog.at_level(logging.INFO):
        ImageFolder().listings(folder)
    assert "are not looked for: 15 files" in caplog.text
    assert "byte by byte" not in caplog.text


def test_a_start_looks_at_each_file_once(tmp_path, monkeypatch):
    folder = files(tmp_path / "tree", *grid("train/a", "train/b", "test/a", "test/b"))
    ImageFolder().listings(folder)
    looks = []
    for name in ("stat", "lstat"):
        look = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *args, look=look, **options: looks.append(str(path)) or look(path, *args, **options)
        )
    source = ImageFolder()
    train, test = source.listings(folder)
    source.digest(folder)
    source._existing(train, "raise")
    assert sorted(path for path in looks if path.endswith(".png")) == sorted(map(str, [*train.paths, *test.paths]))


def test_halves_in_folders_of_their_own_name_are_found(tmp_path):
    names_of = ("training_set/training_set", "test_set/test_set")
    folder = files(tmp_path / "cats and dogs", *(f"{half}/{name}/{half}.png" for half in names_of for name in "cd"))
    train, test = ImageFolder().listings(folder)
    assert train.classes == ["c", "d"]
    assert names(train, folder / names_of[0]) == {(f"{name}/{names_of[0]}.png", name) for name in "cd"}
    assert len(test.paths) == 2
    with pytest.raises(DataError, match=r"have halves in them \(test, train\)"):
        ImageFolder().listings(files(tmp_path / "deep", *grid("data/train/a", "data/test/a")))


@pytest.mark.parametrize(
    ("halves", "train", "test"),
    [
        ("train train train val test", 24, ["4.png", "9.png", "14.png"]),
        ("TRAIN Training train Val testing ", 24, ["4.png", "9.png", "14.png"]),
        ("train train train val val", 24, ["3.png", "4.png", "8.png"]),
    ],
)
def test_in_a_table_test_is_what_says_test(halves, train, test, tmp_path, caplog):
    lines = [f"{i}.png,{i // 5 % 2},{halves.split()[i % 5]}\n" for i in range(40)]
    training, tested = table(tmp_path, "path,label,split\n" + "".join(lines))
    assert len(training.paths) == train
    assert [path.name for path in tested.paths][:3] == test
    assert ("8 that say val are not used" in caplog.text) == ("test" in halves)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label,split\na.png,1,train\nb.png,1\n", "Line 3 of .*labels.csv has no split"),
        ("path,label,split\n\na.png,1,train\n\nb.png,,test\n", "Line 5 of .*labels.csv has no label"),
        ('path,label\n"a\n.png",1\n ,1\n', "Line 4 of .* has no path"),
        ("path,label\na.png,1,2\n", "Line 2 of .* has 3 cells, where the first line has 2"),
        ("path,label,label\na.png,1,2\n", "has 2 columns 'label'; rename all but one"),
        ('path,label\n"a.png,1\nb.png,2\n', "cannot be read .unexpected end of data"),
        ("path,label\na\0.png,1\n", "cannot be read .null bytes"),
        ("path,label\n", "leaves no images for training or none for the test"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_by_its_line(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        table(tmp_path, text)


def test_a_column_of_halves_that_is_asked_for_has_to_be_there(tmp_path, caplog):
    text = "path,label,set\na.png,1,train\nb.png,1,test\nc.png,1,train\n"
    with pytest.raises(DataError, match="has no column 'half'; it has path, label, set"):
        table(tmp_path, text, split_column="half")
    table(tmp_path, text)
    assert "The column set of" in caplog.text
    caplog.clear()
    table(tmp_path, text, split_column=None)
    assert not caplog.text
    assert [path.name for path in table(tmp_path, text, split_column="SET")[1].paths] == ["b.png"]


def test_tables_are_read_however_they_are_written(tmp_path):
    files(tmp_path, "sub/a b.png", "sub/b.png", "c.png")
    expected = [tmp_path / "sub" / "a b.png", tmp_path / "sub" / "b.png", tmp_path / "c.png"]
    for text in (
        "path,label,split\nsub/a b.png,1,train\nsub/b.png,2,train\nc.png,1,test\n",
        "\ufeffPath;Label;Split\nsub/a b.png;1;train\nsub/b.png;2;train\nc.png;1;test\n",
        "path\tlabel\tsplit\r\nsub\\a b.png\t1\ttrain\r\nsub\\b.png\t2\ttrain\r\nc.png\t1\ttest\r\n",
        f'path, label, split\n"sub/a b.png", 1, train\n{tmp_path}/sub/b.png, 2, train\nc.png, 1, test,\n\n',
        'note,split,label,path\n"two\nlines",train,1,sub/a b.png\n,train,2,sub/b.png\n,test,1,c.png\n',
    ):
        train, test = table(tmp_path, text)
        assert [*train.paths, *test.paths] == expected
        assert (train.classes, train.labels, test.labels) == (["1", "2"], [0, 1], [0])


def test_labels_that_differ_stay_different(tmp_path, caplog):
    labels = ("1", "01", "1.0", "12345678901234567890", "12345678901234567891")
    train, _ = table(tmp_path, "path,label\n" + "".join(f"{n}.png,{labels[n % 5]} \n" for n in range(20)))
    assert train.classes == ["01", "1", "1.0", *labels[3:]]
    assert "'01' and '1' are taken for different classes" in caplog.text
    assert "'01' and '1.0' are taken for different classes" in caplog.text
    train, _ = table(tmp_path, "path,label\n" + "".join(f"{n}.png,{('Cat', 'cat')[n % 2]}\n" for n in range(20)))
    assert train.classes == ["Cat", "cat"]
    assert "'Cat' and 'cat' are taken for different classes" in caplog.text


def test_a_tree_is_listed_once_and_again_when_it_changes(tmp_path, cache, monkeypatch):
    folder = files(tmp_path / "tree", *grid("a", "b"))
    before = ImageFolder().listings(folder)
    assert len(list(cache.glob("listing-*.json"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tree, "_walk", lambda *_: pytest.fail("listed again"))
        assert ImageFolder().listings(folder) == before
    times = os.stat(folder / "a").st_atime_ns, os.stat(folder / "a").st_mtime_ns
    files(folder, "a/more.png")
    os.utime(folder / "a", ns=times)  # as tools do that copy a folder with its times
    assert sum(len(half.paths) for half in ImageFolder().listings(folder)) == 11
    (folder / "a").rename(folder / "c")
    assert ImageFolder().listings(folder)[0].classes == ["b", "c"]
    (folder / "b" / "more").symlink_to(tmp_path / "later")
    ImageFolder().listings(folder)
    files(tmp_path / "later", "5.png", "6.png")
    assert sum(len(half.paths) for half in ImageFolder().listings(folder)) == 13


def test_a_folder_changed_just_now_is_listed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "_CLOCK_TICK", 2 * 10**9)
    now = time.time_ns()
    monkeypatch.setattr(tree, "_stamp", lambda _: [0, 0, now, now])  # a clock that does not move
    folder = files(tmp_path / "tree", *grid("a", "b"))
    ImageFolder().listings(folder)
    files(folder, "a/more.png")
    assert sum(len(half.paths) for half in ImageFolder().listings(folder)) == 11


def test_a_listing_that_is_damaged_foreign_or_old_is_not_believed(tmp_path, cache, caplog):
    folder = files(tmp_path / "tree", *grid("a", "b"))
    before = ImageFolder().listings(folder)
    (path,) = cache.glob("listing-*.json")
    _, _, text = path.read_text().partition("\n")

    def sealed(text: str) -> str:
        return f"{sha256(text.encode()).hexdigest()}\n{text}"

    other = files(tmp_path / "other", *grid("c", "d"))
    ImageFolder().listings(other)
    (foreign,) = set(cache.glob("listing-*.json")) - {path}
    kept = json.loads(text)
    old = {"times": {str(folder): os.stat(folder).st_mtime_ns}, "files": {"a": ["a/0.png"], "b": ["b/0.png"]}}
    damaged = [
        "",
        "{ damaged",
        path.read_text().replace("a/0.png", "a/9.png"),
        path.read_text()[:-30],
        foreign.read_text(),
        json.dumps(old),  # of the first version
        sealed(json.dumps(old)),
        sealed(json.dumps({**kept, "rules": ["1"], "tree": {**kept["tree"], "files": {"a": ["a/0.png"]}}})),
        sealed("[]"),
        sealed("null"),
    ]
    for content in damaged:
        path.write_text(content)
        assert ImageFolder().listings(folder) == before
    path.write_bytes(b"\xff\xfe\0")
    assert ImageFolder().listings(folder) == before
    caplog.set_level(logging.WARNING)
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert ImageFolder().listings(folder) == before
    assert "cannot be kept for the next start" in caplog.text
