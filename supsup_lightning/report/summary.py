"""Results of a run as numbers: results.json and the table at the end."""

import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Column, Table
from torch import Tensor

from supsup_lightning import __version__
from supsup_lightning.checks.trainer_checks import LIMITS
from supsup_lightning.files import replacing
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import TrainsOn
from supsup_lightning.report import incremental
from supsup_lightning.report.metrics import TaskAccuracy, TaskAssignment, backward_transfer, forgetting
from supsup_lightning.scenario import Scenario

if TYPE_CHECKING:
    from supsup_lightning.module import ContinualModule

# A table of more tasks shows only the first and the last ones.
_MOST_TABLE_ROWS = 40

_KEPT = {  # in words
    "frozen": "nothing (frozen)",
    "shared": "nothing (the first task trains it)",
    "overwritten": "nothing (each task overwrites it)",
    "rotated": "a rotation, regrown from the seed",
    "implicit": "mask, in the Hopfield memory",
    "own": "values of its own",
    "factors": "a factor for each output and input",
}

_VERSIONS_OF = ("torch", "lightning", "torchvision", "torchmetrics", "hydra-core")


def results(
    *,
    run: Mapping[str, Any],
    scenario: Scenario,
    method: Method,
    accuracy: TaskAccuracy,
    matrix: Tensor,
    seconds_per_task: Sequence[float],
    inference_ms_per_batch: float,
    model_bytes: int,
    num_classes: Sequence[int],
    first_task: int = 0,
    skipped_images: int = 0,
    stream: Mapping[str, Any] | None = None,
    recovery: Mapping[str, Any] | None = None,
    validation: Mapping[int, float] | None = None,
    identity: Mapping[str, Any] | None = None,
    class_incremental: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the contents of results.json.

    Args:
        run: names of scenario, data, network and method, and the seed.
        scenario: the scenario, which decides whether there is task inference to report.
        method: method with its finished tasks.
        accuracy: accuracy of the final test.
        matrix: accuracy matrix, ``(tasks, tasks)``.
        seconds_per_task: time of training alone, in seconds.
        inference_ms_per_batch: time to infer the task and predict, in ms, mean over the test batches.
        model_bytes: size of the model file, which is all that is needed besides code and configuration.
        num_classes: number of classes of each task.
        first_task: number of the first task, where these are a part of the tasks.
        skipped_images: image files left out because they could not be read, since this process started.
        stream: entries of a stream without announced tasks, made by `stream`.
        recovery: statistics of mask recovery from a Hopfield memory, made by `RecoveryStatistics`.
        validation: accuracy of each task on its validation images, with the task given; NaN if it has none.
        identity: digests of the configuration and of the data files.
        class_incremental: entries made by `incremental.entries`.
    """
    right, found = accuracy.compute()
    kept = method.kept_bytes()
    per_task = [round(value, 6) for value in right.tolist()]
    return {
        **run,
        **({"first_task": first_task} if first_task or "task_shard" in run else {}),
        "num_tasks": len(per_task),
        "num_masks": num_masks(method),
        "tasks_at_once": method.live.rows,
        "average_accuracy": round(sum(per_task) / len(per_task), 6),
        "accuracy_per_task": per_task,
        **_validation(validation or {}, tasks=range(first_task, first_task + len(per_task))),
        "num_classes": list(num_classes),
        "task_inference_accuracy": None if scenario.task_known_at_inference else round(found.mean().item(), 6),
        **(class_incremental or {}),
        # Without announced tasks, no task is learned at one time, after which it could be forgotten.
        "forgetting": forgetting(matrix) if scenario.task_known_in_training else None,
        "backward_transfer": backward_transfer(matrix) if scenario.task_known_in_training else None,
        "sparsity": round(method.sparsity().mean().item(), 6),
        "mask_bytes_per_task": method.task_bytes(),
        "kept_bytes": kept,
        "kept_bytes_in_all": sum(kept.values()),
        **method.details(),
        **({} if recovery is None else {"recovery": dict(recovery)}),
        **(stream or {}),
        "model_bytes": model_bytes,
        "cap": round((model_bytes + kept.get("network", 0)) / method.dense_bytes(), 6),
        "train_seconds": round(sum(seconds_per_task), 3),
        "seconds_per_task": [round(seconds, 4) for seconds in seconds_per_task],
        "inference_ms_per_batch": round(inference_ms_per_batch, 4),
        "peak_memory_bytes": peak_memory_bytes(),
        "skipped_images": skipped_images,
        "versions": {
            "supsup-lightning": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _VERSIONS_OF},
        },
        "identity": None if identity is None else dict(identity),
    }


def _validation(accuracy: Mapping[int, float], *, tasks: range) -> dict[str, Any]:
    """Validation accuracy per task and its average; null for a task without images, or if a task is missing."""
    values = [accuracy.get(task, math.nan) for task in tasks]
    per_task = [None if math.isnan(value) else round(value, 6) for value in values]
    known = [value for value in per_task if value is not None]
    return {
        "validation_accuracy": round(sum(known) / len(known), 6) if known and len(accuracy) == len(tasks) else None,
        "validation_accuracy_per_task": per_task if known else None,
    }


def stream(module: "ContinualModule", assignment: TaskAssignment) -> dict[str, Any]:
    """Return the entries of results.json for a stream without announced tasks.

    Args:
        module: module with its finished tasks, and the true task of each of them.
        assignment: assignment of training batches to the learner's tasks.
    """
    method = module.method
    figures = {name: round(value.item(), 6) for name, value in assignment.compute().items()}
    learned: dict[int, list[int]] = {task: [] for task in sorted(set(module.true_tasks.values()))}
    for task in method.tasks.tolist():
        if task in module.true_tasks:
            learned[module.true_tasks[task]].append(task)
    return {
        "num_combinations": len(method.tasks) - num_masks(method),
        "combination_bytes": method.combination_bytes() if isinstance(method, TrainsOn) else 0,
        "adjusted_rand_index": figures["adjusted_rand_index"],
        "assignment_accuracy": figures["matched"],
        "learned_as": {str(task): own for task, own in learned.items()},
    }


def num_masks(method: Method) -> int:
    """Number of finished tasks that are not combinations of other tasks."""
    return method.num_masks if isinstance(method, TrainsOn) else len(method.tasks)


def _bytes_of(method: Method, task: int) -> int:
    return method.bytes_of(task) if isinstance(method, TrainsOn) else method.task_bytes()


def peak_memory_bytes() -> int | None:
    """Peak memory in bytes: of the accelerator if it was used, else of the process; None if not known."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as JSON; the file is complete or unchanged."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file of `write_json`."""
    return json.loads(Path(path).read_text())


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Return remarks about a result that a user might overlook in the table."""
    said = []
    skipped, found = result["skipped_images"], result["task_inference_accuracy"]
    if skipped:
        said.append(f"{skipped} image{'s' if skipped > 1 else ''} could not be read and left out of account")
    said += incremental.remarks(result)
    if "task_shard" in result:
        first = result["first_task"]
        said.append(
            f"data.task_shard={result['task_shard']}: these are the numbers of tasks {first} to "
            f"{first + result['num_tasks'] - 1}, among these alone; merge the shards' banks to test all tasks"
        )
    limited = [f"trainer.{name}={result[name]}" for name in LIMITS if name in result]
    if limited:
        said.append(f"{', '.join(limited)}: these are the numbers of a part of the data")
    assigned = result.get("assignment_accuracy")
    if assigned is not None and assigned < 0.8 and "evaluation" not in result:  # training is over
        said.append(
            f"only {assigned:.0%} of the training batches trained the task of their own that they should have: "
            f"num_masks={result['num_masks']} for num_tasks={result['num_tasks']}. Look at figures/stream.png; a "
            "higher discovery.threshold keeps tasks apart that resemble one another, and discovery=gradient goes with "
            "optimizer=rmsprop schedule=constant"
        )
    elif found is not None and found < 0.5 and "recovery" in result:
        said.append(
            f"only {found:.0%} of the inputs recovered a mask near their task's: give more images at a time "
            "(data.batch_size), train longer, mask other vectors (mask.include), or use method=supsup"
        )
    elif found is not None and found < 0.5 and "init" in result:
        said.append(
            f"only {found:.0%} of the inputs found their task: masks that start from one another look alike (mask.init="
            f"{result['init']}); use mask.init=random, or give the task with scenario=gg"
        )
    elif found is not None and found < 0.5:
        said.append(
            f"only {found:.0%} of the inputs found their task: tasks that resemble one another are hard to tell apart "
            "by one gradient; try inference=exhaustive inference.images=batch, or give the task with scenario=gg"
        )
    if "sparsity_search" in result:
        search = result["sparsity_search"]
        times, chosen = search["trainings_per_task"], search["chosen"].values()
        said.append(
            f"mask.sparsity=auto trained each task {times} times and kept sparsities from {min(chosen)} to "
            f"{max(chosen)} (validation accuracy at most {search['tolerance']} below the densest mask's)"
        )
    if "smaller_from_num_tasks" in result:
        said.append(storage_remark(result))
    if "evaluation" in result:
        said += evaluation_remarks(result["evaluation"])
    return said


def evaluation_remarks(evaluation: Mapping[str, Any]) -> list[str]:
    """Compare an evaluation with the results of its run."""
    run = evaluation["run"]
    found = run["task_inference_accuracy"]
    other_data = [f"other data than the masks were trained on: {'; '.join(evaluation['other_data'])}"]
    return [
        f"the run itself: accuracy {run['average_accuracy']:.4f}"
        + ("" if found is None else f", task found {found:.4f}")
        + f" (scenario={run['scenario']} inference={run['inference']})",
        *(other_data if evaluation["other_data"] else []),
    ]


def storage_remark(storage: Mapping[str, Any]) -> str:
    """Describe the size of a Hopfield memory in comparison with explicit masks."""
    return (
        f"the Hopfield memory takes {storage['memory_bytes']:,} bytes for any number of tasks, explicit masks "
        f"{storage['explicit_bytes_per_task']:,} per task, which is less up to "
        f"{storage['smaller_from_num_tasks'] - 1:,} tasks; by theory it holds about {storage['capacity']:,} masks"
    )


def masked_table(method: Method) -> Table:
    """Table of what each task stores of each parameter and buffer of the network, with its bytes."""
    shown = Table(Column("parameter", overflow="fold"), "shape", "kept per task")
    for name in ("density", "bytes per task"):
        shown.add_column(name, justify="right")
    parts = method.parts()
    for part in parts:
        shown.add_row(
            part.name,
            " x ".join(map(str, part.shape)) or "1",
            _KEPT.get(part.kept, part.kept),
            "" if part.density is None else f"{part.density:.4f}",
            f"{part.task_bytes:,.1f}" if part.task_bytes else "",
        )
    shown.add_section()
    masked = [part for part in parts if part.density is not None]
    if masked:
        weights = sum(prod(part.shape) for part in masked)
        density = sum(prod(part.shape) * (part.density or 0) for part in masked) / weights
        shown.add_row("all", f"{weights:,} masked", "", f"{density:.4f}", f"{method.task_bytes():,}", style="bold")
    else:
        weights = sum(prod(part.shape) for part in parts)
        shown.add_row("all", f"{weights:,}", "", "", f"{method.task_bytes():,}", style="bold")
    details = method.details()
    if "smaller_from_num_tasks" in details:
        shown.caption = storage_remark(details)
    return shown


def table(result: Mapping[str, Any], *, accuracy: TaskAccuracy, method: Method) -> Table:
    """Table of the result per task, with the averages in the last row, for a terminal.

    Args:
        result: the output of `results`.
        accuracy: accuracy of the final test.
        method: method with its finished tasks.
    """
    title = " · ".join(
        f"{key} {result[key]}" for key in ("scenario", "data", "network", "method", "seed") if key in result
    )
    learned_as = result.get("learned_as")  # only without announced tasks
    columns = ["task", "accuracy", "task found", "sparsity", "bytes"]
    shown = Table(*columns, *(["learned as"] if learned_as is not None else []), title=title, show_footer=False)
    for column in shown.columns:
        column.justify = "right"
    hidden = result["task_inference_accuracy"] is not None
    found = accuracy.compute()[1].tolist()
    sparsity = dict(zip(method.tasks.tolist(), method.sparsity().tolist(), strict=True))
    num_tasks = result["num_tasks"]
    rows = []
    for place, value in enumerate(result["accuracy_per_task"]):
        task = place + result.get("first_task", 0)
        own = [task] if learned_as is None else learned_as.get(str(task), [])
        off = f"{sum(sparsity[number] for number in own) / len(own):.4f}" if own else ""
        row = [str(task), f"{value:.4f}", f"{found[place]:.4f}" if hidden else "given", off]
        row.append(f"{sum(_bytes_of(method, number) for number in own):,}")
        if learned_as is not None:
            row.append(", ".join(map(str, own)) or "nothing of its own")
        rows.append(row)
    if num_tasks > _MOST_TABLE_ROWS:
        half = _MOST_TABLE_ROWS // 2
        rows = [*rows[:half], ["…"] * len(shown.columns), *rows[-half:]]
    for row in rows:
        shown.add_row(*row)
    shown.add_section()
    tasks = f"{result['num_masks']} mask{'s' if result['num_masks'] != 1 else ''}"
    shown.add_row(
        "all",
        f"{result['average_accuracy']:.4f}",
        f"{result['task_inference_accuracy']:.4f}" if hidden else "given",
        f"{result['sparsity']:.4f}",
        f"{result['model_bytes']:,}",
        *([tasks] if learned_as is not None else []),
        style="bold",
    )
    shown.caption = incremental.in_words(result) or None
    return shown
