"""Handling of SIGTERM, which schedulers send: the run ends between two batches, with exit status 143."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """Exit of a process that SIGTERM asked to end."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class _State:
    """Whether SIGTERM came, whether it has to wait, and in which process."""

    asked = False
    waits = False
    process = 0


def asked() -> bool:
    """Whether SIGTERM asked the process to end."""
    return _State.asked


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the block, or wait inside `between_batches`."""
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
    """Delay SIGTERM in the block until Lightning's loops, or `raise_if_asked`, stop between batches.

    A second SIGTERM stops at once. Lightning puts its own handler before this one, which also stops processes that it
    started.
    """
    _State.waits = True
    try:
        yield
    finally:
        _State.waits = False
    raise_if_asked()


def raise_if_asked() -> None:
    """Raise `Terminated` if SIGTERM came."""
    if _State.asked:
        raise Terminated


def take_over(note: Callable[[], None]) -> None:
    """Let SIGTERM call ``note`` in place of a handler that was put before this one."""

    def handle(signum: int, frame: FrameType | None) -> None:
        note()
        _handle(signum, frame)

    if _State.waits and _State.process == os.getpid():
        signal.signal(signal.SIGTERM, handle)


def _handle(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.process:  # a forked worker ends as it would without a handler
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    first, _State.asked = not _State.asked, True
    if first and _State.waits:
        return
    if first or _State.waits:  # further signals change nothing while the first exception propagates
        _State.waits = False
        raise Terminated
