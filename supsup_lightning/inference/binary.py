"""Binary inference: halve the tasks in question, gradient by gradient, until one is left (section 3.3)."""

import torch
from torch import Tensor

from supsup_lightning.inference.inference import ConfidenceInference
from supsup_lightning.inference.one_shot import confidence_gain
from supsup_lightning.methods import Method, Offer


class Binary(ConfidenceInference):
    """``ceil(log2 k)`` gradients; each time the half with the larger ``-dO/da`` stays, at equal coefficients."""

    needs = Offer.SUPERPOSED

    def decide(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """The last task left."""
        num_tasks = len(method.tasks)
        active = torch.arange(num_tasks, device=images.device)
        coefficients = None  # 1/k each
        while len(active) > 1:
            gain = confidence_gain(method, images, num_classes, self.objective, coefficients, active)
            active = active[gain.topk((len(active) + 1) // 2).indices]
            coefficients = torch.zeros(num_tasks, device=images.device).index_fill(0, active, 1 / len(active))
        return active[0]
