"""What can go wrong, said once: each message names the option, the value given, and the remedy."""

from operator import index
from typing import Any


class SupSupError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback."""


class ConfigurationError(SupSupError, ValueError):
    """An option, or a combination of options, that cannot work."""


class DataError(SupSupError, OSError):
    """A data set that is missing, unreadable or damaged."""


class SaveError(SupSupError, OSError):
    """A file that could not be written; what it held before is kept."""


class MismatchError(SupSupError, ValueError):
    """A mask bank or checkpoint that was made with another network, seed or mask rule."""


class TrainingDiverged(SupSupError, ArithmeticError):
    """The loss became NaN or infinite."""


class DiscoveryStopped(SupSupError, RuntimeError):
    """A stream has more tasks than there may be masks."""


def check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `ConfigurationError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigurationError(f"{option}={value!r} is not known; choose one of {', '.join(map(str, choices))}.")


def as_whole(value: Any) -> int | None:
    """An integer of any type (Python's, NumPy's, a tensor's) as an `int`; None if it is no such, as `True` is not.

    >>> import numpy as np
    >>> as_whole(np.int64(4)), as_whole(4.0), as_whole(True)
    (4, None, None)
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)
    except (TypeError, ValueError):
        return None


def check_whole(option: str, value: Any, *, least: int = 1, more: str = "") -> int:
    """The value as an `int`. Raises `ConfigurationError` unless it is an integer of at least ``least``.

    Args:
        option: its name.
        value: as given.
        least: the smallest allowed.
        more: what else it may be, or why not less, for the end of the message.
    """
    number = as_whole(value)
    if number is None or number < least:
        raise ConfigurationError(f"{option}={value!r} must be an integer of at least {least}{more}.")
    return number
