"""Early end of a task, with its best epoch (``data.patience``)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Patience:
    """Keeps the epoch with the best validation accuracy, and ends a task a number of epochs after it.

    Of equal accuracies the earlier one counts. All of it is in `state_dict`, so that a resumed run ends with the same
    bits; processes agree, as validation accuracy is the same in all of them.

    Attributes:
        over: the training has ended before its last epoch; the epochs that are left train nothing.
        epochs: trained so far in this training.
        best: its highest accuracy, in [0, 1]; below that before any.
        finished: of each task with an end, the epochs trained (in all its trainings) and the accuracy of what is kept.

    >>> patience, trained = Patience(), torch.zeros(1)
    >>> for accuracy in (0.5, 0.7, 0.6, 0.7):
    ...     trained += 1
    ...     over = patience.judge(accuracy, [trained], patience=2)
    >>> patience.end(0, [trained])
    0.7
    >>> over, trained.item(), patience.finished
    (True, 2.0, {0: (4, 0.7)})
    """

    def __init__(self) -> None:
        self.finished: dict[int, tuple[int, float]] = {}
        self.begin()

    def begin(self) -> None:
        """Reset for a new training."""
        self.over, self.epochs, self.waited, self.best = False, 0, 0, -1.0
        self.kept: list[Tensor] = []

    def judge(self, accuracy: float, trained: Sequence[Tensor], *, patience: int) -> bool:
        """Record the validation accuracy of an epoch.

        Args:
            accuracy: on validation images.
            trained: all that training changes.
            patience: epochs without a better accuracy that are one too many.

        Returns:
            Whether the training is over.
        """
        self.epochs += 1
        self.waited += 1
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
            self.kept = [tensor.detach().clone() for tensor in trained]
        self.over = self.waited >= patience
        return self.over

    @torch.no_grad()
    def end(self, task: int, trained: Sequence[Tensor]) -> float:
        """Restore the best epoch; returns its accuracy."""
        for tensor, kept in zip(trained, self.kept, strict=True):
            tensor.copy_(kept)
        self.kept = []
        self.finished[task] = (self.finished.get(task, (0, 0.0))[0] + self.epochs, self.best)
        return self.best

    def state_dict(self) -> dict[str, Any]:
        """Best epoch so far, for checkpoints; empty without patience."""
        return dict(vars(self)) if self.epochs or self.finished else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        vars(self).update(state)
