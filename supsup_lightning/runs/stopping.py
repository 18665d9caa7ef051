"""SIGTERM, which schedulers send, ends a run with exit status 143; between two batches where it trains or tests."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """The process was asked to end by SIGTERM."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class _State:
    """What was asked so far, and whether it has to wait."""

    asked = False
    waits = False
    process = 0


def asked() -> bool:
    """Whether the process was asked to end."""
    return _State.asked


@contextmanager
def on_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside, or is remembered where `between_batches` says so."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield
        return
    _State.asked, _State.waits, _State.process = False, False, os.getpid()
    before = signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def between_batches() -> Iterator[None]:
    """Lightning's loops, or `raise_if_asked`, end the block where nothing is half done; a second SIGTERM does at once.

    Lightning puts its own handler before this one, which also stops processes that it started.
    """
    _State.waits = True
    try:
        yield
    finally:
        _State.waits = False
    raise_if_asked()


def raise_if_asked() -> None:
    """Raise `Terminated` if SIGTERM came while it had to wait."""
    if _State.asked:
        raise Terminated


def take_over(note: Callable[[], None]) -> None:
    """Have SIGTERM call ``note`` in place of a handler that was put before this one."""

    def handle(signum: int, frame: FrameType | None) -> None:
        note()
        _handle(signum, frame)

    if _State.waits and _State.process == os.getpid():
        signal.signal(signal.SIGTERM, handle)


def _handle(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.process:  # a worker that this process forked ends as it would without a handler
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    first, _State.asked = not _State.asked, True
    if first and _State.waits:
        return
    if first or _State.waits:  # while what the first one raised unwinds, others change nothing
        _State.waits = False
        raise Terminated
