"""The W&B logger of a run: sweeps of W&B, offline runs that are continued, and the mask bank as its model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.runs.wandb_files import history

TASK, LEARNED = AXES = ("task/number", "learned/num_tasks")


class WandbLogger(loggers.WandbLogger):
    """Lightning's W&B logger, for which ``log_model`` means the mask bank.

    Args:
        log_model: ``True`` to log the mask bank as an artifact after the final test; ``all`` for the bank and also
            every checkpoint, as in Lightning; ``False`` for neither.
        offline: keep everything on disk, for ``wandb sync``.
        tags: of the run, a list or one word.
        options: further options of Lightning's logger and of ``wandb.init``; numbers as names are taken as text.

    Attributes:
        logs_bank: whether ``log_model`` asks for the mask bank.
        logged_before: tasks, and numbers of learned tasks, for which a continued run has a value already, by its name.

    Raises:
        ConfigurationError: another ``log_model``, or checkpoints in an offline run, which Lightning cannot log.
    """

    def __init__(
        self, *, log_model: bool | str = False, offline: bool = False, tags: Any = None, **options: Any
    ) -> None:
        if log_model not in (False, True, "all"):
            raise ConfigurationError(f"logger.log_model={log_model} must be true (the mask bank), all or false.")
        if log_model == "all" and offline:
            raise ConfigurationError(
                "logger.log_model=all logs checkpoints, which Lightning cannot do in an offline run; use "
                "logger.log_model=true, which logs the mask bank alone, or logger.offline=false."
            )
        for name in ("name", "group", "job_type", "notes"):
            if options.get(name) is not None:
                options[name] = str(options[name])
        if tags is not None:
            tags = [tags] if isinstance(tags, str | int | float) else tags
            options["tags"] = [str(tag) for tag in tags]
        super().__init__(log_model="all" if log_model == "all" else False, offline=offline, **options)
        self.logs_bank = log_model is not False
        self.logged_before: dict[str, set[int]] = {}

    @property
    def experiment(self) -> Any:
        """The W&B run; started when it is first used, in the first process."""
        starts = self._experiment is None
        run = super().experiment
        if starts and self._experiment is not None:
            self._continue(run)
        return run

    def _continue(self, run: Any) -> None:
        """Find out what earlier files of the run hold, and start the steps of an offline run after theirs.

        W&B counts steps from 0 in each file, and drops those that a run already has when it uploads them.
        """
        own = Path(run.settings.sync_file)
        files = sorted(Path(run.settings.wandb_dir).glob(f"*run-*-{run.id}/run-{run.id}.wandb"))
        last = -1
        for step, values in history([path for path in files if path != own]):
            last = max(last, step)
            for axis in AXES:
                for name in values if axis in values else ():
                    self.logged_before.setdefault(name, set()).add(int(float(values[axis])))
        if self._offline and last >= 0:
            run.log({}, step=last + 1)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the configuration.

        A W&B sweep fixes the entries that it sets, so that ``optimizer=adam`` would hide the options of that group.
        They are logged as ``optimizer.lr`` and so on then, which W&B shows as it shows nested entries.
        """
        fixed = {key for key, value in dict(self.experiment.config).items() if not isinstance(value, Mapping)}
        entries: dict[str, Any] = {}
        for key, value in dict(params).items():
            entries |= dict(_flat(key, value)) if key in fixed and isinstance(value, Mapping) else {key: value}
        super().log_hyperparams({key: value for key, value in entries.items() if "." not in key or key not in fixed})


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested mappings by their dotted names.

    >>> dict(_flat("optimizer", {"lr": 0.1, "betas": {"first": 0.9}}))
    {'optimizer.lr': 0.1, 'optimizer.betas.first': 0.9}
    """
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, nested in value.items():
        yield from _flat(f"{key}.{name}", nested)
