"""Makes objects again from their descriptions (`recorded`). What a file may name without being trusted is listed here.

Trusted or not, nothing is unpickled: a description is JSON, and its arguments are plain values.
"""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from supsup_lightning.errors import ConfigurationError, DataError, MismatchError, SupSupError
from supsup_lightning.recipe.recorded import KNOWN, LACKS, TARGET

_PRETRAINED = {"weights": None, "pretrained": False}  # arguments that download, or read, a network's weights
_BUILDERS = ("supsup_lightning.networks.torchvision_model", "supsup_lightning.networks.timm_model")
# Arguments of other libraries' builders that do nothing but choose sizes.
_OTHER_BUILDERS = {
    "torchvision.models": ("num_classes", "weights"),
    "timm": ("model_name", "num_classes", "in_chans", "pretrained"),
}
_MOST_TEXT = 2**16  # characters of a network's description
_FEW_PARAMETERS = 2**20
_PARAMETERS_PER_BYTE = 2000  # of a file: a mask with one weight of a thousand on has 700


def own(description: Any, **given: Any) -> Any:
    """Make an object of this package.

    Args:
        description: its ``_target_`` and arguments; arguments may be descriptions themselves.
        given: further arguments.

    Raises:
        MismatchError: a name that this version of the package does not have.
        DataError: what is no description.
    """
    target = _target(description)
    if target not in KNOWN:
        raise MismatchError(
            f"It names {target}, which this version of supsup_lightning does not have; use the version that it was "
            "written with."
        )
    arguments = {name: _value(value) for name, value in description.items() if name not in (TARGET, LACKS)}
    return KNOWN[target](**arguments, **given)


def _value(value: Any) -> Any:
    return own(value) if isinstance(value, dict) and TARGET in value else value


def network(description: Any, *, trust: bool, file_bytes: int, needs_weights: bool) -> nn.Module:
    """Make the network of a file.

    Args:
        description: its ``_target_`` and arguments.
        trust: import and call whatever is named.
        file_bytes: size of the file, which limits the size of the network.
        needs_weights: whether finished tasks need weights of the network that are not in the file.

    Raises:
        ConfigurationError: it has to be handed over, or to be trusted.
    """
    target = _target(description)
    if LACKS in description:
        raise ConfigurationError(
            f"The network ({target}) cannot be made from the file, which lacks {str(description[LACKS])[:200]}. Make "
            "it as for training and hand it over: load(path, network=...)."
        )
    arguments = {name: value for name, value in description.items() if name != TARGET}
    if not needs_weights:  # those of the file take their place
        arguments |= {name: value for name, value in _PRETRAINED.items() if name in arguments}
    reason = None if trust else _untrusted(target, arguments)
    if reason is not None:
        raise ConfigurationError(
            f"The file asks for the network {target}: {reason}. If you trust the file, load(path, trust=True); or make "
            "the network yourself and hand it over: load(path, network=...)."
        )
    make = KNOWN[target] if target in KNOWN else _imported(target)
    if not trust:
        _check_size(partial(make, **arguments), file_bytes, target)
    try:
        made = make(**arguments)
    except SupSupError:
        raise
    except Exception as error:  # other libraries' builders raise all kinds
        raise ConfigurationError(
            f"The network {target} cannot be made with the arguments of the file ({type(error).__name__}: "
            f"{error!s:.200}); hand it over: load(path, network=...)."
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigurationError(f"The file asks for the network {target}, which makes {type(made).__name__}.")
    return made


def _untrusted(target: str, arguments: Mapping[str, Any]) -> str | None:
    """Why a network may not be made for a file that is not trusted; None if it may."""
    if any(arguments.get(name, default) != default for name, default in _PRETRAINED.items()):
        return "its pretrained weights would be downloaded or read"
    if len(repr(arguments)) > _MOST_TEXT:
        return "its arguments are very long"
    if target in KNOWN and target.startswith("supsup_lightning.networks."):
        if target in _BUILDERS and (arguments.get("options") or not str(arguments.get("name")).isidentifier()):
            return "its options may do more than choose sizes"
        return None
    package, _, name = target.rpartition(".")
    allowed = _OTHER_BUILDERS.get(package)
    builders = {"torchvision.models": _torchvision_builders, "timm": lambda: ["create_model"]}
    if allowed is None or name not in builders[package]():
        return "its class would be imported, and could be any program"
    name = str(arguments.get("model_name", "name"))
    if set(arguments) - {*allowed} or not name.replace(".", "_").isidentifier():
        return "its arguments may do more than choose sizes"
    return None


def _torchvision_builders() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _check_size(make: Any, file_bytes: int, target: str) -> None:
    """Raise an error for a network that is too large for its file, before it takes memory."""
    most = max(_FEW_PARAMETERS, _PARAMETERS_PER_BYTE * file_bytes)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            number = sum(parameter.numel() for parameter in make().parameters())
    except SupSupError:
        raise
    except Exception as error:
        raise DataError(f"its network {target} cannot be made ({type(error).__name__}: {error!s:.200})") from error
    if number > most:
        raise ConfigurationError(
            f"The file of {file_bytes} bytes asks for the network {target} with {number} parameters, more than its "
            "masks can be for. If you trust the file, load(path, trust=True)."
        )


def _imported(target: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"The network {target} cannot be imported ({error}). Make its module importable, or hand the network over: "
            "load(path, network=...)."
        ) from error


def _target(description: Any) -> str:
    if not isinstance(description, dict) or not isinstance(description.get(TARGET), str):
        raise DataError("a part of its recipe is no description")
    return description[TARGET][:200]
