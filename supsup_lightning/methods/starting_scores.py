"""Where the scores of a new task start, and what has to be remembered of earlier tasks for it."""

import torch
from torch import Tensor, nn

from supsup_lightning.errors import check_choice

CHOICES = ("random", "transfer", "previous", "nearest")


class StartingScores(nn.Module):
    """Start of a task's scores; what is remembered takes one vector, however many tasks there are, and is in
    `state_dict`, but in no file of masks.

    Args:
        init: ``random``; ``transfer``: the mean of all earlier tasks' final scores (the paper's section 4.1);
            ``previous``: the last task's final scores; ``nearest``: scores made of the mask that inference takes the
            new task's images for, which needs no memory.
        num_weights: length of the scores.

    >>> start = StartingScores("transfer", 2)
    >>> for final in ([1.0, 2.0], [3.0, 6.0]):
    ...     start.remember(torch.tensor(final))
    >>> start(drawn=torch.tensor([9.0, 9.0])).tolist()
    [2.0, 4.0]
    """

    remembered: Tensor
    num_tasks: Tensor

    def __init__(self, init: str, num_weights: int) -> None:
        super().__init__()
        check_choice("mask.init", init, CHOICES)
        self.init = init
        size = num_weights if init in ("transfer", "previous") else 0
        self.register_buffer("remembered", torch.zeros(size, dtype=torch.float32))
        self.register_buffer("num_tasks", torch.zeros((), dtype=torch.int64))

    def forward(self, drawn: Tensor) -> Tensor:
        """The scores ``(weights,)`` to start from: those drawn for the task until there is something to start from."""
        return self.remembered if self.num_tasks and len(self.remembered) else drawn

    def remember(self, scores: Tensor) -> None:
        """Take in the final scores of a task, ``(weights,)``."""
        self.num_tasks += 1
        if self.init == "transfer":
            self.remembered += (scores.detach() - self.remembered) / self.num_tasks
        elif self.init == "previous":
            self.remembered.copy_(scores.detach())
