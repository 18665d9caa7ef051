"""Command line around a run: resolvers, checks of options, and error messages with a remedy."""

import difflib
import logging
import os
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from supsup_lightning.cli import choices, effects, optimized_metric, sweeps
from supsup_lightning.cli.cores import cores, threads_per_job
from supsup_lightning.cli.output_name import naming, run_name, sweep_name
from supsup_lightning.cli.own_modules import from_current_folder
from supsup_lightning.errors import ConfigurationError, SupSupError
from supsup_lightning.runs import stopping
from supsup_lightning.runs.job import alone_in, failures_logged
from supsup_lightning.runs.job_record import recorded

if TYPE_CHECKING:  # they take seconds to import, and `--help` and a mistyped option do not need them
    from lightning import Trainer

    from supsup_lightning.data import ContinualDataModule


def unless(other: Any, value: Any) -> Any:
    """Return ``value``, or None if ``other`` is given: resolver for options that exclude each other.

    >>> unless(None, 1000), unless(8, 1000)
    (1000, None)
    """
    return value if other is None else None


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("naming", naming, replace=True)
# Cached, as Hydra's `now` is: jobs of a sweep get the name that was made from the overrides of the whole sweep.
OmegaConf.register_new_resolver("sweep_folder", run_name, replace=True, use_cache=True)
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("unless", unless, replace=True)
OmegaConf.register_new_resolver("default", choices.default, replace=True)
OmegaConf.register_new_resolver("cores", cores, replace=True)
OmegaConf.register_new_resolver("threads_per_job", threads_per_job, replace=True)
OmegaConf.register_new_resolver("listed", choices.listed, replace=True)


def run(train: Callable[[], Any]) -> None:
    """Run a Hydra main function. Errors that the user can fix print one message; others print a traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints errors itself and exits
    # Hydra copies this singleton for each group that `--help` lists: half of the time, and no copy is ever changed.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    _quieten_lightning()
    # Hydra does not accept null as the choice of a group.
    sys.argv[1:] = [re.sub(r"^(logger|callbacks)=(.*,)?null\b", r"\1=\2none", argument) for argument in sys.argv[1:]]
    try:
        with stopping.on_sigterm(), from_current_folder():
            train()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:  # Lightning exits with other statuses, or with success
        if stopping.asked():
            print("stopped by SIGTERM", file=sys.stderr)
            sys.exit(stopping.Terminated().code)
        if isinstance(stop.__context__, KeyboardInterrupt):
            sys.exit(130)
        raise
    except Exception as error:
        failed = sweeps.show_end()
        message = _explain(error)
        if message is None:
            raise
        if not failed:  # otherwise it stands among the jobs that failed
            print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    if sweeps.show_end():
        sys.exit(1)


@contextmanager
def job() -> Iterator[Path]:
    """Hold the output directory of the current job for this process; an error that ends the job goes into its log."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task)
    own = from_current_folder()  # in a process that joblib started as well
    with own, failures_logged(_explain), alone_in(folder), recorded(folder, overrides=overrides, explain=_explain):  # type: ignore[arg-type]
        yield folder


def check_options(config: DictConfig) -> None:
    """Raise `ConfigurationError` for wrong options that no later part of the run would find."""
    if type(config.seed) is not int or config.seed < 0:
        raise ConfigurationError(f"seed={config.seed!r} must be an integer of at least 0.")
    for option in ("resume", "print_masked"):
        if type(config[option]) is not bool:
            raise ConfigurationError(f"{option}={config[option]!r} must be true or false.")
    effects.check(config)
    optimized_metric.check(config)
    announced = effects.is_announced(config)
    for group in ("order", "discovery"):
        if announced and config.get(group) is not None:
            raise ConfigurationError(f"{group} has an effect in scenario=nns alone; add that, or leave {group} out.")
    if announced and "task_discovery" in config.callbacks:
        raise ConfigurationError("callbacks=discovery is for scenario=nns alone; add that, or leave it out.")
    _check_callbacks(config)
    _check_mask_options(config)
    if config.method.get("trunk") == "random" and config.method.get("learning_rate") is not None:
        typed = _typed("optimizer.lr")
        if typed:
            raise ConfigurationError(
                f"{typed[0]} has no effect with method.trunk=random, where rows are all that is trained; set "
                "method.learning_rate (null takes the optimizer's)."
            )
    pretrained = next((name for name in ("weights", "pretrained") if config.network.get(name)), None)
    if pretrained is not None and config.method.get("weights", "keep") != "keep":
        raise ConfigurationError(
            f"network.{pretrained}={config.network[pretrained]} would be overwritten with random weights by "
            f"method.weights={config.method.weights}; add method.weights=keep."
        )
    if HydraConfig.get().mode == RunMode.MULTIRUN and str(config.trainer.get("strategy", "")).startswith("ddp"):
        raise ConfigurationError(
            f"trainer.strategy={config.trainer.strategy} starts processes by running the command line again, "
            "which a sweep (-m) cannot take. Start one command for each job instead, or sweep with one device per job."
        )


