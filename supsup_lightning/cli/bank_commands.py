"""The commands `supsup bank ...`: what a file of finished tasks holds, and new files made of such files."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from supsup_lightning.cli.error_messages import errors_shown
from supsup_lightning.errors import ConfigurationError

bank = typer.Typer(
    no_args_is_help=True,
    help="Look into files of finished tasks (mask_bank.safetensors), join them, and take tasks out.",
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="File of finished tasks, mask_bank.safetensors of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import and call the network that the file names: any program could be run.")
]
Out = Annotated[Path | None, typer.Option(help="File to write; by default FILE itself.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file of --out if it exists.")]


@bank.command("info")
def info_command(file: File, as_json: AsJson = False, trust: Trust = False) -> None:
    """Say what is in a file: network, method, tasks, bytes, sparsity, accuracies at training time, versions."""
    with errors_shown():
        from supsup_lightning.recipe import overview

        found = overview.info(file, trust=trust)
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


@bank.command("list")
def list_command(file: File, as_json: AsJson = False, trust: Trust = False) -> None:
    """List the tasks: number, name, classes, validation and test accuracy at training time, sparsity."""
    with errors_shown():
        from supsup_lightning.recipe import overview

        rows = overview.tasks(file, trust=trust)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    titles = ("task", "name", "validation", "test", "sparsity", "classes")
    cells = [
        (
            str(row["task"]),
            row["name"],
            *(_share(row[name]) for name in ("validation", "test", "sparsity")),
            ", ".join(row["classes"]) or str(row["num_classes"]),
        )
        for row in rows
    ]
    _print_table(titles, cells)


@bank.command("verify")
def verify_command(file: File, trust: Trust = False) -> None:
    """Check every checksum, the recipe, and that the network made from it computes what was trained."""
    with errors_shown():
        from supsup_lightning.recipe import overview

        print(overview.verify(file, trust=trust))


@bank.command("merge")
def merge_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE FILE...", help="Files to join, two or more.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    renumber: Annotated[
        bool, typer.Option("--renumber", help="Give a later file's tasks free numbers where an earlier one has theirs.")
    ] = False,
    force: Force = False,
    trust: Trust = False,
) -> None:
    """Join files of tasks trained apart on the same network: the file of one run of all their tasks."""
    with errors_shown():
        from supsup_lightning.recipe.joined_files import join_files

        _check_out(out, force=force)
        with _quiet():
            joined = join_files(files, out=out, renumber=renumber, trust=trust)
    for path, numbers in joined.numbers.items():
        changes = ", ".join(f"{old} is {new}" for old, new in numbers.items())
        print(f"renumbered tasks of {path}: {changes}")
    for note in joined.notes:
        typer.echo(f"note: {note}", err=True)
    print(f"{out}: {len(joined.tasks)} tasks, {out.stat().st_size} bytes")


@bank.command("remove")
def remove_command(
    file: File,
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Numbers or names of tasks.")],
    out: Out = None,
    force: Force = False,
    trust: Trust = False,
) -> None:
    """Remove tasks, by number or by name, and say what stays of them. All that stays is kept bit for bit."""
    with errors_shown():
        from supsup_lightning.recipe.changed_file import remove_tasks

        _check_out(out, force=force, file=file)
        with _quiet():
            removal = remove_tasks(file, tasks, out=out, trust=trust)
    for task, name in removal.names.items():
        print(f"removed task {task} ({name})")
    for part in removal.stays:
        print(f"stays: {part}")
    if removal.unchecked:
        typer.echo(f"note: {removal.unchecked}; --trust makes the network, and writes some", err=True)
    print(f"{out or file}: {(out or file).stat().st_size} bytes")


@bank.command("rename")
def rename_command(
    file: File,
    task: Annotated[str, typer.Argument(metavar="TASK", help="Number or name of the task.")],
    name: Annotated[str, typer.Argument(metavar="NEWNAME", help="Its new name.")],
    out: Out = None,
    force: Force = False,
) -> None:
    """Give a task another name; nothing else changes."""
    with errors_shown():
        from supsup_lightning.recipe.changed_file import rename_task

        _check_out(out, force=force, file=file)
        number, before = rename_task(file, task, name, out=out)
    print(f"{out or file}: task {number} ({before}) is now {name}")


def _check_out(out: Path | None, *, force: bool, file: Path | None = None) -> None:
    """Raise `ConfigurationError` for a file to write that exists, unless it is the one that was named to be changed."""
    if (
        out is not None
        and out.exists()
        and not force
        and not (file is not None and file.exists() and out.samefile(file))
    ):
        raise ConfigurationError(f"--out {out} exists; choose another name, or replace it with --force.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package from logging anything but errors: the command says what matters."""
    package = logging.getLogger("supsup_lightning")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def _lines(found: dict[str, Any]) -> list[str]:
    size = found["bytes"]
    least, most = found["classes_per_task"]
    parts = ", ".join(f"{name} {number}" for name, number in (size["parts"] or {}).items())
    rows = {
        "file": f"{found['file']}, {size['file']} bytes, format {found['format']}",
        "network": _call(found["network"]),
        "method": _call(found["method"]),
        "scenario": found["scenario"],
        "inference": _call(found["inference"]),
        "seed": found["seed"],
        "tasks": f"{found['num_tasks']}, of {least if least == most else f'{least} to {most}'} classes each",
        "bytes per task": size["per_task"],
        "bytes by part": parts or None,
        "sparsity": _share(found["sparsity"]),
        "accuracy": ", ".join(f"{name} {_share(value)}" for name, value in found["accuracy"].items()),
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "note": found["note"],
    }
    return [f"{name:<15}{value}" for name, value in rows.items() if value is not None]


def _call(described: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={_value(value)}" for name, value in described["arguments"].items())
    return f"{described['class'].rpartition('.')[2]}({arguments})"


def _value(value: Any) -> str:
    if isinstance(value, dict) and "_target_" in value:
        arguments = {name: each for name, each in value.items() if name != "_target_"}
        return _call({"class": value["_target_"], "arguments": arguments})
    return repr(value)


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"


def _print_table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
