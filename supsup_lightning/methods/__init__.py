"""How a task becomes effective parameters: one file a method, one small surface for all (`Method`)."""

from supsup_lightning.methods.batch_ensemble import BatchEnsemble
from supsup_lightning.methods.fine_tune import LowerBound, SmallNetworks, UpperBound
from supsup_lightning.methods.hop_supsup import HopSupSup
from supsup_lightning.methods.method import Method, Offer
from supsup_lightning.methods.psp import PSP
from supsup_lightning.methods.separate_heads import SeparateHeads
from supsup_lightning.methods.supsup import SupSup

__all__ = [
    "PSP",
    "BatchEnsemble",
    "HopSupSup",
    "LowerBound",
    "Method",
    "Offer",
    "SeparateHeads",
    "SmallNetworks",
    "SupSup",
    "UpperBound",
]
