"""Recovers a mask from a Hopfield memory by descent on the images' objective and the memory's energy.

z from the mean of all masks;   (1 - t) O(f(x, W * (1 + z) / 2)) + gamma t E(z),   t from 0 to 1 (hopfield_memory.py)
"""

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from supsup_lightning.bank.hopfield_memory import Descent, Recovery
from supsup_lightning.errors import ConfigurationError, as_whole
from supsup_lightning.inference.inference import Inference, differentiable
from supsup_lightning.inference.objectives import check_superfluous, entropy, make_objective
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import RecoversMasks, require


class RecoveredMask(NamedTuple):
    """A recovered mask, the steps to it, and its confidence.

    Attributes:
        recovery: the mask as `Recovery.state`; the objective by step as `Recovery.loss`.
        confidence: in [0, 1]: how well the mask agrees with the memory, times the share of the entropy of a guess that
            the predictions under it do not have. Low for images of no task, of several, and for mixtures of masks.
    """

    recovery: Recovery
    confidence: float


class HopfieldRecovery(Inference):
    """Recovers one mask from the images and predicts them under it, without a list of tasks.

    Tasks are numbered in reports, by the masks that `HopSupSup` still knows from training; -1 where it does not.

    Args:
        objective: ``entropy``, ``superfluous`` or ``max_probability``, as for other inferences.
        images: how many first images of a batch decide for it, or ``batch``.
        temperature: of the softmax, for ``entropy`` alone.
        descent: how to go downhill; by default projected.

    Attributes:
        last: of the batch that was last predicted.

    Raises:
        ConfigurationError: an option that is unknown, out of its range or without effect.

    Example:
        >>> HopfieldRecovery(descent=Descent(num_steps=15)).descent.num_steps
        15
    """

    finds_task = True
    numbers_tasks = False
    needs = RecoversMasks
    superimposes = True

    def __init__(
        self,
        objective: str = "entropy",
        *,
        images: int | str = "batch",
        temperature: float = 1.0,
        descent: Descent | None = None,
    ) -> None:
        count = as_whole(images)
        if images != "batch" and (count is None or count < 1):
            raise ConfigurationError(
                f"inference.images={images!r} is neither a number of images from 1 on nor batch: together they recover "
                "a mask."
            )
        self.name = objective
        self.objective = make_objective(objective, temperature=temperature)
        self.images = images if count is None else count
        self.asks_single_images = images == 1
        self.descent = Descent() if descent is None else descent
        self.last: RecoveredMask | None = None

    def check(self, *, output_size: int, num_classes: int, layers: Sequence[str] = ()) -> None:
        """Raise `ConfigurationError` if the objective needs superfluous outputs and the network has none."""
        check_superfluous("inference", self.name, output_size=output_size, num_classes=num_classes)

    def __call__(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """The task of each image, ``(batch,)`` int64; -1 where it is not known by number."""
        return self.predict(method, images, num_classes)[0]

    @torch.no_grad()
    def predict(self, method: Method, images: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Task ``(batch,)`` and logits ``(batch, output_size)`` under the mask that the images recover."""
        memory = require(method, RecoversMasks)
        self.last = self.recover(memory, images if self.images == "batch" else images[: self.images], num_classes)
        state = self.last.recovery.state
        tasks = torch.full((len(images),), memory.nearest(state), device=images.device)
        return tasks, memory.logits(state, images)

    @differentiable
    def recover(self, method: RecoversMasks, images: Tensor, num_classes: int) -> RecoveredMask:
        """The mask that these images recover.

        Raises:
            ConfigurationError: too few images for the network's normalisation.
        """

        def loss(state: Tensor) -> Tensor:
            return self.objective(method.logits(state, images), num_classes).mean()

        with torch.autocast(images.device.type, enabled=False):  # as in other inferences
            images = images.float() if images.is_floating_point() else images
            try:
                recovery = method.recover(loss, descent=self.descent)
                logits = method.logits(recovery.state, images)
            except ValueError as error:
                if len(images) != 1:
                    raise
                # torch's, of a layer that is to normalise a single value
                raise ConfigurationError(
                    "One image is too few to recover a mask from, as the network normalises by the batch "
                    f"({error}). Give more images at a time."
                ) from error
        unsure = entropy(logits, num_classes).mean() / log(logits.shape[1])
        confidence = recovery.agreement.clamp(0, 1) * (1 - unsure).clamp(0, 1)
        return RecoveredMask(recovery, confidence.item())
