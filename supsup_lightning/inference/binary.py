"""Binary inference: halve the set of candidate tasks with one gradient each until one is left (section 3.3)."""

import torch
from torch import Tensor

from supsup_lightning.inference.inference import GradientInference
from supsup_lightning.inference.one_shot import confidence_gain, first_gain
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import Superposes, require


class Binary(GradientInference):
    """``ceil(log2 k)`` gradients; each time the half with the larger ``-dO/da`` stays, at equal coefficients.

    With ``candidates`` above 1 it ends when no more than these are left, and tries each of them.
    """

    evidence = first_gain

    def decide(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """The task that remains."""
        superposing, num_tasks = require(method, Superposes), len(method.tasks)
        active = torch.arange(num_tasks, device=images.device)
        coefficients = None  # 1/k each
        while len(active) > self.candidates:
            gain = confidence_gain(superposing, images, num_classes, self.objective, coefficients, active, self.layers)
            active = active[gain.topk((len(active) + 1) // 2).indices]
            coefficients = torch.zeros(num_tasks, dtype=torch.float32, device=images.device).index_fill(
                0, active, 1 / len(active)
            )
        if len(active) == 1:
            return active[0]
        return active[self.judged(method, images, num_classes, active).mean(1).argmin()]
