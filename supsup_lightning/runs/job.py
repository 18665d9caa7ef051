"""Lock of a job's output directory, and log entry of how the job ended."""

import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.runs import stopping

try:
    import fcntl
except ImportError:  # Windows, where the directory is not locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Set by Lightning, torchrun and SLURM in processes that belong to one run; 0 in the first.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_process() -> bool:
    """Whether this is the first process of its run; known before Lightning is imported."""
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANKS)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this process and those that it starts. The lock ends with the process, however that ends.

    Raises:
        ConfigurationError: another process has locked the folder, or it cannot be written to.
    """
    if fcntl is None or not is_first_process():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise ConfigurationError(
            f"{error}: nothing can be written there; use another directory (hydra.run.dir)."
        ) from error
    with file:
        try:
            # Record locks, which forked workers do not inherit: they may outlive a killed run by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ConfigurationError(
                f"{folder} is in use by {file.read().strip() or 'another process'}, which would overwrite what this "
                "one writes; wait for it, or use another directory (hydra.run.dir)."
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run in it.", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextmanager
def failures_logged(explain: Callable[[BaseException], str | None]) -> Iterator[None]:
    """Write an error that ends the job into its log files; the terminal gets it elsewhere.

    Args:
        explain: function from an error to its message, or to None for its traceback.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            message = f"stopped by {'SIGTERM' if stopping.asked() else 'SIGINT'}"
        else:
            message = explain(error) or "".join(traceback.format_exception(error))
        record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, message, (), None)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        raise
