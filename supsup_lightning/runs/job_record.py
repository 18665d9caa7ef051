"""How the last job in an output directory ended: job.json."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from supsup_lightning.files import replacing
from supsup_lightning.runs import stopping
from supsup_lightning.runs.job import is_first_process

FILE = "job.json"


@contextmanager
def recorded(
    folder: Path, *, overrides: Sequence[str], explain: Callable[[BaseException], str | None]
) -> Iterator[None]:
    """Write job.json when the block begins and when it ends, by an error as well.

    ``status`` is ``running``, ``finished``, ``failed`` or ``stopped``; a job that was killed leaves ``running``.

    Args:
        folder: output directory.
        overrides: overrides of the command line.
        explain: function from an error to its message, or to None if it has none.
    """
    if not is_first_process():
        yield
        return
    record: dict[str, Any] = {"status": "running", "overrides": list(overrides), "started": _now()}
    _write(folder, record)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        message = f"stopped by {'SIGTERM' if stopping.asked() else 'SIGINT'}" if stopped else explain(error)
        record["error"] = message or f"{type(error).__name__}: {error}"
        record["status"] = "stopped" if stopped else "failed"
        raise
    else:
        record["status"] = "finished"
    finally:
        _write(folder, {**record, "ended": _now()})


def read(folder: Path) -> dict[str, Any] | None:
    """Return job.json; None if there is none, or if it is damaged."""
    try:
        record = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"status", "overrides", "started"} <= record.keys() else None


def _write(folder: Path, record: dict[str, Any]) -> None:
    with replacing(folder / FILE) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
