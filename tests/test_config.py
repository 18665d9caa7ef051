import random
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

import supsup_lightning.cli.command_line  # noqa: F401 (registers the resolver that the configuration uses)
from supsup_lightning.bank.hopfield_memory import PUBLISHED
from supsup_lightning.cli import effects
from supsup_lightning.runs.loggers import configurations
from tests.conftest import ROOT, run_cli, two_classes_of_images

FILES = sorted(
    path.relative_to(ROOT / "conf").with_suffix("").as_posix()
    for path in (ROOT / "conf").rglob("*.yaml")
    if path.name != "train.yaml" and path.parent.name != "options"  # options are part of other files
)


def composed(*overrides: str, folder: Path, conf: Path = ROOT / "conf"):
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    with open_dict(config.hydra):
        config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config.hydra
    return config


def test_there_are_files_for_the_contract():
    assert {"scenario/gg", "data/permuted_mnist", "network/fc1024", "trainer/ddp_cpu", "logger/wandb"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_instantiates(file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    group, name = file.rsplit("/", 1)
    overrides = [f"{group}={name}"]
    if name in ("image_folder", "image_csv"):
        overrides.append(f"data.root={two_classes_of_images(tmp_path)}")
    if file == "data/stream/whole":
        overrides.append("data.num_tasks=1")
    if group in ("order", "discovery") or file == "callbacks/discovery":
        overrides.insert(0, "scenario=nns")
    if file == "inference/given":
        overrides.append("scenario=gg")
    if file == "mask/gains" or name.startswith("hopfield"):
        overrides.insert(0, "method=hopfield")
    if name in ("gpu", "ddp") and group == "trainer" and not torch.cuda.is_available():
        overrides.append("trainer.accelerator=cpu")  # everything but the device
    if name == "ddp" and not torch.cuda.is_available():
        overrides.append("trainer.devices=1")
    if file == "method/hopfield":
        overrides = overrides[:1]
    config = composed(*overrides, folder=tmp_path)
    OmegaConf.resolve(config)
    data, module = instantiate(config.datamodule), instantiate(config.module)
    module.plan_training(data, accelerator=config.trainer.accelerator)
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    loggers = [instantiate(options, **more) for options, more in configurations(config)]
    trainer = instantiate(config.trainer, max_epochs=1, callbacks=callbacks, logger=loggers or False)
    assert module.method.layout.num_weights > 0
    assert isinstance(module.make_optimizer(module.method.trainable()), torch.optim.Optimizer)
    assert trainer.reload_dataloaders_every_n_epochs == 1
    assert "max_epochs" not in config.trainer  # train.py takes it from the data
    assert data.num_epochs >= 1


def test_the_published_recovery_is_the_one_in_python(tmp_path):
    config = composed("method=hopfield", "inference=hopfield_published", folder=tmp_path)
    assert instantiate(config.inference).descent == PUBLISHED


def test_choices_that_belong_together_come_together(tmp_path):
    assert composed("scenario=gg", folder=tmp_path).inference._target_ == "supsup_lightning.Given"
    assert (
        composed("scenario=gg", "inference=one_shot", folder=tmp_path).inference._target_ == "supsup_lightning.OneShot"
    )
    hopfield = composed("method=hopfield", folder=tmp_path)
    assert hopfield.inference._target_ == "supsup_lightning.HopfieldRecovery"
    assert hopfield.network._target_ == "supsup_lightning.networks.HopNet"
    assert hopfield.scenario.path == "supsup_lightning.GNS"
    assert "recovery" in hopfield.callbacks
    assert "recovery" not in composed(folder=tmp_path).callbacks
    assert composed("optimizer=rmsprop", folder=tmp_path).schedule._target_ == "supsup_lightning.schedules.constant"


LINES = (
    (),
    ("method=hopfield",),
    ("method=small_networks", "network=fc1024"),
    ("method=psp", "scenario=gnu", "inference=exhaustive"),
    ("scenario=nns", "optimizer=rmsprop", "order=recurring"),
    ("scenario=nns", "callbacks=none", "schedule=cosine"),
    ("experiment=split_mnist_hopfield",),
    ("experiment=permuted_mnist_2500_nns",),
)


def test_the_order_of_groups_does_not_matter(tmp_path):
    wanted = [composed(*line, folder=tmp_path) for line in LINES]
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    file = tmp_path / "conf" / "train.yaml"
    first, *lines_of_groups = (lines := file.read_text().splitlines())[2 : lines.index("")]
    groups, last = lines_of_groups[:-4], lines_of_groups[-4:]  # those whose files set options of others stay last
    groups = [line for line in groups if "#" not in line]
    assert (first, last[0], len(groups)) == ("  - _self_", "  - experiment: null", 11)
    for seed in range(4):
        random.Random(seed).shuffle(groups)
        file.write_text("\n".join([*lines[:2], first, *groups, *last, *lines[lines.index("") :]]))
        for line, config in zip(LINES, wanted, strict=True):
            assert composed(*line, folder=tmp_path, conf=file.parent) == config, (groups, line)


def test_a_file_of_ones_own_may_override_groups_as_hydra_does(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /scenario: gg\n  - override /network: fc1024\n"
        "method:\n  _target_: supsup_lightning.LowerBound\n  network: ${network}\n"
    )
    config = composed("method=mine", folder=tmp_path, conf=tmp_path / "conf")
    assert config.network._target_ == "supsup_lightning.FullyConnected"
    assert config.inference._target_ == "supsup_lightning.Given"


def test_partial_files_are_no_choices_of_the_help(tmp_path):
    shown = run_cli("--help", cwd=tmp_path).stdout
    assert "data/stream: permuted" in shown
    assert "/options:" not in shown


def test_two_groups_that_bring_a_schedule_along_say_which_is_used(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        effects.check(composed("scenario=nns", "optimizer=rmsprop", folder=tmp_path))
        assert "schedule=inverse_sqrt, of scenario=nns, takes the place of schedule=constant" in caplog.text
        caplog.clear()
        effects.check(composed("scenario=nns", "optimizer=rmsprop", "schedule=constant", folder=tmp_path))
        effects.check(composed("optimizer=rmsprop", folder=tmp_path))
        assert not caplog.text
