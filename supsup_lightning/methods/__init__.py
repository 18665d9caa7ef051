"""How a task becomes effective parameters: one file per method, one small base class for all (`Method`)."""

from supsup_lightning.methods.baselines import (
    PSP,
    BatchEnsemble,
    LowerBound,
    SeparateHeads,
    SmallNetworks,
    TrainedNetworkMethod,
    UpperBound,
)
from supsup_lightning.methods.hop_supsup import HopSupSup
from supsup_lightning.methods.method import Method, Part
from supsup_lightning.methods.supsup import SupSup

__all__ = [
    "PSP",
    "BatchEnsemble",
    "HopSupSup",
    "LowerBound",
    "Method",
    "Part",
    "SeparateHeads",
    "SmallNetworks",
    "SupSup",
    "TrainedNetworkMethod",
    "UpperBound",
]
