"""Tasks of a file by number or by name, and what its recipe says of some of them under other numbers."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from supsup_lightning.data.naming import TaskDescription, numbered
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.recipe import building, contents


def tasks_are_known(recipe: Mapping[str, Any]) -> bool:
    """Whether tasks have the numbers of the data; else they were discovered, and have the learner's own."""
    return bool(building.own(recipe["scenario"]).task_known_in_training)


def names_of(recipe: Mapping[str, Any], tasks: Sequence[int]) -> dict[int, str]:
    """Name of each task."""
    known = contents.tasks_of(recipe)
    return {task: known[task].name if task < len(known) else numbered(task, 0).name for task in tasks}


def find_task(text: str, names: Mapping[int, str]) -> int:
    """Return the number of the task that is meant.

    Args:
        text: a number or a name; ``number=`` or ``name=`` before it says which.
        names: name of each task by number.

    Raises:
        ConfigurationError: no such task, or several.

    >>> find_task("cats", {0: "cats", 3: "dogs"}), find_task("3", {0: "cats", 3: "dogs"})
    (0, 3)
    """
    kind, separator, rest = text.partition("=")
    kind, wanted = (kind, rest) if separator and kind in ("number", "name") else ("", text)
    by_name = [task for task, name in names.items() if name == wanted] if kind != "number" else []
    by_number = [task for task in names if str(task) == wanted] if kind != "name" else []
    found = [*dict.fromkeys(by_number + by_name)]
    if len(found) == 1:
        return found[0]
    if found:
        meant = ", ".join(f"{task} ({names[task]})" for task in found)
        raise ConfigurationError(
            f"{text!r} may be any of the tasks {meant}; say number={found[0]}"
            + (f" or name={wanted}." if by_number and by_name else ", for example.")
        )
    near = difflib.get_close_matches(wanted.casefold(), [name.casefold() for name in names.values()], n=1, cutoff=0.5)
    if near:
        task = next(task for task, name in names.items() if name.casefold() == near[0])
        raise ConfigurationError(f"There is no task {text!r}; did you mean {names[task]!r} (task {task})?")
    some = ", ".join(f"{task} ({name})" for task, name in [*names.items()][:10])
    raise ConfigurationError(f"There is no task {text!r}; there are {some}{', ...' if len(names) > 10 else ''}.")


def with_tasks(recipe: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """Return what a recipe says of some tasks, under other numbers; of the others nothing is left.

    Args:
        recipe: of a file.
        numbers: the new number of each task that stays.
    """
    changed = dict(recipe)
    changed["fingerprint"] = _of(recipe["fingerprint"], numbers)
    changed["accuracy"] = {name: _of(values, numbers) for name, values in recipe["accuracy"].items()}
    if not tasks_are_known(recipe):  # classes and names are those of the data, and not of the learner's tasks
        return changed
    old = {new: task for task, new in numbers.items()}
    counts, places = recipe["num_classes"], range(max(old) + 1)
    changed["num_classes"] = [counts[old[place]] if place in old else 1 for place in places]
    if recipe["tasks"] is not None:
        known = contents.tasks_of(recipe)
        described = [
            known[old[place]] if place in old and old[place] < len(known) else numbered(place, 0) for place in places
        ]
        changed["tasks"] = contents.tasks_state(tuple(described))
    return changed


def renamed(recipe: Mapping[str, Any], task: int, name: str, *, tasks: Sequence[int]) -> dict[str, Any]:
    """Return a recipe with another name for a task.

    Raises:
        ConfigurationError: a name that cannot be told from another task, or a file that has no names.
    """
    known = contents.tasks_of(recipe)
    if task >= len(known) or not tasks_are_known(recipe):
        raise ConfigurationError(f"The file has no name of its own for task {task}, so it cannot have another.")
    if not name.strip() or not name.isprintable() or name.startswith(("number=", "name=")):
        raise ConfigurationError(f"{name!r} is no name for a task: give a line of text.")
    others = {other: own for other, own in names_of(recipe, tasks).items() if other != task}
    same = [other for other, own in others.items() if own == name or str(other) == name]
    if same:
        raise ConfigurationError(
            f"The name {name!r} cannot be told from task {same[0]} ({others[same[0]]}); choose another."
        )
    described: list[TaskDescription] = [*known]
    described[task] = described[task]._replace(name=name)
    return {**recipe, "tasks": contents.tasks_state(tuple(described))}


def _of(values: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    kept = {numbers[int(task)]: value for task, value in values.items() if int(task) in numbers}
    return {str(task): kept[task] for task in sorted(kept)}
