"""The command `supsup evaluate`: tests the masks of a finished run again."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from supsup_lightning.cli import command_line


def evaluate_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output directory of a finished run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTION=VALUE]...", help="Options of inference, scenario, data and trainer."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Test a finished run's masks with another inference, scenario or data, without training.

    Results go to DIR/evaluations, named by the options. The run's own results stay.

    supsup evaluate outputs/demo inference=exhaustive inference.images=batch
    """
    result: dict[str, Any] = {}

    def evaluate() -> None:
        from supsup_lightning.runs import evaluate_run  # imports Hydra's composition, which `--help` does without

        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result.update(evaluate_run.evaluate(folder, overrides or []))

    command_line.run(evaluate)
    if as_json and result:  # empty in all processes but the first
        print(json.dumps(result, indent=2))