def _check_callbacks(config: DictConfig) -> None:
    """Raise `ConfigurationError` if a callback of this package is given twice, as each has only one state."""
    names: dict[str, str] = {}
    for name, node in config.callbacks.items():
        target = str(node.get("_target_")) if isinstance(node, DictConfig) else ""
        kind = target.rpartition(".")[2] if target.startswith("supsup_lightning.") else name
        if kind in names:
            raise ConfigurationError(
                f"callbacks.{name} is a second {kind} beside callbacks.{names[kind]}; leave it out, and set the "
                f"options of callbacks.{names[kind]} instead."
            )
        names[kind] = name


def _typed(pattern: str) -> list[str]:
    """Return the overrides of this command line whose name matches a regular expression."""
    return [option for option in HydraConfig.get().overrides.task if re.match(rf"[+~]*({pattern})\b", option)]


_NAMING = ("include", "exclude", "min_dimensions", "max_dimensions")  # options of mask that name parameters


def _check_mask_options(config: DictConfig) -> None:
    """Raise `ConfigurationError` for an option of `mask` that the method does not use."""
    typed = _typed("mask")
    if not typed:
        return
    method = HydraConfig.get().runtime.choices["method"]
    target, used = str(config.method.get("_target_")), None  # not known for a user's own method
    if "mask" not in config.method:
        used = ()
    elif target.startswith("supsup_lightning."):
        used = getattr(get_class(target), "mask_options", ())
    for option in typed:
        if used == ():
            raise ConfigurationError(
                f"{option} has no effect with method={method}, which learns no masks; leave it out, or use "
                "method=supsup."
            )
        name = option.lstrip("+~").partition("=")[0].removeprefix("mask.")
        search = name.startswith("search")
        field = "search_candidates" if search else "is_masked" if name in _NAMING else name
        if used is not None and name != "mask" and field not in used:
            raise ConfigurationError(f"{option} has no effect with method={method}; leave it out, or use another.")
        if search and config.mask.sparsity != "auto":
            raise ConfigurationError(
                f"{option} has an effect with mask.sparsity=auto alone; add that, or leave it out."
            )


def checkpoint_to_resume(config: DictConfig, path: Path) -> Path | None:
    """Return ``path``, or its backup, if the run is to be resumed. Raises `DataError` if both are damaged."""
    from supsup_lightning.runs import checkpoints

    return checkpoints.whole(path) if config.resume else None


def check_finished(trainer: "Trainer", data: "ContinualDataModule") -> None:
    """Raise `SupSupError` if something (a callback, say) ended training early, so that test results would be wrong."""
    if trainer.current_epoch < data.num_epochs:
        raise SupSupError(
            f"Training stopped after {trainer.current_epoch} of {data.num_epochs} epochs; add resume=true to go on."
        )


def _quieten_lightning() -> None:
    """Silence messages that appear in every run and need no action; other warnings stay."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",
        r"Checkpoint directory .* exists and is not empty",  # a directory is named by its overrides, and used again
        r"Total length of .* across ranks is zero",  # a task without validation data
        r".*does not have many workers",  # data in memory needs none
        r"The number of training batches .* is smaller than the logging interval",  # steps are counted over the run
    ):
        warnings.filterwarnings("ignore", message)


def _explain(error: BaseException) -> str | None:
    """Return the message for an error of this package or Hydra in the chain of causes; None for other errors."""
    for cause in _causes(error):
        if isinstance(cause, SupSupError):
            return str(cause)
        if isinstance(cause, pickle.UnpicklingError):  # PyTorch's own text says how to read the file in spite of that
            return (
                "A file holds Python objects, or is damaged: it is refused, as reading it could run any program. Take "
                f"one that holds tensors alone, such as safetensors.\nin {_place(cause)}"
            )
    if isinstance(error, ConfigCompositionException):
        unknown = _unknown(str(error))
        for extra, file in (("optuna", "hydra/sweeper/optuna"), ("joblib", "hydra/launcher/joblib")):
            if f"'{file}'" in str(error):
                return f"{file} is not installed; add it with: pip install 'supsup-lightning[{extra}]'"
        suggestion = _suggestion(str(error))
        # No advice to append with `+` what is mistyped.
        said = str(error).partition("\nTo append to your ")[0] if suggestion else str(error)
        return (unknown and effects.decided(unknown)) or f"{said}{suggestion}"
    if isinstance(error, OmegaConfBaseException):  # a value that cannot be, or that refers to what is not there
        return " ".join(str(error).split())
    if isinstance(error, HydraException):
        message = str(error).replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "")
        return f"{message}{_origin(error)}"
    fault = next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)
    begun = any(frame.name in ("train", "evaluate") for frame in traceback.extract_tb(error.__traceback__))
    if fault is not None and not begun:  # Hydra makes the output directory and opens the log
        return f"{fault}: no run can write there; use another directory (hydra.run.dir or hydra.sweep.dir)."
    return None


def _origin(error: BaseException) -> str:
    """Describe the error that Hydra wrapped: its message, and the line that raised it, in a user's module say."""
    cause = list(_causes(error))[-1]
    if cause is error or not cause.__traceback__:
        return ""
    return f"\ncaused by {type(cause).__name__}: {cause}\nin {_place(cause)}"


