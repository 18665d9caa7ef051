"""The command `supsup`: train, report, evaluate, predict, bank."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from supsup_lightning import __version__
from supsup_lightning.cli.bank_commands import bank
from supsup_lightning.cli.error_messages import errors_shown
from supsup_lightning.cli.evaluate import evaluate_command
from supsup_lightning.cli.predict_command import predict_command

app = typer.Typer(
    name="supsup",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Supermasks in superposition: train many tasks on one frozen network, and compare runs.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def supsup(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The options of all commands."""


@app.command(
    add_help_option=False,  # Hydra's help lists the groups and options
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def train(context: typer.Context) -> None:
    """Train tasks one after another, test them and write results: `supsup train data=permuted_mnist seed=1`.

    Takes the same overrides as `python train.py`. `supsup train --help` lists them; `-m` sweeps over several values.
    """
    from supsup_lightning import train as job

    # Hydra reads the overrides from here, and Lightning starts further processes by this file.
    sys.argv = [job.__file__, *context.args]
    job.main()


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Output directories of runs or sweeps.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report; by default DIR/report.")] = None,
    x: Annotated[
        str | None, typer.Option(help="Varied option on the x axis; by default each that is a number.")
    ] = None,
    y: Annotated[str, typer.Option(help="Number of results.json on the y axis.")] = "average_accuracy",
    group: Annotated[list[str] | None, typer.Option(help="Option that tells lines apart; may be repeated.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page; by default the folders.")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare any set of runs on one HTML page; figures and tables (CSV, Markdown, LaTeX) lie beside it."""
    with errors_shown():
        from supsup_lightning.report import page, tables

        folder = out if out is not None else (folders[0] / "report" if len(folders) == 1 else Path("report"))
        written = page.write(folders, folder, x=x, y=y, group=group or (), title=title)
        if as_json:
            print(json.dumps({"report": str(written.path), **tables.as_json(written.comparison, written.unfinished)}))
            return
        _show_report(written)


app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)
app.add_typer(bank, name="bank")


def _show_report(written: Any) -> None:
    from rich.console import Console

    from supsup_lightning.report import tables

    console = Console()
    console.print(tables.on_terminal(written.comparison))
    if written.unfinished:
        console.print(tables.unfinished(written.unfinished))
    for note in written.notes:
        console.print(note, style="yellow")
    console.print(f"report in {written.path}", soft_wrap=True)


def main() -> None:
    """The command `supsup`."""
    app()
