"""Numbers of results.json that a run returns to a sweeper: ``optimized_metric``, one or several."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig

from supsup_lightning.cli import effects
from supsup_lightning.errors import ConfigurationError

DEFAULT = "validation_accuracy"

_ALWAYS = (
    *(DEFAULT, "average_accuracy", "sparsity", "num_masks", "cap"),
    *("mask_bytes_per_task", "kept_bytes_in_all", "model_bytes", "peak_memory_bytes"),
    *("train_seconds", "inference_ms_per_batch"),
)
_TASK_HIDDEN = ("task_inference_accuracy", "last_accuracy")
_ANNOUNCED = ("forgetting", "backward_transfer")
_CLASS_INCREMENTAL = ("average_incremental_accuracy", "task_incremental_accuracy")
_UNANNOUNCED = ("adjusted_rand_index", "assignment_accuracy", "num_combinations", "combination_bytes")


def names_of(metric: str | Sequence[str]) -> list[str]:
    """Return the names in ``optimized_metric``, which is one name or a list.

    >>> names_of("sparsity"), names_of(["average_accuracy", "model_bytes"])
    (['sparsity'], ['average_accuracy', 'model_bytes'])
    """
    return [metric] if isinstance(metric, str) else [*metric]


def check(config: DictConfig) -> None:
    """Raise `ConfigurationError` for a metric that this run does not produce, or one too many for the search."""
    announced = effects.is_announced(config)
    known = [*_ALWAYS, *(_ANNOUNCED if announced else _UNANNOUNCED)]
    if not str(config.scenario.get("path", "")).endswith(".GG"):
        known += [*_TASK_HIDDEN, *(_CLASS_INCREMENTAL if announced else ())]
    names = names_of(config.optimized_metric)
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"optimized_metric={name} is no number of this run's results.json; choose one of {', '.join(known)}."
            )
    if DEFAULT in names and not announced and (_is_optimized() or _is_typed()):
        raise ConfigurationError(
            f"optimized_metric={DEFAULT} is not known in scenario=nns, where nothing is validated, as its task would "
            "have to be known. Choose another number: optimized_metric=average_accuracy is that of test images."
        )
    directions = HydraConfig.get().sweeper.get("direction") if _is_optimized() else None
    if directions is not None:
        number = len(directions) if isinstance(directions, ListConfig) else 1
        if number != len(names):
            raise ConfigurationError(
                f"optimized_metric={','.join(names)} names {len(names)} and hydra.sweeper.direction={directions} has "
                f"{number}; give one direction for each, such as optimized_metric=[validation_accuracy,model_bytes] "
                "hydra.sweeper.direction=[maximize,minimize]."
            )


def value(result: Mapping[str, Any], metric: str | Sequence[str]) -> float | list[float | None] | None:
    """Value of the metric in these results, or of each of several.

    Raises:
        ConfigurationError: a sweeper needs a value that is missing.
    """
    found = [result.get(name) for name in names_of(metric)]
    for name, number in zip(names_of(metric), found, strict=True):
        if number is None and _is_optimized():
            raise ConfigurationError(
                f"optimized_metric={name} has no value in these results (a run of an older version, tasks without "
                "validation images, or too few tasks); choose another, optimized_metric=average_accuracy (of test "
                "images) for example."
            )
    return found[0] if isinstance(metric, str) else found


def _is_optimized() -> bool:
    """Whether a sweeper uses the value that a run returns."""
    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN and not str(hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def _is_typed() -> bool:
    return any(option.lstrip("+").startswith("optimized_metric=") for option in HydraConfig.get().overrides.task)
