"""Exhaustive inference: try every mask in ``k`` forward passes; the reference for faster algorithms."""

import torch
from torch import Tensor

from supsup_lightning.inference.inference import ConfidenceInference, objective_of_each
from supsup_lightning.methods import Method


class Exhaustive(ConfidenceInference):
    """The task under whose own mask the objective is lowest."""

    def decide(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """Task with the lowest mean objective over the images."""
        return self._of_all(method, images, num_classes).mean(1).argmin()

    def decide_each(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """Task with the lowest objective, for each image."""
        return self._of_all(method, images, num_classes).argmin(0)

    def _of_all(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """``(k, batch)``."""
        return objective_of_each(method, images, torch.arange(len(method.tasks)), num_classes, self.objective)
