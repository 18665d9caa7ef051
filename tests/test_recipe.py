"""Files as products: a model that predicts as the one that was saved, on a machine that never saw the run."""

import json
import os
import subprocess
import sys
import zlib
from contextlib import suppress
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import supsup_lightning
from supsup_lightning import (
    GG,
    GNS,
    PSP,
    BatchEnsemble,
    ContinualDataModule,
    ContinualModule,
    Discriminant,
    Exhaustive,
    GEMResNet18,
    Given,
    HopfieldRecovery,
    HopNet,
    HopSupSup,
    LeNet,
    LowerBound,
    MaskOptions,
    OneShot,
    SeparateHeads,
    SmallNetworks,
    SupSup,
    UpperBound,
    load,
)
from supsup_lightning.bank import codec, entropy_coding
from supsup_lightning.data import Digits, Split
from supsup_lightning.data.inputs import Inputs
from supsup_lightning.data.naming import AboutData, TaskDescription
from supsup_lightning.data.raw_images import RawImages
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError, SupSupError
from supsup_lightning.networks import torchvision_model
from supsup_lightning.recipe.recorded import description_of
from tests.conftest import DIGITS, ROOT, TINY, fit, random_images, run_cli_here
from tests.test_damage import damage, refused_in_a_process_of_its_own

TIMES = int(os.environ.get("SUPSUP_FUZZ", "1"))
FUZZ = settings(
    max_examples=200 * TIMES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=TIMES == 1,
    database=None,
)

CLASSES = ("ant", "bee", "cat")


def finished(method, num_tasks: int = 3, *, shape: tuple[int, ...] = DIGITS, **options) -> ContinualModule:
    """A module with random masks, which knows of data what training would have told it."""
    for task in range(num_tasks):
        method.begin_task(task)
        method.finish_task(task)
    module = ContinualModule(method, **{"inference": OneShot(), **options})
    module.num_classes = (3,) * num_tasks
    module.inputs = Inputs(shape, torch.float32)
    raw = RawImages(shape=shape, mean=(10.0,) * shape[0], std=(50.0,) * shape[0])
    tasks = tuple(TaskDescription(f"zoo {task}", CLASSES) for task in range(num_tasks))
    module.about_data = AboutData(module.inputs, raw, tasks)
    return module


def small_lenet(**options) -> LeNet:
    return LeNet(output_size=12, input_shape=DIGITS, width=0.1, **options)


def same_answers(one: ContinualModule, other: ContinualModule, images, **options) -> bool:
    a, b = one.predict(images, **options), other.predict(images, **options)
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("label", "confidence", "unknown"))
    return tensors and a.class_name == b.class_name


