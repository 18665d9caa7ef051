"""Files of tasks that were trained apart, joined to one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from supsup_lightning.bank import codec
from supsup_lightning.bank.codec import Contents
from supsup_lightning.bank.selection import finished_tasks, images_of_removed_tasks
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.recipe import building
from supsup_lightning.recipe.changed_file import in_order, read, recipe_of, with_numbers
from supsup_lightning.recipe.loading import load
from supsup_lightning.recipe.task_names import tasks_are_known

_MOST_DIFFERENCES = 5


@dataclass(frozen=True)
class Join:
    """What `join_files` did.

    Attributes:
        tasks: numbers of all tasks.
        numbers: per file, the new number of each task that got one.
        notes: what the joined file can do less than its parts, in words.
    """

    tasks: list[int]
    numbers: dict[str, dict[int, int]]
    notes: tuple[str, ...]


def join_files(
    paths: Sequence[str | Path],
    *,
    out: str | Path,
    renumber: bool = False,
    trust: bool = False,
    network: nn.Module | None = None,
) -> Join:
    """Join files whose tasks were trained apart on the same network; equal to the file of one run of all their tasks.

    Only the sums of inference=discriminant differ, by the rounding of each file.

    Args:
        paths: of the files, two or more.
        out: the file to write.
        renumber: give a later file's tasks the next free numbers where an earlier one has theirs.
        trust: as for `load`.
        network: likewise.

    Raises:
        MismatchError: files of other networks, seeds or options; the message says in what they differ.
        ConfigurationError: a number that two files have, or a method whose tasks cannot be put together.
    """
    if len(paths) < 2:
        raise ConfigurationError("To merge takes two files or more.")
    files = {str(path): read(path) for path in paths}
    if len(files) < len(paths):
        raise ConfigurationError("A file is named twice.")
    (first, base), *others = files.items()
    for path, contents in others:
        with recipe_of(path):
            _check_same(first, base, path, contents)
    module = load(first, trust=trust, network=network)
    module.method.check_merge()
    numbers = _numbers(files, renumber=renumber)
    with recipe_of(first):
        if any(numbers.values()) and not tasks_are_known(base.recipe or {}):
            raise ConfigurationError("Tasks that were discovered (scenario=nns) cannot get other numbers.")
    with TemporaryDirectory() as folder:
        for path, contents in others:
            source: str | Path = path
            if numbers[path]:
                source = Path(folder) / Path(path).name
                own = {task: task for task in finished_tasks(contents.tensors)}
                with recipe_of(path):
                    contents = with_numbers(contents, own | numbers[path])
                codec.write_contents(source, contents)
            module.merge(source)
        joined = Path(folder) / "joined" / "bank.safetensors"
        module.save(joined)
        load(joined, trust=trust, network=network)  # checks it
        contents = in_order(read(joined))
    codec.write_contents(out, contents)
    renewed = {path: own for path, own in numbers.items() if own}
    return Join(sorted(finished_tasks(contents.tensors)), renewed, _notes(files, contents))


def _numbers(files: Mapping[str, Contents], *, renumber: bool) -> dict[str, dict[int, int]]:
    """Per file, the new numbers of tasks whose number an earlier file has."""
    owner: dict[int, str] = {}
    numbers: dict[str, dict[int, int]] = {}
    every = {task for contents in files.values() for task in finished_tasks(contents.tensors)}
    free = max(every, default=-1) + 1
    for path, contents in files.items():
        tasks = sorted(finished_tasks(contents.tensors))
        clashes = [task for task in tasks if task in owner]
        if clashes and not renumber:
            raise ConfigurationError(
                f"{path} has tasks of the numbers {', '.join(map(str, clashes))}, as {owner[clashes[0]]} has. If they "
                "are different tasks, renumber (--renumber gives those of the later file the next free numbers); if "
                "not, remove it from one of the files."
            )
        numbers[path] = {task: free + place for place, task in enumerate(clashes)}
        free += len(clashes)
        owner |= {numbers[path].get(task, task): path for task in tasks}
    return numbers


def _check_same(first: str, base: Contents, path: str, other: Contents) -> None:
    """Raise `MismatchError`, naming what differs, unless two files were made in the same way."""
    here, there = base.recipe or {}, other.recipe or {}
    parts = ("network", "method", "inference", "scenario")
    one, two = (_flat({part: recipe[part] for part in parts}) for recipe in (here, there))
    pairs = [
        (name.replace("._target_", ""), one.get(name), two.get(name))
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    ]
    if not pairs:
        keys = sorted(base.identity.keys() | other.identity.keys())
        texts = {"network": "the network's weights"}
        pairs = [
            (texts.get(key, key), base.identity.get(key), other.identity.get(key))
            for key in keys
            if base.identity.get(key) != other.identity.get(key)
        ]
    shape, other_shape = ((recipe["inputs"] or {}).get("shape") for recipe in (here, there))
    if not pairs and shape != other_shape:
        pairs = [("shape of the inputs", shape, other_shape)]
    if pairs:
        told = "; ".join(f"{name} is {one!s:.60} and {two!s:.60}" for name, one, two in pairs[:_MOST_DIFFERENCES])
        more = f"; and {len(pairs) - _MOST_DIFFERENCES} more" if len(pairs) > _MOST_DIFFERENCES else ""
        raise MismatchError(
            f"{first} and {path} cannot be merged: {told}{more}. Train both with the same network, seed and options."
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flat(each, f"{name}.{key}" if name else key) for key, each in value.items()]
    return {key: each for part in parts for key, each in part.items()}


def _notes(files: Mapping[str, Contents], joined: Contents) -> tuple[str, ...]:
    notes = []
    if not building.own((joined.recipe or {})["scenario"]).task_known_at_inference:
        notes.append("the accuracies are those of each file, whose tasks were found among its own alone")
    raws = [(each.recipe or {}).get("raw") or {} for each in files.values()]
    if (joined.recipe or {}).get("raw", {}) not in raws and not all(raw.get("refused") for raw in raws):
        notes.append("the files prepare images differently, so the joined one predicts prepared tensors alone")
    if any(images_of_removed_tasks(each.tensors) for each in files.values()):
        notes.append("the gate's matrix also has images of tasks that were removed, perhaps in several of the files")
    return tuple(notes)
