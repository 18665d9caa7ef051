"""Task inference: which task an input belongs to. One file per algorithm, one base class (`Inference`)."""

from supsup_lightning.inference.binary import Binary
from supsup_lightning.inference.discriminant import Discriminant
from supsup_lightning.inference.exhaustive import Exhaustive
from supsup_lightning.inference.inference import Given, Inference
from supsup_lightning.inference.mask_recovery import Descent, HopfieldRecovery
from supsup_lightning.inference.one_shot import OneShot

__all__ = [
    "Binary",
    "Descent",
    "Discriminant",
    "Exhaustive",
    "Given",
    "HopfieldRecovery",
    "Inference",
    "OneShot",
]
