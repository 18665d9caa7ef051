"""Number of results.json that a run returns to a sweeper: ``optimized_metric``."""

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from supsup_lightning.cli import effects
from supsup_lightning.errors import ConfigurationError

DEFAULT = "validation_accuracy"

_ALWAYS = (
    *(DEFAULT, "average_accuracy", "sparsity", "num_masks", "cap"),
    *("mask_bytes_per_task", "kept_bytes_in_all", "model_bytes", "peak_memory_bytes"),
    *("train_seconds", "inference_ms_per_batch"),
)
_TASK_HIDDEN = ("task_inference_accuracy",)
_ANNOUNCED = ("forgetting", "backward_transfer")
_UNANNOUNCED = ("adjusted_rand_index", "assignment_accuracy", "num_combinations", "combination_bytes")


def check(config: DictConfig) -> None:
    """Raise `ConfigurationError` for a metric that this run does not produce."""
    name = config.optimized_metric
    announced = effects.is_announced(config)
    names = [*_ALWAYS, *(_ANNOUNCED if announced else _UNANNOUNCED)]
    if not str(config.scenario.get("path", "")).endswith(".GG"):
        names += _TASK_HIDDEN
    if name not in names:
        raise ConfigurationError(
            f"optimized_metric={name} is no number of this run's results.json; choose one of {', '.join(names)}."
        )
    if name == DEFAULT and not announced and (_is_optimized() or _is_typed()):
        raise ConfigurationError(
            f"optimized_metric={DEFAULT} is not known in scenario=nns, where nothing is validated, as its task would "
            "have to be known. Choose another number: optimized_metric=average_accuracy is that of test images."
        )


def value(result: Mapping[str, Any], name: str) -> float | None:
    """Value of the metric in these results. Raises `ConfigurationError` if a sweeper needs it and it is missing."""
    found = result.get(name)
    if found is None and _is_optimized():
        raise ConfigurationError(
            f"optimized_metric={name} has no value in these results (a run of an older version, tasks without "
            "validation images, or too few tasks); choose another, optimized_metric=average_accuracy (of test images) "
            "for example."
        )
    return found


def _is_optimized() -> bool:
    """Whether a sweeper uses the value that a run returns."""
    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN and not str(hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def _is_typed() -> bool:
    return any(option.lstrip("+").startswith("optimized_metric=") for option in HydraConfig.get().overrides.task)
