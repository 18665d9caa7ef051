"""Which options of a finished run may differ in an evaluation.

Whatever differs must leave the finished masks valid: a task's test images belong to the task of its mask, and nothing
that training depended on is another.
"""

import re
from typing import Any

from hydra.core.override_parser.types import Override

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.runs.finished_run import FinishedRun
from supsup_lightning.runs.run_identity import Identity, shown

CALLBACKS = ("progress", "figures", "recovery", "inference_record")  # those of the run that a test needs or shows
EVALUATED = ("inference", "scenario", "data", "trainer")

_ALONE = "an evaluation only tests, and writes to its own folder"
_WITHOUT_EFFECT = {
    **dict.fromkeys(("resume", "print_masked", "optimized_metric", "hydra"), _ALONE),
    "logger": "an evaluation tells no logger; its numbers are in its results.json",
    "callbacks": f"an evaluation uses only callbacks.{', '.join(CALLBACKS)}",
    "eval_at": "an evaluation tests after the last task alone",
    "experiment": "an experiment sets what training depends on; give data, scenario and inference themselves",
}
# Options that only training uses. Another data set may bring other values of them along.
_OF_TRAINING = {
    "data": ("augment", "steps_per_task", "epochs_per_task", "patience", "tasks_at_once", "validation_share"),
    "trainer": (
        *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches"),
        *("limit_val_batches", "overfit_batches", "max_time", "val_check_interval", "check_val_every_n_epoch"),
        *("num_sanity_val_steps", "log_every_n_steps"),
    ),
}
OF_READING = ("in_memory", "num_workers", "on_error")
_TESTED = ("root", "num_tasks", "batch_size", "resize", "input_shape", *OF_READING)
_DIVIDES = ("test_share", "split_column")  # which images of a data set are for training


def check_typed(override: Override) -> None:
    """Raise `ConfigurationError` for an override that no evaluation has a use for."""
    typed, key = override.input_line, override.key_or_group
    group, _, name = key.replace("/", ".").replace("@", ".").partition(".")
    if override.is_sweep_override():
        raise ConfigurationError(f"{typed} has several values; start one evaluation for each.")
    if name in _OF_TRAINING.get(group, ()):
        raise ConfigurationError(f"{typed} has no effect in an evaluation, as it is for training alone; leave it out.")
    if group in _WITHOUT_EFFECT and not (group == "callbacks" and name.partition(".")[0] in CALLBACKS):
        raise ConfigurationError(f"{typed} has no effect here: {_WITHOUT_EFFECT[group]}. Leave it out.")


def check_differences(run: FinishedRun, identity: Identity, typed: set[str]) -> list[str]:
    """Return differences in the data in words. Raises `ConfigurationError` for those that need another training."""
    other_data: dict[str, str] = {}
    different = identity.different(run.record)
    for key in sorted(different, key=identity.references.__contains__):  # first what others refer to
        there, here = different[key]
        group, _, name = key.partition(".")
        if group in ("inference", "scenario", "trainer", "callbacks"):
            continue
        if key == "network.input_shape":
            raise ConfigurationError(
                f"{key}={shown(here)} would be another network than that of the masks, whose images are "
                f"{shown(there)}; add data.input_shape={_list(there)} data.resize=true, which brings images to it."
            )
        if group == "data" and _makes_other_tasks(name):
            raise ConfigurationError(
                f"{key}={shown(here)} makes other tasks than those of the masks, which the run learned with "
                f"{key}={shown(there)}: no mask would belong to its task's images. Leave it out, or train with it in "
                "another directory (python train.py)."
            )
        if group != "data":
            chosen = identity.choices.get(group), run.record["choices"].get(group)
            option, (now, before) = (key, (here, there)) if chosen[0] == chosen[1] else (group, chosen)
            raise ConfigurationError(needs_training(option, there=before, here=now))
        if name.partition(".")[0] not in (*_TESTED, *_OF_TRAINING["data"]) or name == "root":
            other_data[key] = f"{key}={shown(here)} ({shown(there)} in training)"
    divides = [key for key in other_data if key.rpartition(".")[2] in _DIVIDES]
    if divides and len(divides) == len(other_data) and "data.root" not in typed:
        raise ConfigurationError(
            f"{other_data[divides[0]]} would test images that the masks were trained on; leave it out, or name other "
            "images as well (data.root)."
        )
    return list(other_data.values())


def _makes_other_tasks(name: str) -> bool:
    """Whether an option of `data` decides which task a mask belongs to, rather than which images its test has."""
    if name in ("_target_", "seed", "task_shard", "first_task"):
        return True
    return name.startswith("stream.") and not any(part in ("source", "sources") for part in name.split("."))


def needs_training(option: str, *, there: Any, here: Any) -> str:
    """Return the message for an option that training depends on, with its value in the run and here."""
    return (
        f"{option}={shown(here)} needs masks that were trained with it, and the run learned its masks with "
        f"{option}={shown(there)}. Leave it out, or train with it in another directory (python train.py)."
    )


def _list(value: Any) -> str:
    return re.sub(r"\s", "", str(value))
