"""Joins what files say of their tasks, as `Method.merge` joins the tasks."""

from pathlib import Path
from typing import TYPE_CHECKING

from supsup_lightning.bank import codec
from supsup_lightning.data.naming import AboutData, TaskDescription, numbered
from supsup_lightning.errors import DataError, MismatchError
from supsup_lightning.recipe import contents

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule


def merge(module: "ContinualModule", path: str | Path) -> None:
    """See `ContinualModule.merge`."""
    method = module.method
    method.check_merge()
    recipe = codec.read_recipe(path)
    if recipe is None:
        raise DataError(
            f"The file {path} does not say what its tasks are called, nor how many classes they have: an earlier "
            "version, or a method's own `save`, wrote it. Use model.method.merge(path), and set model.num_classes."
        )
    try:
        told, counts = contents.about_data(recipe), [int(number) for number in recipe["num_classes"]]
        accuracies = {
            str(name): {int(task): float(value) for task, value in values.items()}
            for name, values in recipe["accuracy"].items()
        }
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"The file {path} is refused: its recipe is damaged or made up ({error!s:.200}).") from error
    own = module.about_data
    if (
        own is not None
        and told is not None
        and (own.inputs.shape, own.inputs.dtype)
        != (
            told.inputs.shape,
            told.inputs.dtype,
        )
    ):
        raise MismatchError(
            f"The tasks of {path} have inputs of shape {list(told.inputs.shape)} and type {told.inputs.dtype}, those "
            f"here of shape {list(own.inputs.shape)} and type {own.inputs.dtype}."
        )
    before = {*method.tasks.tolist()}
    method.merge(path)
    new = {*method.tasks.tolist()} - before
    size = max([*before, *new], default=-1) + 1
    module.num_classes = tuple(_of(task, counts if task in new else module.num_classes) for task in range(size))
    for name, values in accuracies.items():
        kept = {task: value for task, value in module.accuracies.get(name, {}).items() if task not in new}
        module.accuracies[name] = kept | {task: value for task, value in values.items() if task in new}
    base = told if own is None else own
    if base is not None:
        tasks = tuple(_described(task, told if task in new else own) for task in range(size))
        module.about_data = base.joined(base if told is None else told, tasks)
        module.inputs = module.about_data.inputs


def _of(task: int, counts: "list[int] | tuple[int, ...]") -> int:
    return counts[task] if task < len(counts) else 1  # of a task that is nowhere


def _described(task: int, about: AboutData | None) -> TaskDescription:
    known = about is not None and task < len(about.tasks)
    return about.tasks[task] if known else numbered(task, 0)  # type: ignore[union-attr]
