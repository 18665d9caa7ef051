"""Task inference: which task an input belongs to. One file per algorithm, one base class (`Inference`)."""

from supsup_lightning.inference.binary import Binary
from supsup_lightning.inference.discriminant import Discriminant
from supsup_lightning.inference.exhaustive import Exhaustive
from supsup_lightning.inference.inference import Given, Inference
from supsup_lightning.inference.mask_recovery import Descent, HopfieldRecovery
from supsup_lightning.inference.one_shot import OneShot
from supsup_lightning.recipe.recorded import recorded
from supsup_lightning.scenario import Scenario

# Here, so that an option of any of them is in the file without a line of its own.
for _kind in (Binary, Discriminant, Exhaustive, Given, HopfieldRecovery, OneShot):
    recorded(_kind)


def automatic(scenario: Scenario) -> Inference:
    """The inference to start with (``inference=auto``): `Discriminant` if the task is hidden at test time alone.

    The discriminant finds permuted inputs as well as one gradient does or better, and tasks that look alike, which
    gradients do not find (docs/task_inference.md). `Given` if the task is given at test time. `OneShot` if it is
    hidden in training as well, where the discriminant learns in one process alone.

    >>> from supsup_lightning.scenario import GG, GNU, NNS
    >>> [type(automatic(scenario)).__name__ for scenario in (GG, GNU, NNS)]
    ['Given', 'Discriminant', 'OneShot']
    """
    if scenario.task_known_at_inference:
        return Given()
    return Discriminant() if scenario.task_known_in_training else OneShot()


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
