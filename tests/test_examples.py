"""What a user plugs in from outside: the examples run, and the pages about them are true."""

import ast
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from supsup_lightning import (
    GG,
    ContinualDataModule,
    ContinualModule,
    Given,
    Inference,
    LeNet,
    Method,
    OneShot,
    PermutedDigits,
)
from supsup_lightning.bank.rows import TaskRows
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.layout import Layout
from supsup_lightning.seeding import generator
from tests.conftest import QUIET, ROOT, digits_lenet, fit, run_cli_here, two_classes_of_images
from tests.test_config import composed

EXAMPLES = ROOT / "examples"
CONF = f"--config-dir={EXAMPLES / 'conf'}"
PAGES = {
    "my_datasets": ROOT / "docs" / "data" / "datasets.md",
    "my_modules": ROOT / "docs" / "data" / "lightning_data_modules.md",
    "my_network": ROOT / "docs" / "networks.md",
    "my_discovery": ROOT / "docs" / "discovery.md",
    "my_method": ROOT / "docs" / "plug_ins.md",
    "my_inference": ROOT / "docs" / "plug_ins.md",
    "my_stream": ROOT / "docs" / "plug_ins.md",
    "my_source": ROOT / "docs" / "plug_ins.md",
    "files": ROOT / "docs" / "data" / "files.md",  # of configuration alone
}
PLUG_INS = [name for name, page in PAGES.items() if page.name == "plug_ins.md"]
USER_FILES = [name for name in PAGES if name != "files"]

# Of four brightnesses the dark ones are apart in sign from the light ones; a network without biases sees no more.
CLASSES = ("black", "dark", "light", "white")
DARK_FROM_LIGHT = "data.stream.class_order=[0,3,1,2]"


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return two_classes_of_images(tmp_path / "images", per_class=15, classes=CLASSES)


def results(*overrides, folder):
    run_cli_here(*overrides, *QUIET, "eval_at=[]", "scenario=gg", "hydra.run.dir=run", cwd=folder)
    return json.loads((folder / "run" / "results.json").read_text())


# The examples run.


def test_torch_data_sets_and_a_network(tmp_path):
    found = results(CONF, "data=my_datasets", "network=my_network", "data.steps_per_task=60", folder=tmp_path)
    assert found["num_classes"] == [2] * 5
    assert found["average_accuracy"] > 0.8


def test_lightning_data_modules(tmp_path):
    options = ["data.steps_per_task=100"]
    found = results(CONF, "data=my_modules", *options, folder=tmp_path)
    assert found["num_classes"] == [2, 3, 5]
    assert found["average_accuracy"] > 0.9


def test_a_rule_of_discovery(tmp_path):
    options = ["discovery=my_discovery", "data.num_tasks=2", "data.steps_per_task=110"]
    run_cli_here(CONF, "scenario=nns", *options, *QUIET, "hydra.run.dir=run", cwd=tmp_path)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["learned_as"] == {"0": [0], "1": [1]}


def test_a_method(tmp_path):
    """Biases and gains alone, over random weights: less than a network of its own, far more than chance."""
    options = ["network=my_network", "data.num_tasks=2", "optimizer.lr=0.02"]
    found = results(CONF, "method=my_method", *options, folder=tmp_path)
    assert found["average_accuracy"] > 0.4
    assert found["forgetting"] is None or found["forgetting"] == 0
    num_vectors = 4 * 128 * 2 + found["num_classes"][0] * 10
    assert found["mask_bytes_per_task"] == 4 * num_vectors
    assert found["kept_bytes"]["seed"] == 8


def test_an_inference(tmp_path):
    run_cli_here(
        CONF, "inference=my_inference", "data.num_tasks=3", "eval_at=[]", *QUIET, "hydra.run.dir=run", cwd=tmp_path
    )
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["task_inference_accuracy"] > 0.85
    assert found["average_accuracy"] > 0.85


def test_a_stream(tmp_path):
    found = results(CONF, "data=my_stream", "data.num_tasks=2", "data.steps_per_task=150", folder=tmp_path)
    assert found["average_accuracy"] > 0.85
    data = instantiate(
        composed(f"hydra.searchpath=[file://{EXAMPLES / 'conf'}]", "data=my_stream", folder=tmp_path).data
    )
    data.setup()
    one, other = (next(iter(data.test_loader(task)))[0] for task in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one.flatten(1).sort(1).values, other.flatten(1).sort(1).values)  # the same pixels, moved


