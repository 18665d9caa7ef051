"""Supermasks in Superposition on PyTorch Lightning: one frozen network, one bit per weight and task.

PyTorch and Lightning take seconds to import, so the names below are imported once the first of them is used. Until then
`import supsup_lightning` is quick, which `train.py --help` and a mistyped option rest on.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supsup_lightning.api import *

try:
    __version__ = version("supsup-lightning")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "GG",
    "GNS",
    "GNU",
    "NNS",
    "PSP",
    "AccuracyDiscovery",
    "BatchEnsemble",
    "Binary",
    "ByName",
    "ContinualDataModule",
    "ContinualModule",
    "DataModuleSequence",
    "Discovery",
    "Discriminant",
    "Exhaustive",
    "FullyConnected",
    "GEMResNet18",
    "Given",
    "GradientDiscovery",
    "HopNet",
    "HopSupSup",
    "HopfieldMemory",
    "HopfieldRecovery",
    "Inference",
    "LeNet",
    "LowerBound",
    "MaskBank",
    "MaskOptions",
    "Method",
    "NoveltyDiscovery",
    "OneShot",
    "PermutedDigits",
    "PermutedMNIST",
    "Prediction",
    "ResNet50",
    "Scenario",
    "SeparateHeads",
    "SmallNetworks",
    "SupSup",
    "Unannounced",
    "UpperBound",
    "Verdict",
    "load",
    "mean_over_processes",
]


def __getattr__(name: str) -> Any:
    """Import the public names, or a module of the package (`supsup_lightning.bits`)."""
    if name in __all__:
        api = import_module("supsup_lightning.api")
        globals().update({public: getattr(api, public) for public in __all__})
        return globals()[name]
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
