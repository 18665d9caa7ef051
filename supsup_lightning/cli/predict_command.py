"""The command `supsup predict`: task and class of images, by a file of finished tasks."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from supsup_lightning.cli.error_messages import errors_shown
from supsup_lightning.errors import ConfigurationError, DataError, check_choice, check_whole

COLUMNS = ("path", "task", "class", "confidence", "unknown")


def predict_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File of finished tasks.")],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Images, folders, .npy arrays, .csv lists of paths.")
    ],
    output_format: Annotated[str, typer.Option("--format", help="table, json or csv.")] = "table",
    out: Annotated[Path | None, typer.Option(help="File to write in place of the terminal.")] = None,
    task: Annotated[str | None, typer.Option(help="Number or name of the task of all images, if it is known.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out files that are no images.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images in memory at a time.")] = 64,
    trust: Annotated[
        bool, typer.Option("--trust", help="Import and call the network that the file names: it could be any program.")
    ] = False,
) -> None:
    """Name the task and the class of images, each image by itself: one row per image.

    supsup predict mask_bank.safetensors letters/ --format csv --out found.csv
    """
    with errors_shown():
        check_choice("--format", output_format, ("table", "json", "csv"))
        check_whole("--batch-size", batch_size)
        from supsup_lightning.files import replacing
        from supsup_lightning.recipe import image_sources

        paths = image_sources.listed(images)
        rows = _rows(file, paths, task=task, skips=skip_bad, size=batch_size, trust=trust)
        if out is None:
            _write(rows, sys.stdout, output_format)
            return
        with replacing(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            number = _write(rows, stream, output_format)
        print(f"{number} images in {out}", file=sys.stderr)


def _rows(
    file: Path, paths: list[Path], *, task: str | None, skips: bool, size: int, trust: bool
) -> Iterator[dict[str, Any]]:
    from supsup_lightning import load
    from supsup_lightning.recipe.image_sources import Preparation, batches
    from supsup_lightning.recipe.task_names import find_task

    model = load(file, trust=trust)
    names = {number: model.name_of_task(number) for number in model.method.tasks.tolist()}
    number = None if task is None else find_task(task, names)
    if number is None and not model.inference.finds_task:
        some = ", ".join([*names.values()][:5])
        raise ConfigurationError(
            f"{file} finds no task of images (scenario=gg): say which it is, --task NAME, of {some}, for example."
        )
    about = model.about_data
    inputs, raw = (model.inputs, None) if about is None else (about.inputs, about.raw)
    found = 0
    for batch in batches(paths, Preparation(inputs, raw, model.method.network, skips), size=size):
        for message in batch.skipped:
            print(f"skipped: {message}", file=sys.stderr)
        if not batch.names:
            continue
        answer = model.predict(batch.images, task=number)
        found += len(answer)
        columns = (
            batch.names,
            answer.task_name,
            answer.class_name,
            answer.confidence.tolist(),
            answer.unknown.tolist(),
        )
        for row in zip(*columns, strict=True):
            yield dict(zip(COLUMNS, row, strict=True))
    if not found:
        raise DataError("None of the files is an image that can be read.")


def _write(rows: Iterator[dict[str, Any]], stream: TextIO, output_format: str) -> int:
    """Write rows as they come, and return their number."""
    number = 0
    row = next(rows, None)  # errors of the first batch come before any output
    if output_format == "csv":
        csv.writer(stream, lineterminator="\n").writerow(COLUMNS)
    elif output_format == "table":
        print(f"{'task':<20}  {'class':<20}  confidence  unknown  path", file=stream)
    while row is not None:
        if output_format == "json":
            stream.write(("[\n" if not number else ",\n") + json.dumps(row))
        elif output_format == "csv":
            cells = [_cell(name, row[name]) for name in COLUMNS]
            csv.writer(stream, lineterminator="\n").writerow(cells)
        else:
            task, label, confidence, unknown = (_cell(name, row[name]) for name in COLUMNS[1:])
            print(f"{task:<20}  {label:<20}  {confidence:<10}  {unknown:<7}  {row['path']}", file=stream)
        number += 1
        row = next(rows, None)
    if output_format == "json":
        stream.write("\n]\n" if number else "[]\n")
    return number


def _cell(name: str, value: Any) -> str:
    if name == "confidence":
        return f"{value:.4f}"
    if name == "unknown":
        return "yes" if value else "no"
    return "" if value is None else str(value)
