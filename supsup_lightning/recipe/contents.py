"""The recipe in a file of finished tasks: all that a prediction needs besides what the method keeps.

version      of this format
network      how it is made: import path and arguments; also method, inference and scenario
inputs, raw  shape and type of network inputs, and how images become inputs
tasks        names, classes, and what each does to its inputs; of all tasks of the data
accuracy     of each task at training time, where it was measured
fingerprint  a few logits (`fingerprint`)
versions     of the packages
"""

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

import supsup_lightning
from supsup_lightning.data.inputs import Inputs
from supsup_lightning.data.naming import AboutData, TaskDescription
from supsup_lightning.data.raw_images import RawImages
from supsup_lightning.errors import DataError
from supsup_lightning.recipe.fingerprint import ends_of, fingerprint
from supsup_lightning.recipe.recorded import LACKS, MASKED_PARAMETERS, description_of

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

logger = logging.getLogger(__name__)

VERSION = 1
_PACKAGES = ("torch", "torchvision", "lightning", "timm")


def recipe_of(module: "ContinualModule") -> dict[str, Any]:
    """Describe a module with finished tasks, in plain values."""
    method, about = module.method, module.about_data
    inputs = module.inputs if about is None else about.inputs
    logits: dict[str, Any] = {}
    try:
        logits = fingerprint(method, inputs, tasks=ends_of(method))
    except Exception as error:  # what is trained must be written, whatever the network does
        logger.warning("No logits could be written to compare with later (%s).", error)
    recipe = {
        "version": VERSION,
        "network": description_of(method.network),
        "method": _with_names(description_of(method), list(method.layout.names)),
        "inference": description_of(module.inference),
        "scenario": description_of(module.scenario),
        "num_classes": list(module.num_classes),
        "inputs": None if inputs is None else _inputs_state(inputs),
        "raw": None if about is None else about.raw.state(),
        "tasks": None if about is None else tasks_state(about.tasks),
        "accuracy": {
            name: {str(task): round(value, 4) for task, value in sorted(values.items()) if value == value}
            for name, values in module.accuracies.items()
        },
        "fingerprint": logits,
        "versions": _versions(),
    }
    for part in ("network", "method", "inference"):
        if LACKS in recipe[part]:
            logger.info("The file cannot make the %s by itself, as it lacks %s.", part, recipe[part][LACKS])
    return recipe


def about_data(recipe: dict[str, Any]) -> AboutData | None:
    """What a recipe says of the data; None if nothing."""
    if recipe["inputs"] is None or recipe["raw"] is None or recipe["tasks"] is None:
        return None
    return AboutData(inputs_of(recipe), RawImages.of(recipe["raw"]), _tasks(recipe["tasks"]))  # type: ignore[arg-type]


def inputs_of(recipe: dict[str, Any]) -> Inputs | None:
    """Kind of network inputs that a recipe tells; None if it does not."""
    state = recipe["inputs"]
    if state is None:
        return None
    dtype = getattr(torch, str(state["dtype"]), None)
    shape = tuple(map(int, state["shape"]))
    if not isinstance(dtype, torch.dtype) or any(size < 1 for size in shape) or len(shape) > 8:
        raise DataError("what it says of its inputs is no shape and type")
    normalisation = None
    if state["normalisation"] is not None:
        mean, std = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 1) for part in state["normalisation"])
        if mean.shape != std.shape or not (std > 0).all() or not mean.isfinite().all():
            raise DataError("what it says of its inputs is no normalisation")
        normalisation = mean, std
    return Inputs(shape, dtype, normalisation)


def _inputs_state(inputs: Inputs) -> dict[str, Any]:
    pair = inputs.normalisation
    return {
        "shape": list(inputs.shape),
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "normalisation": None if pair is None else [part.flatten().tolist() for part in pair],
    }


def tasks_of(recipe: Mapping[str, Any]) -> tuple[TaskDescription, ...]:
    """What a recipe says of the tasks of the data, by number; empty if nothing."""
    return () if recipe["tasks"] is None else _tasks(recipe["tasks"])


def tasks_state(tasks: tuple[TaskDescription, ...]) -> dict[str, Any]:
    """Columns, as tasks often have the same classes: each list of them is held once."""
    lists = list(dict.fromkeys(each.classes for each in tasks))
    place = {classes: number for number, classes in enumerate(lists)}
    return {
        "names": [each.name for each in tasks],
        "inputs": [each.inputs for each in tasks],
        "classes": [place[each.classes] for each in tasks],
        "class_lists": [[*classes] for classes in lists],
    }


def _tasks(state: dict[str, Any]) -> tuple[TaskDescription, ...]:
    lists = [tuple(map(str, each)) for each in state["class_lists"]]
    rows = zip(state["names"], state["classes"], state["inputs"], strict=True)
    return tuple(TaskDescription(str(name), lists[int(place)], str(inputs)) for name, place, inputs in rows)


def _with_names(value: Any, names: list[str]) -> Any:
    """Put the names of the masked parameters in place of a rule that is a function."""
    if value == MASKED_PARAMETERS:
        return {"_target_": "supsup_lightning.layout.Named", "names": names}
    return {key: _with_names(each, names) for key, each in value.items()} if isinstance(value, dict) else value


def _versions() -> dict[str, str]:
    found = {"supsup_lightning": supsup_lightning.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
