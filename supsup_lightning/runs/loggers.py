"""Lightning loggers of a run, any number of them; a failing logger does not end the run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import isfunction
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from supsup_lightning.checks.references import is_read
from supsup_lightning.errors import ConfigurationError

logger = logging.getLogger(__name__)


@contextmanager
def listening(config: DictConfig, folder: Path) -> Iterator[list[Logger]]:
    """Start the configured loggers, log the configuration, and close them when the block ends, also by an error.

    A W&B run is finished with an exit code, so that the next job of a sweep starts its own. Its id is saved in
    ``folder``, and resume=true continues it.

    Args:
        config: configuration of the run.
        folder: output directory of the run.
    """
    mode = os.environ.get("WANDB_MODE")  # Lightning sets it for good when a logger is offline
    id_file = folder / "wandb" / "run_id"
    started: list[Logger] = []
    exit_code = 1
    try:
        for options, more in configurations(config):
            known = id_file.read_text().strip() if config.resume and id_file.exists() else None
            listener = _start(options, {**_run_id(options, more, known), **more})
            if listener is None:
                continue
            started.append(listener)
            keep_going(listener)
            listener.log_hyperparams(_logged(config))
            if isinstance(listener, WandbLogger) and listener.version:  # only the first process has it
                id_file.parent.mkdir(parents=True, exist_ok=True)
                id_file.write_text(f"{listener.version}\n")
        yield started
        exit_code = 0
    finally:
        for listener in started:
            _close(listener, exit_code)
        os.environ.pop("WANDB_MODE", None)
        if mode is not None:
            os.environ["WANDB_MODE"] = mode


def _logged(config: DictConfig) -> dict[str, Any]:
    """Return the whole configuration, and as ``choices`` the names of its files, by which runs are told apart."""
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    choices = {str(group): name for group, name in chosen.items() if "/" not in str(group) and isinstance(name, str)}
    return {**OmegaConf.to_container(config, resolve=True), "choices": choices}  # type: ignore[dict-item]


def configurations(config: DictConfig) -> list[tuple[DictConfig, dict[str, Any]]]:
    """Return each logger's configuration, with the options that were added to it as ``logger.NAME``.

    Raises:
        ConfigurationError: an added option, and not exactly one logger that it could be for.
    """
    group = config.logger
    if "_target_" in group:  # a user's file with one logger at its top level
        return [(group, {})]
    listeners = {key: node for key, node in group.items() if isinstance(node, DictConfig) and "_target_" in node}
    added = {key: group[key] for key in group if key not in listeners and not is_read(config, f"logger.{key}")}
    if added and len(listeners) != 1:
        name = next(iter(added))
        meant = " or ".join(f"+logger.{key}.{name}" for key in listeners) or "a logger, such as logger=csv"
        raise ConfigurationError(f"logger.{name} names no logger, and there are {len(listeners)}; write {meant}.")
    return [(node, added) for node in listeners.values()]


def keep_going(listener: Logger) -> None:
    """Turn the errors of a logger into one warning, so that neither a dead server nor a full disk ends training."""
    for name in dir(type(listener)):
        called = name.startswith("log_") or name in ("save", "finalize", "after_save_checkpoint")
        if called and isfunction(getattr(type(listener), name)):
            setattr(listener, name, partial(_call, listener, name))


@contextmanager
def tolerating(listener: Logger, what: str) -> Iterator[None]:
    """Turn errors of the block into the same warning: for calls that go around the logger, to its ``experiment``."""
    try:
        yield
    except Exception as error:
        _warn(listener, what, error)


def _call(listener: Logger, name: str, *args: Any, **kwargs: Any) -> Any:
    with tolerating(listener, name):
        return getattr(type(listener), name)(listener, *args, **kwargs)


def _warn(listener: Logger, name: str, error: Exception) -> None:
    if not getattr(listener, "has_failed", False):
        listener.has_failed = True  # type: ignore[attr-defined]
        logger.warning(
            "%s failed in %s (%s: %s). The run goes on, and results.json and the files beside it are written; what "
            "this logger records may have gaps from here on.",
            type(listener).__name__,
            name,
            type(error).__name__,
            error,
        )


def _run_id(options: DictConfig, more: dict[str, Any], known: str | None) -> dict[str, str]:
    """Return the id of the W&B run to continue, unless the user gives one."""
    from hydra.utils import get_object

    kind = get_object(options["_target_"])
    own = {"id", "version", "experiment"} & {*options, *more} or "WANDB_RUN_ID" in os.environ
    return {"id": known} if known and not own and isinstance(kind, type) and issubclass(kind, WandbLogger) else {}


def _start(options: DictConfig, more: dict[str, Any]) -> Logger | None:
    """Start a logger. Errors that a user can fix are raised; others give a warning and None.

    A W&B run starts offline if the server does not answer.
    """
    import wandb
    from hydra.utils import instantiate

    listener = instantiate(options, **more)
    try:
        hasattr(listener, "experiment")  # starts the logger's run
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise ConfigurationError(
            f"{error} (logger=wandb; without an account or a network, add logger.offline=true.)"
        ) from error
    except wandb.errors.CommError as error:
        if more.get("offline"):
            raise
        logger.warning("W&B does not answer (%s). The run is kept in %s, for `wandb sync`.", error, listener.save_dir)
        wandb.teardown(exit_code=1)  # W&B reads the offline setting when its service starts
        return _start(options, {**more, "offline": True})
    except Exception as error:
        _warn(listener, "its start", error)
        return None
    return listener


def _close(listener: Logger, exit_code: int) -> None:
    """Finish the run of a W&B logger; the Trainer has finished other loggers."""
    if not isinstance(listener, WandbLogger):
        return
    import wandb

    try:
        listener.experiment.finish(exit_code=exit_code)
    except Exception as error:
        _warn(listener, "finish", error)
        with suppress(Exception):  # the same error again; the next job gets a new service
            wandb.teardown(exit_code=exit_code)
        wandb.run = None
