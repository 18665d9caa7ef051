"""Changes of a file of finished tasks: tasks removed, renamed and renumbered. What stays is kept bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from supsup_lightning.bank import codec
from supsup_lightning.bank.codec import Contents
from supsup_lightning.bank.selection import finished_tasks, images_of_removed_tasks, renumbered, selected
from supsup_lightning.errors import ConfigurationError, DataError, SupSupError
from supsup_lightning.methods import PSP, HopSupSup, LowerBound
from supsup_lightning.recipe import fingerprint
from supsup_lightning.recipe.loading import load
from supsup_lightning.recipe.recorded import KNOWN, TARGET
from supsup_lightning.recipe.task_names import find_task, names_of, renamed, with_tasks


@dataclass(frozen=True)
class Removal:
    """What `remove_tasks` did.

    Attributes:
        names: name of each removed task, by number.
        stays: what stays of the removed tasks, in words; empty if nothing.
        unchecked: why the file has no logits to compare with; empty if it has.
    """

    names: dict[int, str]
    stays: tuple[str, ...] = ()
    unchecked: str = ""


def read(path: str | Path) -> Contents:
    """Read a file that has a recipe. Raises `DataError` if it is damaged, or has none."""
    contents = codec.read_contents(path)
    if contents.recipe is None:
        raise DataError(
            f"The file {path} does not say what its tasks are called: an earlier version, or a method's own `save`, "
            "wrote it. Make the model as for training, model.method.load(path), and model.save(path)."
        )
    return contents


@contextmanager
def recipe_of(path: str | Path) -> Iterator[None]:
    """Raise `DataError` where a recipe is not what this package writes, though its digest is right."""
    try:
        yield
    except SupSupError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"The file {path} is refused: its recipe is damaged or made up ({type(error).__name__}: {error!s:.200})."
        ) from error


def remove_tasks(
    path: str | Path,
    tasks: Sequence[str],
    *,
    out: str | Path | None = None,
    trust: bool = False,
    network: nn.Module | None = None,
) -> Removal:
    """Remove tasks from a file.

    Args:
        path: path of the file.
        tasks: numbers or names.
        out: the file to write; by default the same.
        trust: as for `load`, by which the logits of the fingerprint are computed where those of removed tasks go.
        network: likewise.

    Raises:
        ConfigurationError: an unknown task, all tasks, or a method whose tasks share all that is kept.
    """
    contents = read(path)
    assert contents.recipe is not None
    with recipe_of(path):
        kind = KNOWN.get(contents.recipe["method"][TARGET])
    if kind in (HopSupSup, LowerBound, PSP):
        raise ConfigurationError(
            f"The tasks of {kind.__name__} share all that the file keeps, so none can be removed; train anew without "
            "it. Only tasks with rows of their own can go."
        )
    with recipe_of(path):
        names = names_of(contents.recipe, finished_tasks(contents.tensors))
    removed = {task: names[task] for task in (find_task(text, names) for text in tasks)}
    kept = [task for task in names if task not in removed]
    if not kept:
        raise ConfigurationError(f"These are all tasks of {path}; to remove all, delete the file.")
    with recipe_of(path):
        recipe = with_tasks(contents.recipe, {task: task for task in kept})
    less = contents._replace(tensors=selected(contents.tensors, kept), recipe=recipe)
    less, unchecked = _with_fingerprint(less, trust=trust, network=network)
    codec.write_contents(path if out is None else out, less)
    return Removal(removed, _what_stays(less), unchecked)


def _with_fingerprint(contents: Contents, *, trust: bool, network: nn.Module | None) -> tuple[Contents, str]:
    """Add the logits of the first and last task, if the network can be made; else say why it has fewer."""
    assert contents.recipe is not None
    with TemporaryDirectory() as folder:
        trial = Path(folder) / "bank.safetensors"
        codec.write_contents(trial, contents)
        try:
            module = load(trial, trust=trust, network=network)
        except ConfigurationError:
            lacks = "" if contents.recipe["fingerprint"] else "no logits are left to compare with when it is loaded"
            return contents, lacks
    logits = fingerprint.fingerprint(module.method, module.inputs, tasks=fingerprint.ends_of(module.method))
    known = contents.recipe["fingerprint"]  # as in training
    return contents._replace(
        recipe={**contents.recipe, "fingerprint": {task: known.get(task, own) for task, own in logits.items()}}
    ), ""


def _what_stays(contents: Contents) -> tuple[str, ...]:
    stays = []
    if images := images_of_removed_tasks(contents.tensors):
        stays.append(
            f"the scatter of {images} images in the matrix that all tasks of the gate share, a sum that cannot be "
            "told apart (inference.per_task=true keeps one matrix per task)"
        )
    if "gate.patches.mean" in contents.tensors:
        stays.append("the gate's filters, which were whitened on the images of the first task")
    if {"trunk", "weights"} & contents.tensors.keys():
        stays.append("the weights that all tasks share, which the first task has trained")
    return tuple(stays)


def rename_task(path: str | Path, task: str, name: str, *, out: str | Path | None = None) -> tuple[int, str]:
    """Give a task of a file another name. Returns its number and its name before.

    Raises:
        ConfigurationError: an unknown task, or a name that cannot be told from another.
    """
    contents = read(path)
    assert contents.recipe is not None
    tasks = finished_tasks(contents.tensors)
    with recipe_of(path):
        names = names_of(contents.recipe, tasks)
        number = find_task(task, names)
        recipe = renamed(contents.recipe, number, name, tasks=tasks)
    codec.write_contents(path if out is None else out, contents._replace(recipe=recipe))
    return number, names[number]


def with_numbers(contents: Contents, numbers: Mapping[int, int]) -> Contents:
    """Give all tasks of a file other numbers; their names stay."""
    assert contents.recipe is not None
    recipe = with_tasks(contents.recipe, numbers)
    return contents._replace(tensors=renumbered(contents.tensors, numbers), recipe=recipe)


def in_order(contents: Contents) -> Contents:
    """Sort the rows by ascending number of the task, as one run has them."""
    tasks = finished_tasks(contents.tensors)
    return contents._replace(tensors=selected(contents.tensors, sorted(tasks))) if tasks != sorted(tasks) else contents