def test_a_source(tmp_path):
    draw = np.random.default_rng(0)
    labels = np.arange(400) % 10
    images = draw.integers(0, 100, (400, 1, 8, 8)) + 150 * (np.arange(64) % 10 == labels[:, None]).reshape(400, 1, 8, 8)
    halves = {"train": slice(None, 300), "test": slice(300, None)}
    arrays = {f"{half}_images": images[part].astype(np.uint8) for half, part in halves.items()}
    np.savez(tmp_path / "images.npz", **arrays, **{f"{half}_labels": labels[part] for half, part in halves.items()})
    options = [f"data.root={tmp_path}", "data.batch_size=32", "data.steps_per_task=60"]
    found = results(CONF, "data=my_source", *options, folder=tmp_path)
    assert found["num_classes"] == [2] * 5
    assert found["average_accuracy"] > 0.9


def test_a_plug_in_that_lacks_a_part_is_refused_by_name(tmp_path):
    class NoParts(Method):
        def begin_task(self, *tasks):
            self.live.begin(tasks)

    with pytest.raises(TypeError, match="abstract class NoParts .*finish_task.*live_parameters.*parts"):
        NoParts(torch.nn.Linear(2, 2))

    class OneForAll(Inference):
        finds_task = True

        def __call__(self, method, images, num_classes):
            return method.tasks[0]  # no task per image

    data = PermutedDigits(num_tasks=2, steps_per_task=2)
    with pytest.raises(ConfigurationError, match="OneForAll"):
        fit(digits_lenet(), data, folder=tmp_path, inference=OneForAll())


def test_a_method_without_superpositions_is_refused_where_one_is_needed():
    from examples.my_method import Biases

    method = Biases(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 20)))
    with pytest.raises(ConfigurationError, match="OneShot needs a superposition of the finished tasks, which Biases"):
        ContinualModule(method, inference=OneShot())
    data = PermutedDigits(num_tasks=4, steps_per_task=2, tasks_at_once=2)
    with pytest.raises(ConfigurationError, match="data.tasks_at_once=2 is for method=supsup; Biases"):
        ContinualModule(method, scenario=GG, inference=Given()).plan_training(data)


def test_a_users_method_trains_several_tasks_at_once_and_chooses_layers(tmp_path):
    class Own(Method):
        """Masks by a straight-through sign, with nothing of `SupSup`."""

        one_after_another = None

        def __init__(self, network):
            super().__init__(
                network, layout=Layout.choosing(network, lambda name, p: p.ndim >= 2), weights="kaiming_normal"
            )
            self.finished = TaskRows(values=(self.layout.num_weights, torch.float32))

        def begin_task(self, *tasks):
            drawn = [0.1 * torch.randn(self.layout.num_weights, generator=generator(0, "own", task)) for task in tasks]
            self.live.begin(tasks, drawn, self.base.fresh_statistics())

        def finish_task(self, *tasks):
            for row, task in enumerate(tasks):
                self.finished.append(task, values=(self.live.values[row] >= 0).float())
            self.live.end()

        def _weights(self):
            parameters = dict(self.network.named_parameters())
            return self.layout.flatten({name: parameters[name] for name in self.layout.names})

        def live_parameters(self, values):
            straight = (values >= 0).float() + values - values.detach()
            return self.layout.split(straight * self._weights())

        def finished_parameters(self, task):
            return self.layout.split(self.finished.read(task, "values") * self._weights())

        def superposed(self, coefficients=None):
            values = self.finished.get_buffer("values")
            equal = values.new_full((len(values),), 1 / len(values))
            mixed = (equal if coefficients is None else coefficients) @ values
            return self.layout.split(mixed * self._weights())

        def project(self, gradients, rows=None):
            batch_dims = next(iter(gradients.values())).ndim - len(self.layout.shapes[0])
            vector = self.layout.flatten(gradients, batch_dims=batch_dims) * self._weights()
            products = vector @ self.finished.get_buffer("values").T
            return products if rows is None else products[..., rows]

        def parts(self):
            return []

    data = PermutedDigits(num_tasks=3, steps_per_task=60, tasks_at_once=2)
    method = Own(LeNet(output_size=20, input_shape=(1, 8, 8)))
    inference = OneShot("entropy", images="batch", layers=["1.*"])
    module, trainer = fit(method, data, folder=tmp_path, inference=inference)
    assert method.tasks.tolist() == [0, 1, 2]
    trainer.test(module, data, verbose=False)
    _, found = module.test_accuracy.compute()
    assert found.mean() > 0.6
    with pytest.raises(ConfigurationError, match=r"the pattern '9\.\*' matches no masked parameter"):
        fit(Own(LeNet(output_size=20, input_shape=(1, 8, 8))), data, folder=tmp_path, inference=OneShot(layers=["9.*"]))


def test_a_folder_of_images_with_a_damaged_one(tmp_path, images):
    (images / "dark" / "3.png").write_text("no image")
    options = [f"data.root={images}", "data.batch_size=16", "data.steps_per_task=40", DARK_FROM_LIGHT]
    found = results(CONF, "data=my_folder", *options, "data.on_error=skip", folder=tmp_path)
    assert found["num_classes"] == [2, 2]
    assert found["skipped_images"] == 1
    assert found["average_accuracy"] > 0.9


