"""End of a sweep: a table over its jobs, those that failed, and the report."""

import logging
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from supsup_lightning.errors import SupSupError
from supsup_lightning.runs import job_record

logger = logging.getLogger(__name__)


class RememberSweep(Callback):
    """Hydra callback that keeps the folder of the sweep that this process runs, and when it began.

    Attributes:
        folder: the sweep's folder; None if this process runs a single job.
        began: time in UTC.
    """

    folder: Path | None = None
    began = datetime.min.replace(tzinfo=UTC)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Keep them for `show_end`, which also has to run if the sweep fails."""
        RememberSweep.folder = Path(config.hydra.sweep.dir)
        RememberSweep.began = datetime.now(UTC)


def show_end() -> int:
    """Write the report of the sweep that has ended, and print its table.

    Returns:
        The number of its jobs that failed; 0 if this process ran no sweep.
    """
    folder, RememberSweep.folder = RememberSweep.folder, None
    if folder is None:
        return 0
    jobs = [path.parent for path in sorted(folder.rglob(job_record.FILE)) if _is_of_this_sweep(path.parent)]
    if not any((job / "results.json").exists() for job in jobs):
        return _print_failed(jobs)
    from rich.console import Console

    from supsup_lightning.report import page, tables  # a second, which only the end of a sweep needs

    console = Console()
    try:
        written = page.write([folder], folder / "report", title=folder.name)
    except (SupSupError, OSError) as error:
        logger.warning("no report of the sweep: %s", error)
        return _print_failed(jobs)
    console.print(tables.on_terminal(written.comparison))
    failed = _print_failed(jobs)
    console.print(f"report in {written.path}", soft_wrap=True)
    console.print(f"draw it again: {shlex.join(['supsup', 'report', str(folder)])}", soft_wrap=True)
    return failed


def _is_of_this_sweep(folder: Path) -> bool:
    record = job_record.read(folder)
    return record is not None and datetime.fromisoformat(record["started"]) >= RememberSweep.began


def _print_failed(jobs: list[Path]) -> int:
    """Print the jobs that did not finish, with their errors, and return their number."""
    records = {job: job_record.read(job) or {} for job in jobs}
    failed = {job: record for job, record in records.items() if record.get("status") != "finished"}
    if failed:
        lines = [f"{len(failed)} of {len(jobs)} jobs have no result:"]
        for job, record in failed.items():
            overrides = " ".join(record.get("overrides", [job.name]))
            lines.append(f"  {overrides}\n    {record.get('status')}: {record.get('error', 'killed')}")
        lines.append("The same command with `resume=true` runs only these again.")
        print("\n".join(lines), file=sys.stderr)
    return len(failed)
