"""Comparison of options by meaning, however they are spelled: in YAML, in Python, or in an older checkpoint."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

_NOTHING = ("none", "None", "NoneType")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(\.\d*)?(e-?\d+)?(?![\w.])")


def meaning(value: Any) -> Any:
    """Return a value that is equal for all spellings of the same option.

    >>> meaning("none") == meaning(None), meaning([1, 2]) == meaning((1.0, 2))
    (True, True)
    >>> meaning("4.0") == meaning("4"), meaning("auto (0.5, 1.0) 0") == meaning("auto (0.5, 1) 0.0")
    (True, True)
    """
    if value is None or (isinstance(value, str) and value in _NOTHING):
        return None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, str):  # files hold a network's options as text
        return _NUMBER.sub(lambda found: _number(found[0]), value)
    if isinstance(value, Mapping):
        return {str(key): meaning(part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return tuple(meaning(part) for part in value)
    return meaning(value.tolist()) if hasattr(value, "tolist") else value


def plain(value: Any) -> Any:
    """Convert a value to types that a checkpoint can hold without pickling a class."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    if isinstance(value, PurePath):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, group: str) -> list[str]:
    """Return the options that differ in meaning, as ``group.name=value there, value here``."""
    return [
        f"{group}.{name}={stored.get(name)} there, {value} here"
        for name, value in wanted.items()
        if meaning(stored.get(name)) != meaning(value)
    ]


def _number(text: str) -> str:
    if text.lstrip("-").isdigit():
        return str(int(text))  # exactly, however long
    number = float(text)
    return str(int(number)) if number.is_integer() else repr(number)
