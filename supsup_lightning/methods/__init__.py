"""Methods: how a task becomes effective parameters. One file per method, one base class (`Method`)."""

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
