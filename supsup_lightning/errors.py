"""What can go wrong, said once: each message names the option, the value given, and the remedy."""


class SupSupError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback."""


class ConfigurationError(SupSupError, ValueError):
    """An option, or a combination of options, that cannot work."""


class DataError(SupSupError, OSError):
    """A data set that is missing, unreadable or damaged."""


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
