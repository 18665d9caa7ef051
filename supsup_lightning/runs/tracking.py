"""What the loggers of a run are told about tasks, each in the way that suits it."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from supsup_lightning.methods import Method
from supsup_lightning.runs.loggers import tolerating
from supsup_lightning.runs.wandb_logger import LEARNED, TASK

logger = logging.getLogger(__name__)

# W&B shows no more rows of a table.
MOST_TABLE_ROWS = 10_000

_ON_AXIS = {
    TASK: ("task/validation_accuracy", "task/seconds", "task/bytes", "task/accuracy", "task/found"),
    LEARNED: ("learned/accuracy",),
}


def define_axes(listener: Logger) -> None:
    """Tell W&B which metrics belong to the task axis, and which to the number of learned tasks."""
    if isinstance(listener, WandbLogger):
        with tolerating(listener, "define_metric"):
            for axis, names in _ON_AXIS.items():
                for name in names:  # by name, as Lightning puts all others (*) on its own axis
                    # The last task's number would pass for the run's in W&B's summary; bytes grow from task to task.
                    summary = "none" if axis == TASK and name != "task/bytes" else None
                    listener.experiment.define_metric(name, step_metric=axis, summary=summary)


def log_on_axis(listener: Logger, values: Mapping[str, float], *, axis: str, number: int, step: int) -> None:
    """Log values of one task, or after a number of tasks.

    W&B and CSV files get the number as a value of its own, `TASK` or `LEARNED`. Other loggers have one axis per
    metric, the step.

    Args:
        listener: logger.
        values: by name.
        axis: `TASK` or `LEARNED`.
        number: of the task, from 0 on, or of tasks.
        step: of the optimizer, for CSV files.
    """
    if isinstance(listener, WandbLogger):
        listener.log_metrics({axis: number, **values})
    elif isinstance(listener, CSVLogger):
        listener.log_metrics({axis: number, **values}, step=step)
    else:
        listener.log_metrics(dict(values), step=number)


def log_once(listener: Logger, values: Mapping[str, float]) -> None:
    """Log numbers that do not change in a run: W&B has its summary for them, other loggers get them at step 0."""
    if isinstance(listener, WandbLogger):
        with tolerating(listener, "summary"):
            listener.experiment.summary.update(dict(values))
    else:
        listener.log_metrics(dict(values), step=0)


def log_table(listener: Logger, name: str, *, columns: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Log a table, which W&B alone can show; of a longer one than that, the last `MOST_TABLE_ROWS` rows."""
    if not isinstance(listener, WandbLogger):
        return
    if len(rows) > MOST_TABLE_ROWS:
        logger.warning(
            "W&B shows %d rows of a table: of the %d rows of %s, it gets the last ones. The CSV file in the output "
            "directory has all of them.",
            MOST_TABLE_ROWS,
            len(rows),
            name,
        )
    listener.log_table(f"table/{name}", columns=list(columns), data=[list(row) for row in rows[-MOST_TABLE_ROWS:]])


def log_picture(listener: Logger, path: Path, *, step: int) -> None:
    """Log a PNG file under its name, where a logger shows pictures: W&B and TensorBoard."""
    if isinstance(listener, WandbLogger):
        listener.log_image(path.stem, [str(path)])
    elif isinstance(listener, TensorBoardLogger):
        from PIL import Image

        with tolerating(listener, "add_image"), Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
            listener.experiment.add_image(path.stem, pixels, global_step=step, dataformats="HWC")


def log_bank(listener: Logger, path: Path, metadata: Mapping[str, Any]) -> None:
    """Log the mask bank as a W&B artifact named after the run, if its logger has ``log_model``."""
    if not getattr(listener, "logs_bank", False):
        return
    import wandb

    with tolerating(listener, "log_artifact"):
        run = listener.experiment  # type: ignore[attr-defined]
        artifact = wandb.Artifact(artifact_name(run.name or run.id), type="model", metadata=dict(metadata))
        artifact.add_file(str(path), name=path.name)
        run.log_artifact(artifact, aliases=["latest"])


def artifact_name(name: str) -> str:
    """Turn the name of a run into one that W&B accepts for an artifact: letters, digits, ``_.-``, at most 128 bytes.

    >>> artifact_name("seed=1")
    'seed-1'
    """
    allowed = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    if len(allowed) <= 128:
        return allowed
    return f"{allowed[:119]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def weight_counts(method: Method) -> dict[str, int]:
    """Return the number of parameters, how many of them are masked, and the bytes that one more task adds."""
    masked = [part for part in method.parts() if part.kept in ("mask", "implicit")]
    return {
        "model/parameters": sum(parameter.numel() for parameter in method.network.parameters()),
        "model/masked_weights": sum(prod(part.shape) for part in masked),
        "model/bytes_per_task": method.task_bytes(),
    }


def matrix_cells(matrix: Tensor, *, first_task: int = 0) -> list[tuple[int, int, float]]:
    """Return the evaluated cells of an accuracy matrix: number of tasks learned, task, accuracy.

    >>> import torch
    >>> matrix_cells(torch.tensor([[0.5, torch.nan], [0.25, 1.0]]))
    [(1, 0, 0.5), (2, 0, 0.25), (2, 1, 1.0)]
    """
    rows, tasks = (~matrix.isnan()).nonzero(as_tuple=True)
    accuracies = matrix[rows, tasks].tolist()
    return list(zip((rows + 1).tolist(), (first_task + tasks).tolist(), accuracies, strict=True))
