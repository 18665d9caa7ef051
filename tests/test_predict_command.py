"""The command `supsup predict`: images of files, folders, arrays and lists, named one by one."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from supsup_lightning import GG, Given, SupSup, load
from supsup_lightning.cli.app import app
from supsup_lightning.recipe import image_sources
from supsup_lightning.recipe.image_sources import Preparation, batches
from tests.conftest import run_cli_here
from tests.test_bank_commands import METHODS, module_of, refused, save, small_lenet, supsup


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A trained file, by which unknown inputs are told."""
    folder = tmp_path_factory.mktemp("run")
    options = ("data=split_digits", "data.steps_per_task=30", "inference=discriminant", "inference.unknown=0.05")
    run_cli_here(*options, "logger=none", "hydra.run.dir=run", cwd=folder)
    return folder / "run" / "mask_bank.safetensors"


@pytest.fixture
def pictures(tmp_path):
    """Some digits of scikit-learn as image files of their own values, with one in a subfolder."""
    from sklearn.datasets import load_digits

    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    digits = load_digits().images.astype(np.uint8)
    for number in range(12):
        Image.fromarray(digits[number]).save(folder / ("more" if number == 11 else "") / f"{number:02}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


def rows(output: str) -> list[dict]:
    return json.loads(output)


def test_a_folder_is_predicted_as_in_python(file, pictures):
    paths = [*sorted(pictures.glob("[0-9]*.png")), pictures / "more" / "11.png"]
    expected = load(file).predict(paths)
    for size in (5, 64):
        status, output, message = supsup("predict", file, pictures, "--format", "json", "--batch-size", size)
        assert (status, message) == (0, "")
        found = rows(output)
        assert [row["path"] for row in found] == [str(path) for path in paths]
        assert [row["task"] for row in found] == expected.task_name
        assert [row["class"] for row in found] == expected.class_name
        assert [row["unknown"] for row in found] == expected.unknown.tolist()
        assert [row["confidence"] for row in found] == pytest.approx(expected.confidence.tolist(), abs=1e-5)


def test_arrays_of_bytes_and_of_floats(file, pictures, tmp_path):
    paths = sorted(pictures.glob("0*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    expected = rows(supsup("predict", file, *paths, "--format", "json")[1])
    model = load(file)
    mean, std = model.inputs.normalisation
    prepared = (pixels[:, None] - mean.numpy()) / std.numpy()
    for name, array in (("grey", pixels), ("bytes", pixels[:, None]), ("floats", prepared.astype(np.float64))):
        np.save(tmp_path / f"{name}.npy", array)
        found = rows(supsup("predict", file, tmp_path / f"{name}.npy", "--format", "json", "--batch-size", 4)[1])
        assert [row["path"] for row in found] == [f"{tmp_path / name}.npy[{place}]" for place in range(len(paths))]
        for key in ("task", "class", "unknown"):
            assert [row[key] for row in found] == [row[key] for row in expected]


def test_csv_in_and_out(file, pictures, tmp_path):
    names = [f"{number:02}.png" for number in (3, 1, 2)]
    (pictures / "list.csv").write_text("label,path\n" + "".join(f"x,{name}\n" for name in names))
    out = tmp_path / "found.csv"
    status, output, message = supsup("predict", file, pictures / "list.csv", "--format", "csv", "--out", out)
    assert (status, output) == (0, "")
    assert "3 images in" in message
    with out.open(newline="") as stream:
        found = [*csv.DictReader(stream)]
    expected = rows(supsup("predict", file, *(pictures / name for name in names), "--format", "json")[1])
    assert [*found[0]] == ["path", "task", "class", "confidence", "unknown"]
    assert [row["path"] for row in found] == [str(pictures / name) for name in names]
    assert [row["class"] or None for row in found] == [row["class"] for row in expected]
    assert [row["unknown"] == "yes" for row in found] == [row["unknown"] for row in expected]
    assert [float(row["confidence"]) for row in found] == pytest.approx(
        [row["confidence"] for row in expected], abs=1e-4
    )
    (pictures / "other.csv").write_text("file\nx\n")
    assert "needs a column named path; its columns are file" in refused("predict", file, pictures / "other.csv")


def test_unknown_images_have_no_name(file, tmp_path):
    noise = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", noise)
    found = rows(supsup("predict", file, tmp_path / "noise.npy", "--format", "json")[1])
    unknown = [row for row in found if row["unknown"]]
    assert len(unknown) > 10
    assert all(row["task"] is row["class"] is None and row["confidence"] == 0 for row in unknown)
    table = supsup("predict", file, tmp_path / "noise.npy")[1].splitlines()
    assert len(table) == 21
    assert table[0].split() == ["task", "class", "confidence", "unknown", "path"]


def test_a_known_task_is_named(file, pictures):
    images = sorted(pictures.glob("0*.png"))
    number = rows(supsup("predict", file, *images, "--format", "json", "--task", "1")[1])
    name = load(file).name_of_task(1)
    by_name = rows(supsup("predict", file, *images, "--format", "json", "--task", name)[1])
    assert number == by_name
    assert {row["task"] for row in number} == {name}
    assert "did you mean" in refused("predict", file, *images, "--task", f"{name}x")


def test_a_file_that_is_no_image_is_named_and_refused_or_skipped(file, pictures):
    bad = pictures / "04a.png"
    bad.write_text("no image")
    message = refused("predict", file, pictures, "--format", "json")
    assert str(bad) in message
    assert "--skip-bad" in message
    status, output, message = supsup("predict", file, pictures, "--format", "json", "--skip-bad", "--batch-size", 3)
    assert status == 0
    assert message.startswith(f"skipped: The image {bad} cannot be read")
    assert len(rows(output)) == 12
    assert "None of the files" in refused_after_notes("predict", file, bad, "--skip-bad")
    out = pictures / "found.json"
    assert supsup("predict", file, pictures, "--format", "json", "--out", out)[0] == 1
    assert not out.exists()


def refused_after_notes(*arguments) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 1
    return done.stderr.splitlines()[-1]


def test_values_beyond_those_of_training_name_their_file(file, pictures):
    Image.new("L", (8, 8), 200).save(pictures / "bright.png")
    message = refused("predict", file, pictures)
    assert f"{pictures / 'bright.png'} has the value 200" in message


def test_wrong_uses_are_answered_in_one_line(file, pictures, tmp_path):
    image = pictures / "01.png"
    assert "cannot be read" in refused("predict", tmp_path / "missing", image)
    assert "cannot be read" in refused("predict", image, image)
    assert "There is no file" in refused("predict", file, tmp_path / "missing.png")
    assert "--format='xml' is not known" in refused("predict", file, image, "--format", "xml")
    assert "--batch-size=0 must be" in refused("predict", file, image, "--batch-size", 0)
    (tmp_path / "empty").mkdir()
    assert "has no images" in refused("predict", file, tmp_path / "empty")
    (tmp_path / "text.npy").write_text("no array")
    assert "write it with numpy.save" in refused("predict", file, tmp_path / "text.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    assert "cannot be read" in refused("predict", file, tmp_path / "objects.npy")
    np.save(tmp_path / "shape.npy", np.zeros((3, 1, 9, 9), np.float32))
    assert "images 0 to 2: Images to infer must have shape (batch, 1, 8, 8)" in refused(
        "predict", file, tmp_path / "shape.npy"
    )


def test_a_file_that_finds_no_task_asks_for_it(tmp_path, pictures):
    file = save("supsup", range(3), tmp_path / "bank", inference=Given(), scenario=GG)
    assert "--task NAME, of zoo 0" in refused("predict", file, pictures / "01.png")
    assert supsup("predict", file, pictures / "01.png", "--task", "zoo 2")[0] == 0


def test_images_are_read_in_batches(pictures):
    """At most as many are in memory as were asked for."""
    module = module_of(METHODS["supsup"](), [0])
    preparation = Preparation(module.inputs, module.about_data.raw, module.method.network)
    paths = image_sources.listed([pictures])
    sizes = [len(batch.images) for batch in batches(paths, preparation, size=5)]
    assert sizes == [5, 5, 2]


def test_raw_images_that_cannot_be_prepared_are_refused_though_bad_ones_are_skipped(tmp_path, pictures):
    module = module_of(SupSup(small_lenet()), [0, 1])
    raw = type(module.about_data.raw)(refused="its pixels are permuted")
    module.about_data = type(module.about_data)(module.inputs, raw, module.about_data.tasks)
    module.save(tmp_path / "bank")
    message = refused("predict", tmp_path / "bank", pictures, "--skip-bad")
    assert "its pixels are permuted" in message
