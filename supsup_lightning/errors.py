"""Errors of this package; each message names the option, the value given, and the remedy."""

from operator import index
from typing import Any


class SupSupError(Exception):
    """Base class of the errors that this package raises on purpose; the command line prints no traceback for them."""


class ConfigurationError(SupSupError, ValueError):
    """Error for an option, or a combination of options, that cannot work."""


class DataError(SupSupError, OSError):
    """Error for data, or another file to read, that are missing, unreadable or damaged."""


class SaveError(SupSupError, OSError):
    """Error for a file that could not be written; its old content is kept."""


class MismatchError(SupSupError, ValueError):
    """Error for a mask bank or checkpoint that was made with another network, other data or other options."""


class TrainingDiverged(SupSupError, ArithmeticError):
    """Error for a loss that became NaN or infinite."""


class DiscoveryStopped(SupSupError, RuntimeError):
    """Error for a stream with more tasks than the allowed number of masks."""


def check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `ConfigurationError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigurationError(f"{option}={value!r} is not known; choose one of {', '.join(map(str, choices))}.")


def as_whole(value: Any) -> int | None:
    """Return an integer of any type (Python, NumPy, tensor) as an `int`; None for other values, bools among them.

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
    """Return the value as an `int`. Raises `ConfigurationError` unless it is an integer of at least ``least``.

    Args:
        option: name of the option.
        value: value given.
        least: smallest allowed value.
        more: end of the message: other allowed values, or the reason for the limit.
    """
    number = as_whole(value)
    if number is None or number < least:
        raise ConfigurationError(f"{option}={value!r} must be an integer of at least {least}{more}.")
    return number