METHODS = {
    "threshold": lambda: finished(SupSup(small_lenet(), seed=3)),
    "a function as rule": lambda: finished(
        SupSup(small_lenet(), mask=MaskOptions(is_masked=lambda name, parameter: parameter.shape[0] > 10))
    ),
    "rotations": lambda: finished(SupSup(small_lenet(), superfluous="rotations"), inference=Exhaustive("consistency")),
    "topk": lambda: finished(SupSup(small_lenet(), rule="topk", sparsity=0.9), inference=OneShot(layers="first")),
    "upper_bound": lambda: finished(UpperBound(small_lenet()), inference=Exhaustive(images="batch")),
    "small_networks": lambda: finished(
        SmallNetworks(partial(LeNet, output_size=12, input_shape=DIGITS)), inference=Exhaustive()
    ),
    "lower_bound": lambda: finished(LowerBound(small_lenet()), inference=Given(), scenario=GG),
    "psp": lambda: finished(PSP(small_lenet()), inference=Exhaustive()),
    "batch_ensemble": lambda: finished(BatchEnsemble(small_lenet()), inference=Exhaustive()),
    "random trunk": lambda: finished(BatchEnsemble(small_lenet(), trunk="random"), inference=Exhaustive()),
    "separate_heads": lambda: finished(SeparateHeads(small_lenet()), inference=Exhaustive()),
    "hopfield": lambda: finished(
        HopSupSup(HopNet(output_size=12, input_shape=DIGITS, hidden_sizes=(16,))),
        inference=HopfieldRecovery(),
        scenario=GNS,
    ),
    "normalisation": lambda: finished(SupSup(GEMResNet18(output_size=5, base_channels=2)), shape=(3, 32, 32)),
    "torchvision": lambda: finished(
        SupSup(torchvision_model(name="squeezenet1_1", output_size=5, input_shape=(1, 32, 32))), 1, shape=(1, 32, 32)
    ),
    "stored weights": lambda: finished(SupSup(small_lenet(), weights="keep", store_weights=True)),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_model_predicts_as_the_saved_one(name, tmp_path):
    module, path = METHODS[name](), tmp_path / "bank.safetensors"
    module.save(path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert type(loaded.inference) is type(module.inference)
    options = {"task": 1} if module.scenario is GG else {"together": True} if name == "hopfield" else {}
    images = torch.randn(5, *module.inputs.shape, generator=torch.Generator().manual_seed(0))
    assert same_answers(module, loaded, images, **options)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    type(module.method).load(loaded.method, path)  # as any file of the method


def test_a_run_s_bank_predicts_in_an_empty_folder(tmp_path):
    """In a process of its own, which has the file and nothing else."""
    run_cli_here(*TINY, "data=split_digits", "inference=discriminant", "hydra.run.dir=run", cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "run" / "mask_bank.safetensors").rename(empty / "bank.safetensors")
    program = """
import supsup_lightning, sklearn.datasets, torch
model = supsup_lightning.load("bank.safetensors")
digits = sklearn.datasets.load_digits()
found = model.predict(torch.tensor(digits.images[:200]).to(torch.uint8).unsqueeze(1))
print(sum(name == str(right) for name, right in zip(found.class_name, digits.target)), found.task_name[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=empty,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    right, _, name = done.stdout.strip().partition(" ")
    assert int(right) > 60  # two of five tasks are known, and 80 of these images are of them
    assert name.count(",") == 1
    recipe = codec.read_recipe(empty / "bank.safetensors")
    assert set(recipe["accuracy"]) == {"validation", "test"}


def test_a_user_s_network_is_handed_over_or_trusted(tmp_path, monkeypatch):
    overrides = ["--config-dir", str(ROOT / "examples" / "conf"), "network=my_network", "network.hidden_size=16"]
    run_cli_here(*overrides, *TINY, "hydra.run.dir=run", cwd=tmp_path)
    path = tmp_path / "run" / "mask_bank.safetensors"
    with pytest.raises(ConfigurationError, match="could be any program"):
        load(path)
    monkeypatch.syspath_prepend(ROOT)
    trusted = load(path, trust=True)
    from examples.my_network import RowLSTM

    handed = load(path, network=RowLSTM(output_size=100, input_shape=DIGITS, hidden_size=16))
    assert same_answers(trusted, handed, random_images(4))
    with pytest.raises(MismatchError, match="handed over is not that of the file"):
        load(path, network=RowLSTM(output_size=100, input_shape=DIGITS, hidden_size=17))


def test_what_the_file_cannot_make_is_said(tmp_path):
    path = tmp_path / "bank.safetensors"
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    finished(SupSup(network)).save(path)
    with pytest.raises(ConfigurationError, match=r"lacks the arguments .* load\(path, network="):
        load(path)
    load(path, network=nn.Sequential(nn.Flatten(), nn.Linear(64, 12)))
    finished(SupSup(small_lenet(), weights="keep")).save(path)
    with pytest.raises(ConfigurationError, match="neither in it nor drawn"):
        load(path)
    finished(SupSup(small_lenet(), superfluous=[torch.neg]), inference=Exhaustive("consistency")).save(path)
    with pytest.raises(ConfigurationError, match="lacks superfluous"):
        load(path)
    module = finished(SupSup(small_lenet()))
    module.method.save(path)
    with pytest.raises(DataError, match="finished tasks alone"):
        load(path)


def test_a_network_that_was_changed_is_refused(tmp_path):
    """All weights are the same, and what lies between them is not."""
    path = tmp_path / "bank.safetensors"
    changed = small_lenet()
    changed[2] = nn.GELU()
    finished(SupSup(changed)).save(path)
    with pytest.raises(MismatchError, match="does not compute what was trained"):
        load(path)
    again = small_lenet()
    again[2] = nn.GELU()
    load(path, network=again)


def test_options_that_were_set_later_are_written(tmp_path):
    module = finished(SupSup(small_lenet()))
    module.inference.images = "batch"
    module.save(tmp_path / "bank.safetensors")
    assert load(tmp_path / "bank.safetensors").inference.images == "batch"
    assert load(tmp_path / "bank.safetensors", inference=Exhaustive()).inference.images == 1


def test_a_subclass_is_not_taken_for_its_base_class():
    class Own(LeNet):
        def forward(self, images):
            return super().forward(images.abs())

    description = description_of(Own(output_size=3))
    assert description["_target_"].endswith("Own")
    assert "_lacks_" in description


def test_merged_tasks_keep_their_names(tmp_path):
    one = finished(SupSup(small_lenet()), 2)
    other = ContinualModule(SupSup(small_lenet()), inference=OneShot())
    for task in (2, 4):
        other.method.begin_task(task)
        other.method.finish_task(task)
    other.num_classes, other.inputs = (2,) * 5, one.inputs
    raw = RawImages(shape=DIGITS, mean=(0.0,), std=(1.0,))
    other.about_data = AboutData(one.inputs, raw, tuple(TaskDescription(f"sea {i}", ("eel", "ray")) for i in range(5)))
    other.accuracies = {"test": {0: 0.1, 4: 0.9}}
    other.save(tmp_path / "other.safetensors")
    one.merge(tmp_path / "other.safetensors")
    one.save(tmp_path / "both.safetensors")
    both = load(tmp_path / "both.safetensors")
    assert both.predict(random_images(4), task=[0, 1, 2, 4]).task_name == ["zoo 0", "zoo 1", "sea 2", "sea 4"]
    assert both.num_classes == (3, 3, 2, 1, 2)
    assert both.accuracies["test"] == {4: 0.9}
    with pytest.raises(DataError, match="images that were prepared differently"):
        both.predict(Image.new("L", (8, 8)))
    other.inputs = Inputs((1, 4, 16), torch.float32)
    other.about_data = AboutData(other.inputs, raw, ())
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="inputs of shape"):
        finished(SupSup(small_lenet()), 2).merge(tmp_path / "other.safetensors")
    other.method.save(tmp_path / "plain.safetensors")
    with pytest.raises(DataError, match="does not say what its tasks are called"):
        one.merge(tmp_path / "plain.safetensors")


# Predictions.


def test_each_image_decides_by_itself_unless_told():
    module = finished(SupSup(small_lenet()), inference=OneShot("entropy", images=1))
    images = random_images(30)
    alone = torch.cat([module.infer(image)[0] for image in images.split(1)])
    assert len(alone.unique()) > 1
    found = module.predict(images)
    assert torch.equal(found.task, alone)
    assert torch.equal(module.predict(images, together=True).task, alone[:1].expand(30))
    module.inference.images = "each"
    with pytest.raises(ConfigurationError, match="together=True has no effect"):
        module.predict(images, together=True)


def test_a_prediction_has_names_and_probabilities():
    module = finished(SupSup(small_lenet()))
    images = random_images(8)
    found = module.predict(images)
    assert len(found) == 8
    for place, (task, label) in enumerate(zip(found.task.tolist(), found.label.tolist(), strict=True)):
        probabilities = module.method(images[place : place + 1], task)[0, :3].softmax(0)
        torch.testing.assert_close(found.confidence[place], probabilities.max())
        assert found.class_name[place] == CLASSES[label]
        assert found.task_name[place] == f"zoo {task}"
    assert not found.unknown.any()
    assert len(module.predict(images[:0])) == 0


def test_a_task_may_be_given():
    module = finished(LowerBound(small_lenet()), inference=Given(), scenario=GG)
    with pytest.raises(ConfigurationError, match="say which it is"):
        module.predict(random_images(2))
    assert module.predict(random_images(2), task=[2, 0]).task_name == ["zoo 2", "zoo 0"]
    for wrong in (3, [0], [0, 7], "1"):
        with pytest.raises(ConfigurationError, match="neither a finished task"):
            module.predict(random_images(2), task=wrong)


def test_unknown_inputs_are_told_apart(tmp_path):
    data = ContinualDataModule(Split(Digits(), classes_per_task=2), num_tasks=2, steps_per_task=40)
    method = SupSup(LeNet(output_size=20, input_shape=DIGITS))
    module, _ = fit(method, data, folder=tmp_path, inference=Discriminant(unknown=0.05))
    module.save(tmp_path / "bank.safetensors")
    loaded = load(tmp_path / "bank.safetensors")
    noise = torch.randint(0, 17, (20, *DIGITS), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = loaded.predict(noise)
    assert found.unknown.float().mean() > 0.5
    place = int(found.unknown.int().argmax())
    assert (found.task[place], found.label[place], found.confidence[place]) == (-1, -1, 0)
    assert found.task_name[place] is found.class_name[place] is None
    images, _ = next(iter(data.test_loader(1)))
    assert loaded.predict(images).unknown.float().mean() < 0.3
    # Bytes are prepared as in training, and pictures of another range are not.
    raw = (images * data._task(1).test.std + data._task(1).test.mean).round().to(torch.uint8)
    assert same_answers(loaded, module, raw)
    torch.testing.assert_close(loaded.predict(raw).confidence, loaded.predict(images).confidence)
    with pytest.raises(DataError, match="values from 0 to 16"):
        loaded.predict(Image.new("L", (8, 8), 200))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_pictures_of_any_size_and_mode(mode):
    module = finished(SupSup(small_lenet()))
    grey = Image.new("L", (8, 8), 255)
    picture = Image.new("I;16", (20, 31), 65535) if mode == "I;16" else Image.new("L", (20, 31), 255).convert(mode)
    assert torch.allclose(module.predict(picture).confidence, module.predict(grey).confidence)


def test_raw_images_in_lists_and_files(tmp_path):
    module = finished(SupSup(small_lenet()))
    pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(each.numpy()) for each in pixels]
    pictures[0].save(tmp_path / "one.png")
    prepared = (pixels.float().unsqueeze(1) - 10) / 50
    expected = module.predict(prepared)
    mixed = [tmp_path / "one.png", pictures[1], pixels[2].unsqueeze(0)]
    for images in (pixels.unsqueeze(1), pictures, mixed, [*prepared]):
        assert torch.equal(module.predict(images).confidence, expected.confidence)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (3, "are a tensor"),
        ([], "empty list"),
        ([3], "neither a tensor"),
        ("nowhere.png", "nowhere.png"),
        (torch.zeros(2, 1, 9, 9, dtype=torch.uint8), "must have shape"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "unsqueeze"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.float64), "float64"),
        (torch.full((2, 1, 8, 8), torch.nan), "nan"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(DataError, match=message):
        finished(SupSup(small_lenet())).predict(images)


def test_permuted_pixels_are_not_made_of_pictures(tmp_path, digits):
    module, _ = fit(SupSup(LeNet(output_size=20, input_shape=DIGITS)), digits, folder=tmp_path)
    with pytest.raises(DataError, match="each task transforms its images"):
        module.predict(Image.new("L", (8, 8)))
    assert module.name_of_task(2) == "permutation 2"
    state = module.state_dict()
    fresh = ContinualModule(SupSup(LeNet(output_size=20, input_shape=DIGITS)), inference=OneShot())
    fresh.load_state_dict(state)
    assert fresh.about_data.tasks == module.about_data.tasks
    assert fresh.about_data.raw == module.about_data.raw


# Sizes.


def test_the_file_of_100_tasks_is_small(tmp_path):
    module, path = finished(SupSup(LeNet(output_size=100), rule="topk", sparsity=0.9), 100, shape=(1, 28, 28)), tmp_path
    module.save(path / "with.safetensors")
    module.method.save(path / "without.safetensors")
    whole, masks = ((path / f"{name}.safetensors").stat().st_size for name in ("with", "without"))
    ones = entropy_coding.count(module.method.bank.packed, module.method.layout.sizes)
    limit = float(entropy_coding.entropy_bytes(ones, module.method.layout.sizes).sum())
    assert masks <= 1.02 * limit + 4096
    assert whole - masks < 2048


# Hostile files.


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """A file, and what its model predicts."""
    path = tmp_path_factory.mktemp("product") / "bank.safetensors"
    finished(SupSup(small_lenet(), rule="topk", sparsity=0.9), inference=Exhaustive()).save(path)
    return path, load(path).predict(random_images(3)).confidence


@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_refused_or_predicts_the_same(product, data):
    path, expected = product
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(data.draw(damage(path.read_bytes())))
    try:
        found = load(damaged).predict(random_images(3))
    except SupSupError:
        return
    assert torch.equal(found.confidence, expected)


def rewritten(path, target, change) -> None:
    """Write a file anew with another recipe, and with the digests that it should have."""
    tensors, identity = codec._checked(path)
    recipe = codec.read_recipe(path)
    change(recipe)
    file_format = identity.pop("format")
    del tensors["recipe"]
    codec.write(target, tensors, file_format=file_format, identity=identity, recipe=recipe)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["os.system", "supsup_lightning.networks.LeNet", "_target_", "float32", "inference_mode", {}, []]),
)


@FUZZ
@given(data=st.data())
def test_a_made_up_recipe_is_refused_or_makes_a_model(product, data):
    path, _ = product

    def change(recipe) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            place = recipe
            while True:
                keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
                key = data.draw(st.sampled_from(keys))
                inner = place[key]
                if not isinstance(inner, (dict, list)) or not inner or data.draw(st.integers(0, 3)) == 0:
                    break
                place = inner
            if data.draw(st.integers(0, 4)) == 0 and len(place) > 1:
                del place[key]
            else:
                place[key] = data.draw(LEAVES)

    made_up = path.with_name("made_up.safetensors")
    rewritten(path, made_up, change)
    with suppress(SupSupError):
        load(made_up).predict(random_images(2))


def put(recipe, *keys, value) -> None:
    for key in keys[:-1]:
        recipe = recipe[key]
    recipe[keys[-1]] = value


HOSTILE = {
    "many outputs": (("network", "output_size"), 2**40),
    "wide layers": (("network", "width"), 1e300),
    "more weights than the file can mask": (("network", "output_size"), 10**6),
    "large inputs": (("inputs", "shape"), [2**20, 2**20]),
    "a program": (("network",), {"_target_": "os.system", "command": "touch hacked"}),
    "a program as method": (("method", "_target_"), "os.system"),
    "a program as inference": (("inference",), {"_target_": "builtins.exec", "source": "1"}),
    "a program as an argument": (("method", "mask"), {"_target_": "subprocess.run", "args": ["touch", "hacked"]}),
    "a function of the package": (("network", "_target_"), "supsup_lightning.files.replacing"),
    "a network as scenario": (("scenario",), {"_target_": "supsup_lightning.networks.LeNet", "output_size": 3}),
    "weights to download": (
        ("network",),
        {
            "_target_": "supsup_lightning.networks.torchvision_model",
            "name": "resnet18",
            "output_size": 12,
            "weights": "x",
        },
    ),
    "a checkpoint to unpickle": (
        ("network",),
        {
            "_target_": "supsup_lightning.networks.timm_model",
            "name": "resnet10t",
            "output_size": 12,
            "options": {"checkpoint_path": "evil.pth"},
        },
    ),
    "a model from a hub": (
        ("network",),
        {"_target_": "supsup_lightning.networks.timm_model", "name": "hf-hub:evil/model", "output_size": 12},
    ),
    "timm's own builder": (
        ("network",),
        {"_target_": "timm.create_model", "model_name": "resnet10t", "checkpoint_path": "evil.pth"},
    ),
    "no class counts": (("num_classes",), []),
    "a newer version": (("version",), 99),
    "deep brackets": (("tasks",), json.loads("[" * 200 + "]" * 200)),
    "other logits": (("fingerprint", "0"), [[1.0] * 6] * 2),
}


def test_what_is_hostile_is_refused_in_little_memory(product, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.safetensors"
    for name, (keys, value) in HOSTILE.items():
        rewritten(product[0], path, lambda recipe, keys=keys, value=value: put(recipe, *keys, value=value))
        message, grown = refused_in_a_process_of_its_own(partial(load, path))
        assert message.startswith("refused"), (name, message)
        assert len(message) < 1500, name
        assert grown < 150, (name, grown)
    assert [each.name for each in tmp_path.iterdir()] == ["hostile.safetensors"]


@pytest.mark.parametrize(
    "recipe",
    [
        zlib.compress(bytes(300_000_000), 9),
        zlib.compress(b"[" * 1_000_000, 9),
        zlib.compress(b"{}"),
        zlib.compress(b"1"),
        b"not compressed",
        b"",
    ],
    ids=["zeros", "brackets", "empty", "a number", "not compressed", "nothing"],
)
def test_a_recipe_that_is_none_is_refused_in_little_memory(recipe, product, tmp_path):
    tensors, identity = codec._checked(product[0])
    tensors["recipe"] = torch.tensor(list(recipe), dtype=torch.uint8)
    path = tmp_path / "hostile.safetensors"
    codec.write(path, tensors, file_format=identity.pop("format"), identity=identity)
    message, grown = refused_in_a_process_of_its_own(partial(load, path))
    assert message.startswith("refused"), message
    assert grown < 150
    assert supsup_lightning.load is load