def _place(error: BaseException) -> str:
    """File and line at which an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown(message: str) -> str | None:
    """Return the name that Hydra did not find; None if the message names none."""
    patterns = (
        r"Could not override '([^']+)'",
        r"Could not (?:find|load) '([^']+)'",
        r"Key '([^']+)' is not in struct",
    )
    return next((match[1] for pattern in patterns if (match := re.search(pattern, message))), None)


def _suggestion(message: str) -> str:
    """Suggest the nearest names to the one that Hydra did not find."""
    unknown = _unknown(message)
    if unknown is None:
        return ""
    group, _, option = unknown.partition(".")
    if group in ("discovery", "order") and "scenario=nns" not in sys.argv:
        return f"\n{group} is an option of scenario=nns; add that, or leave {group} out."
    if option and (choices := [f"{group}={name}" for name in _choices(group) if option in _chosen(group, name)]):
        others = f"{', '.join(choices[:-1])} and " if len(choices) > 1 else ""
        return f"\n{others}{choices[-1]} {'have' if others else 'has'} it."
    names = _names()
    near = [name for name in names if name.rsplit(".", 1)[-1] == unknown]
    near = near or difflib.get_close_matches(unknown, names, n=2, cutoff=0.6)
    suggestion = f"\nDid you mean {' or '.join(near)}?" if near else ""
    files = unknown.rpartition("/")[0] + "/"
    if "/" in unknown and "Available options" not in message:
        suggestion = f"\nChoices: {', '.join(name for name in names if name.startswith(files))}{suggestion}"
    return suggestion


def _names() -> list[str]:
    """Return options as a.b.c for the groups chosen on this command line, groups, and their files as group/name."""
    GlobalHydra.instance().clear()
    with initialize_config_module("supsup_lightning.conf", version_base="1.3"):
        loader: ConfigLoader = GlobalHydra.instance().config_loader()
        groups = [*loader.list_groups(""), *(f"data/{group}" for group in loader.list_groups("data"))]
        files = {group: loader.get_group_options(group, ObjectType.CONFIG) for group in groups}
        own = _own_config_dir()
        for file in own.glob("*/*.yaml") if own is not None else ():
            files.setdefault(file.parent.name, []).append(file.stem)
        chosen = [
            argument
            for argument in sys.argv[1:]
            if (parts := argument.partition("="))[0] in files and parts[2] in files[parts[0]]
        ]
        config = compose("train", overrides=[f"hydra.searchpath=[file://{own}]", *chosen] if own else chosen)
    names = [*_keys(config), *files, *(f"{group}/{name}" for group in files for name in files[group])]
    return list(dict.fromkeys(name for name in names if name.rsplit(".", 1)[-1] not in ("_target_", "_partial_")))


def _choices(group: str) -> list[str]:
    """Return the names of a group's files."""
    GlobalHydra.instance().clear()
    with initialize_config_module("supsup_lightning.conf", version_base="1.3"):
        return GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)


def _chosen(group: str, name: str) -> DictConfig:
    """Return the options of a group with one of its files, in scenario NNs."""
    GlobalHydra.instance().clear()
    with initialize_config_module("supsup_lightning.conf", version_base="1.3"):
        return compose("train", overrides=["scenario=nns", f"{group}={name}"])[group]


def _own_config_dir() -> Path | None:
    """Return the folder of ``--config-dir``; None if it is not given."""
    arguments = sys.argv[1:]
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return Path(value or "".join(arguments[place + 1 : place + 2])).absolute()
    return None


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        yield f"{prefix}{key}"
        child = config._get_node(key)
        if isinstance(child, DictConfig):
            yield from _keys(child, f"{prefix}{key}.")
