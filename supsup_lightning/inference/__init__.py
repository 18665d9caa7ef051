"""Task inference: which task an input belongs to. One file per algorithm, one base class (`Inference`)."""

from supsup_lightning.inference.binary import Binary
from supsup_lightning.inference.discriminant import Discriminant
from supsup_lightning.inference.exhaustive import Exhaustive
from supsup_lightning.inference.inference import Given, Inference
from supsup_lightning.inference.mask_recovery import Descent, HopfieldRecovery
from supsup_lightning.inference.one_shot import OneShot
from supsup_lightning.scenario import Scenario


def automatic(scenario: Scenario) -> Inference:
    """The inference to start with (``inference=auto``): `Discriminant`, or `Given` if the task is given at test time.

    The discriminant finds permuted inputs as well as one gradient does or better, and tasks that look alike, which
    gradients do not find (docs/task_inference.md).

    >>> from supsup_lightning.scenario import GG, GNU
    >>> type(automatic(GG)).__name__, type(automatic(GNU)).__name__
    ('Given', 'Discriminant')
    """
    return Given() if scenario.task_known_at_inference else Discriminant()


__all__ = [
    "Binary",
    "Descent",
    "Discriminant",
    "Exhaustive",
    "Given",
    "HopfieldRecovery",
    "Inference",
    "OneShot",
    "automatic",
]
