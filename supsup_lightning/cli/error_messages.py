"""Errors of this package as one line of a command."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from supsup_lightning.errors import SupSupError


@contextmanager
def errors_shown() -> Iterator[None]:
    """Print an error of this package as one message, and end the command with status 1."""
    try:
        yield
    except SupSupError as error:
        text = " ".join(str(error).splitlines())
        if "trust=True" in text:
            text += " On the command line: --trust."
        print(f"error: {text}", file=sys.stderr)
        raise typer.Exit(1) from error