def test_a_table_of_images_and_a_network_from_a_folder_of_the_users(tmp_path, images):
    """Modules are found in the current folder, whatever that is."""
    users_folder(tmp_path, my_table="birds", my_network="rows")
    options = [f"data.root={images}", "data.batch_size=16", "data.steps_per_task=40", DARK_FROM_LIGHT]
    choices = ["data=birds", "network=rows", "data.in_memory=false", "data.num_workers=0"]
    found = results("--config-dir=conf", *choices, *options, folder=tmp_path)
    assert (found["data"], found["network"]) == ("birds", "rows")
    assert found["num_classes"] == [2, 2]
    assert found["average_accuracy"] > 0.9


def users_folder(folder: Path, **names: str) -> Path:
    """Examples copied into a folder of the user's, under other names: the class, if it has one, and the YAML."""
    for example, name in names.items():
        for source in EXAMPLES.glob(f"{example}.py"):
            (folder / f"{name}.py").write_text(source.read_text())
        for source in (EXAMPLES / "conf").glob(f"*/{example}.yaml"):
            target = folder / "conf" / source.parent.name / f"{name}.yaml"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text().replace(f"examples.{example}.", f"{name}."))
    return folder


def test_the_three_streams_of_a_pair_of_data_sets():
    from examples.my_datasets import DigitImages

    train, test = DigitImages(train=True), DigitImages(train=False)
    streams = (
        ContinualDataModule.split(train, test, classes_per_task=2, in_memory=True),
        ContinualDataModule.permuted(train, test, num_tasks=3, in_memory=True),
        ContinualDataModule.rotated(train, test, degrees=45, in_memory=True),
    )
    for data, num_classes in zip(streams, ([2] * 5, [10] * 3, [10] * 8), strict=True):
        data.setup()
        assert list(data.num_classes) == num_classes
        pixels, labels = next(iter(data.train_loader(data.num_tasks - 1)))
        assert pixels.shape == (128, 1, 8, 8)
        assert labels.max() < num_classes[0]


# The pages are true.


@pytest.mark.parametrize("name", USER_FILES)
def test_a_user_writes_ten_lines_and_the_page_shows_them(name):
    written = lines_of_code((EXAMPLES / f"{name}.py").read_text())
    assert len(written) <= 10
    page = PAGES[name].read_text().splitlines()
    assert [line for line in written if line not in page] == []


def lines_of_code(source: str) -> list[str]:
    """All but blank lines, comments, docstrings and imports."""
    skipped = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    numbered = enumerate(source.splitlines(), start=1)
    return [line for number, line in numbered if line.strip() and line.strip()[0] != "#" and number not in skipped]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[name].read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", USER_FILES)
def test_python_on_the_page_compiles(name):
    assert len(blocks(name, "python")) >= 2
    for block in blocks(name, "python"):
        compile(block, PAGES[name].name, "exec")


@pytest.mark.parametrize("name", PAGES)
def test_every_command_on_the_page_composes(name, tmp_path):
    if name == "files":
        write_configurations(tmp_path)
    elif name in PLUG_INS:
        users_folder(tmp_path, **{each: each for each in PLUG_INS})
    else:
        users_folder(tmp_path, **{name: name if name in ("my_network", "my_discovery") else "my_data"})
    commands = [line for block in blocks(name, "sh") for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) >= 2
    for command in commands:
        script, *words = shlex.split(command)
        if script == "python":
            assert words.pop(0) == "train.py"
        else:
            assert script == "supsup-train"
        folders = {"examples/conf": EXAMPLES / "conf", "conf": tmp_path / "conf"}
        if words[0] == "--config-dir":
            words = [f"hydra.searchpath=[file://{folders[words[1]]}]", *words[2:]]
        config = composed(*words, folder=tmp_path)
        OmegaConf.resolve(config)
        assert config.data._target_.startswith("supsup_lightning.")


def write_configurations(folder: Path) -> None:
    """The YAML blocks of the page about files, each to the path in its first line."""
    for block in blocks("files", "yaml"):
        path = folder / block.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)


@pytest.mark.parametrize(("name", "num_classes"), [("my_mixture", [10, 10, 2, 2, 4]), ("my_domains", [4, 4])])
def test_several_data_sets_in_one_run(name, num_classes, tmp_path, images):
    for tree in ("flowers", "birds", "photographs", "drawings"):
        two_classes_of_images(images / tree, per_class=5, classes=CLASSES)
    write_configurations(tmp_path)
    search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    data = instantiate(composed(search, f"data={name}", f"data.root={images}", folder=tmp_path).data)
    data.setup()
    assert list(data.num_classes) == num_classes
    for task in range(data.num_tasks):
        pixels, labels = next(iter(data.test_loader(task)))
        assert pixels.shape[1:] == (3, 32, 32)
        assert labels.max() < num_classes[task]
