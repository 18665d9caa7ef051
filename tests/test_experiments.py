"""Every experiment file says what it claims, and runs."""

import re
import runpy

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import open_dict
from torch.utils.data import TensorDataset

from supsup_lightning.report import drawing
from supsup_lightning.report.plots import Point, accuracy_against_bytes
from supsup_lightning.report.summary import read_json
from tests.conftest import ROOT
from tests.test_config import composed
from train import train

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


# Of the paper's settings: tasks, output_size, optimizer, learning rate, and what names the method.
SETTINGS = {
    "permuted_mnist_250_lenet": (250, 100, "RMSprop", 1e-4, "SupSup"),
    "permuted_mnist_250_fc1024": (250, 500, "RMSprop", 1e-4, "SupSup"),
    "permuted_mnist_250_batch_ensemble": (250, 10, "Adam", 1e-4, "BatchEnsemble"),
    "permuted_mnist_250_psp": (250, 10, "RMSprop", 1e-4, "PSP"),
    "permuted_mnist_2500_gg": (2500, 500, "RMSprop", 1e-4, "SupSup"),
    "permuted_mnist_2500_gnu": (2500, 500, "RMSprop", 1e-4, "SupSup"),
    "permuted_mnist_2500_nns": (2500, 500, "RMSprop", 1e-4, "SupSup"),
    "rotated_mnist_36": (36, 200, "RMSprop", 1e-4, "SupSup"),
    "rotated_mnist_36_batch_ensemble": (36, 10, "Adam", 1e-4, "BatchEnsemble"),
    "rotated_mnist_36_psp": (36, 10, "RMSprop", 1e-4, "PSP"),
    "split_mnist_hopfield": (5, 10, "SGD", 0.1, "HopSupSup"),
    "split_cifar100_supsup": (20, 5, "Adam", 1e-3, "SupSup"),
    "split_cifar100_transfer": (20, 5, "Adam", 1e-3, "SupSup"),
    "split_cifar100_upper_bound": (20, 5, "Adam", 1e-3, "UpperBound"),
    "split_cifar100_lower_bound": (20, 5, "Adam", 1e-3, "LowerBound"),
    "split_cifar100_separate_heads": (20, 5, "Adam", 1e-3, "SeparateHeads"),
    "split_cifar100_batch_ensemble": (20, 5, "Adam", 0.1, "BatchEnsemble"),
    "split_imagenet_supsup": (100, 10, "Adam", 1e-3, "SupSup"),
}


def test_there_is_a_row_here_for_each():
    assert set(SETTINGS) == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_it_claims_and_costs_stands_at_its_top(name):
    head = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert all(f"# {word}: " in head for word in ("Source", "Cost", "Command"))
    assert re.search(rf"experiment={name}\b", head)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_has_the_papers_settings(name, tmp_path):
    config = composed(f"experiment={name}", folder=tmp_path)
    tasks, output_size, optimizer, rate, method = SETTINGS[name]
    assert config.network.output_size == output_size
    assert config.optimizer._target_ == f"torch.optim.{optimizer}"
    assert config.optimizer.lr == rate
    assert config.method._target_ == f"supsup_lightning.{method}"
    if config.data.num_tasks is not None:  # else all that there are
        assert config.data.num_tasks == tasks


def random_images(num_classes: int, per_class: int, *, shape: list[int]) -> TensorDataset:
    """In place of a data set that this machine may not have."""
    labels = torch.arange(num_classes).repeat(per_class)
    images = torch.randint(256, (len(labels), *shape), dtype=torch.uint8)
    return TensorDataset(images, labels)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_composes_and_runs_on_random_images(name, tmp_path):
    """All of `train.py` with the experiment's own options, in a few steps."""
    image_net = "imagenet" in name
    overrides = ["logger=none", "data.num_tasks=2", "eval_at=[]", "data.steps_per_task=3", "data.epochs_per_task=null"]
    config = composed(
        f"experiment={name}",
        *overrides,
        "data.batch_size=8",
        *(["data.input_shape=[3,64,64]", "data.augment=none"] if image_net else []),
        *(["discovery.every=2"] if name.endswith("nns") else []),
        folder=tmp_path,
    )
    num_classes = 100 if "cifar" in name or image_net else 10
    with open_dict(config.data):
        config.data.stream.source = {"_target_": "supsup_lightning.data.Datasets"}
        for half, count in (("train", 30), ("test", 4)):
            config.data.stream.source[half] = {
                "_target_": "tests.test_experiments.random_images",
                "num_classes": num_classes,
                "per_class": count,
                "shape": config.data.input_shape,
            }
    returned = train.__wrapped__(config)
    results = read_json(tmp_path / "results.json")
    assert results["optimized_metric"] == {"name": "validation_accuracy", "value": returned}
    assert (returned is None) == name.endswith("nns")  # where nothing is validated
    assert results["num_tasks"] == 2
    assert results["model_bytes"] == (tmp_path / "mask_bank.safetensors").stat().st_size


def test_the_papers_optimizer_keeps_its_constant_rate_where_nobody_announces_tasks(tmp_path):
    config = composed("experiment=permuted_mnist_2500_nns", folder=tmp_path)
    assert config.schedule._target_ == "supsup_lightning.schedules.constant"
    assert config.discovery._target_ == "supsup_lightning.GradientDiscovery"


def rows_of_the_comparison() -> list[tuple[str, list[str]]]:
    compare = runpy.run_path(str(ROOT / "benchmarks" / "compare.py"), run_name="compare")
    rows = []
    for data, network in (("PERMUTED_MNIST", "lenet"), ("HIDDEN", "lenet"), ("SPLIT_CIFAR100", "gem_resnet18")):
        common = ["scenario=gg", f"network={network}", "network.output_size=20"]
        rows += [(row.name, compare["overrides"](row, common)) for row in compare[data]]
    return rows


@pytest.mark.parametrize(("name", "overrides"), rows_of_the_comparison())
def test_every_row_of_the_comparison_composes(name, overrides, tmp_path):
    module = instantiate(composed(*overrides, folder=tmp_path).module)
    assert not module.method.live.tasks
    assert module.scenario.task_known_at_inference == ("hidden" not in name)


def test_the_figure_of_the_comparison_is_drawn(tmp_path):
    points = [
        Point("one", 1000, 0.9, "a"),
        Point("beside it", 1100, 0.91, "b", published=True),
        Point("line", None, 1, "c"),
    ]
    path = drawing.save(accuracy_against_bytes(points, title=""), tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
