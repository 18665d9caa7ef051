"""Checks for options that have no effect with the other choices: each raises an error if it is typed."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from supsup_lightning.checks.references import is_read
from supsup_lightning.cli import choices
from supsup_lightning.cli.output_name import targets
from supsup_lightning.errors import ConfigurationError

logger = logging.getLogger(__name__)

_LENGTH = "the data say how long training is: use data.steps_per_task or data.epochs_per_task"
_DECIDED = {
    **dict.fromkeys(("max_epochs", "max_steps", "min_epochs", "min_steps"), _LENGTH),
    "callbacks": "callbacks are those of the group callbacks: +callbacks.mine._target_=my_package.MyCallback",
    "logger": "loggers are those of the group logger, logger=csv for example",
    "enable_progress_bar": "it follows callbacks.progress: ~callbacks.progress switches it off",
    "enable_checkpointing": "it follows callbacks.checkpoint: ~callbacks.checkpoint switches it off",
    "use_distributed_sampler": "the data share out each batch among the processes themselves",
    "barebones": "a run needs what it switches off; leave out what you can spare, ~callbacks.figures for example",
    "fast_dev_run": "debug=fast_dev_run takes one batch of each kind for two tasks",
}

# Options of train.yaml that belong to no group.
OWN = ("seed", "resume", "print_masked", "datamodule", "optimized_metric", "eval_at", "module")

_SAID_OF_RUN = r"callbacks\.results\.(folder|optimized_metric|run(\.(scenario|data|network|method|seed))?)"

_IN_MEMORY = ("Digits", "MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100")


def decided(key: str) -> str | None:
    """Return what to use instead of an option of the Trainer that the run sets itself; None for other options."""
    group, _, name = key.partition(".")
    if group != "trainer" or name not in _DECIDED:
        return None
    return f"{key} would have no effect: {_DECIDED[name]}."


def _all_in_memory(config: DictConfig) -> bool:
    names = [target.rsplit(".", 1)[-1] for target in targets(config.data.get("stream"))]
    sources = [name for name in names if name not in ("Permuted", "Rotated", "Split", "Whole", "Mixed", "Domains")]
    return bool(sources) and all(name in _IN_MEMORY for name in sources)


def is_announced(config: DictConfig) -> bool:
    """Whether training batches come with their task: the data module is given to the Trainer unchanged."""
    return config.datamodule.get("_target_") == "supsup_lightning.data.announced"


def _option(path: str, default: Any = None) -> Callable[[DictConfig], Any]:
    return lambda config: OmegaConf.select(config, path, default=default)


def _check_added(config: DictConfig) -> None:
    """Raise `ConfigurationError` for an added top-level option that nothing reads."""
    groups = set(HydraConfig.get().runtime.choices)
    if GlobalHydra.instance().is_initialized():  # the choices lack groups with several chosen files
        groups.update(GlobalHydra.instance().config_loader().list_groups(""))
    for override in HydraConfig.get().overrides.task:
        name = re.split(r"[.=@]", override.lstrip("+"))[0]
        group = name in groups or "/" in name
        if override.startswith("+") and not (group or name in OWN or is_read(config, name)):
            raise ConfigurationError(f"{override} has no effect: nothing reads {name}, and no option refers to it.")


def _say_what_gave_way() -> None:
    """Log which schedule is used if optimizer and scenario set different ones by default and none was chosen."""
    hydra = HydraConfig.get()
    chosen: Any = hydra.runtime.choices
    if any(override.startswith(("schedule=", "experiment=")) for override in hydra.overrides.task):
        return
    for choice, schedule in choices.given_way("schedule", chosen):
        logger.warning(
            "schedule=%s, of scenario=%s, takes the place of schedule=%s, which %s sets by default; add schedule=%s or "
            "schedule=%s to choose.",
            chosen.schedule,
            chosen.scenario,
            schedule,
            choice,
            schedule,
            chosen.schedule,
        )


# Pattern of the option; whether it has no effect; what it needs to have one.
_RULES: tuple[tuple[str, Callable[[DictConfig], bool], str], ...] = (
    (
        r"inference\.temperature",
        lambda config: config.inference.get("objective") != "entropy",
        "inference.objective=entropy",
    ),
    (
        r"data\.(in_memory|num_workers|on_error)",
        _all_in_memory,
        "a data set of image files; this one is read into memory whole",
    ),
    (
        r"discovery\.(combine_from|trial_steps|tolerance)",
        lambda config: _option("discovery.on_unknown")(config) == "new_mask",
        "discovery.on_unknown=combine or auto",
    ),
    (
        r"discovery\.at_max_masks",
        lambda config: _option("discovery.max_masks")(config) is None,
        "discovery.max_masks",
    ),
    (
        r"method\.store_weights",
        lambda config: config.method.get("trunk") == "trained",
        "method.trunk=random; a trained trunk is stored in any case",
    ),
    (r"eval_at", lambda config: "evaluation" not in config.callbacks and config.eval_at != [], "callbacks.evaluation"),
    (
        r"trainer\.gradient_clip_algorithm",
        lambda config: not config.trainer.get("gradient_clip_val"),
        "+trainer.gradient_clip_val",
    ),
    (
        r"trainer\.sync_batchnorm",
        lambda config: config.trainer.get("devices") in (1, "1") and config.trainer.get("num_nodes", 1) == 1,
        "several processes (trainer.devices)",
    ),
)


def check(config: DictConfig) -> None:
    """Raise `ConfigurationError` for an option that is typed, or set in the trainer, and has no effect."""
    _check_added(config)
    _say_what_gave_way()
    for name in config.trainer:
        if (message := decided(f"trainer.{name}")) is not None:
            raise ConfigurationError(message)
    every = config.trainer.get("reload_dataloaders_every_n_epochs")
    if every != 1:
        raise ConfigurationError(
            f"trainer.reload_dataloaders_every_n_epochs={every} would train tasks on another's data; leave it at 1."
        )
    check_idle(config, HydraConfig.get().overrides.task)


def check_idle(config: DictConfig, overrides: Iterable[str]) -> None:
    """Raise `ConfigurationError` for an override without effect in this configuration."""
    for override in overrides:
        option = override.lstrip("+")
        if option.startswith("~"):
            continue
        if re.match(rf"{_SAID_OF_RUN}=", option):
            raise ConfigurationError(f"{option} would make results.json say what the run is not; leave it out.")
        for pattern, idle, needed in _RULES:
            if re.match(rf"{pattern}=", option) and idle(config):
                raise ConfigurationError(f"{option} has no effect here: it needs {needed}. Leave it out, or add that.")
