"""Keeps how an object was made: import path and arguments as plain values, from which a file's recipe is written.

{"_target_": "supsup_lightning.networks.LeNet", "output_size": 100, "input_shape": [1, 28, 28], "width": 1.0}

`recorded` decorates classes and functions of this package. No other object is recorded, except those for which the
configuration of a run says it (`record_config`). Where an argument is no plain value, ``_lacks_`` says which.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, Signature, signature
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

TARGET, LACKS = "_target_", "_lacks_"
MASKED_PARAMETERS = {"_masked_parameters_": True}  # a rule that is a function: their names take its place

KNOWN: dict[str, Callable[..., Any]] = {}  # by import path: what a file may name without being trusted

_KEY = "_made_with"
_LEFT_OUT = ("network", "compile")  # recorded by itself; of training alone
_HYDRA = ("_convert_", "_recursive_", "_partial_")

Made = TypeVar("Made", bound=Callable[..., Any])


class NotPlain(ValueError):
    """Error for a value that JSON cannot hold."""


def recorded(made: Made) -> Made:
    """Keep on each object the arguments that it was made with. Decorator of a class, or of a function that makes one.

    >>> from supsup_lightning.networks import LeNet
    >>> description_of(LeNet(output_size=5, input_shape=(1, 8, 8)))["input_shape"]
    [1, 8, 8]
    """
    path = _path(made)
    KNOWN[path] = made
    if dataclasses.is_dataclass(made):  # their fields say it
        return made
    if not isinstance(made, type):
        parameters = signature(made)

        @wraps(made)
        def make(*arguments: Any, **options: Any) -> Any:
            result = made(*arguments, **options)
            result.__dict__[_KEY] = None, _described(path, parameters, arguments, options)
            return result

        KNOWN[path] = make
        return make  # type: ignore[return-value]
    inner: Any = getattr(made, "__init__")  # noqa: B009 (mypy refuses the attribute of an instance)
    # That of `object` takes no argument, whatever its signature says.
    parameters = Signature([Parameter("self", Parameter.POSITIONAL_ONLY)])
    if inner is not object.__init__:
        parameters = signature(inner)

    @wraps(inner)
    def initialise(self: Any, *arguments: Any, **options: Any) -> None:
        if _KEY not in self.__dict__:  # else a subclass has done it
            self.__dict__[_KEY] = made, _described(path, parameters, (self, *arguments), options)
        inner(self, *arguments, **options)

    setattr(made, "__init__", initialise)  # noqa: B010 (mypy refuses an assignment)
    return made


def record_config(made: Any, config: Any) -> None:
    """Keep what a configuration has for an object of a class that is not of this package.

    Args:
        made: an object, as Hydra has made it.
        config: the configuration that it was made from, with ``_target_``.
    """
    if description_of(made)[TARGET] in KNOWN or config.get("_partial_"):
        return
    values = {str(key): config[key] for key in config if key not in (TARGET, *_HYDRA)}
    made.__dict__[_KEY] = type(made), {TARGET: str(config[TARGET]), **_plain_arguments(values)}


def description_of(made: Any) -> dict[str, Any]:
    """How an object was made: ``_target_``, and its arguments or what they lack."""
    if dataclasses.is_dataclass(made) and not isinstance(made, type):
        return plain(made)
    maker, description = made.__dict__.get(_KEY, (None, None))
    own = type(made).__module__, type(made).__qualname__
    if description is None or maker not in (None, type(made)):
        return {TARGET: ".".join(own), LACKS: "the arguments of a class that is not of supsup_lightning"}
    return {name: _now(made, name, value) for name, value in description.items()}


def _now(made: Any, name: str, value: Any) -> Any:
    """The attribute of an argument's name, where it is plain: it may have been set since (``inference.images``)."""
    try:
        return plain(made.__dict__[name])
    except (KeyError, NotPlain):
        return value


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: text, numbers, lists, mappings, and descriptions of recorded objects.

    Raises:
        NotPlain: anything else.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # NumPy's numbers
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and KNOWN.get(_path(type(value))) is type(value):
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
        functions = {name for name, each in values.items() if callable(each) and each is defaults[name]}
        arguments = _plain_arguments({name: each for name, each in values.items() if name not in functions})
        if LACKS in arguments:
            raise NotPlain(arguments[LACKS])
        return {TARGET: _path(type(value)), **arguments}
    if _KEY in getattr(value, "__dict__", {}):
        description = description_of(value)
        if LACKS not in description:
            return description
    raise NotPlain(f"a value of type {type(value).__name__}")


def _described(path: str, parameters: Signature, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = parameters.bind(*arguments, **options)
    except TypeError:  # the call itself says what is wrong
        return {TARGET: path, LACKS: "arguments"}
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if parameters.parameters[name].kind is Parameter.VAR_KEYWORD:
            values |= value
        elif name not in ("self", *_LEFT_OUT):
            values[name] = value
    return {TARGET: path, **_plain_arguments(values)}


def _plain_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {}
    for name, value in values.items():
        try:
            arguments[name] = plain(value)
        except NotPlain as error:
            if name != "is_masked":
                return {LACKS: f"{name}, which is {error}"}
            arguments[name] = MASKED_PARAMETERS
    return arguments


def _path(made: Callable[..., Any]) -> str:
    """Import path of a class or function: the package that offers it, and not the file, which may be renamed."""
    return ".".join([*made.__module__.split(".")[:2], made.__name__])
