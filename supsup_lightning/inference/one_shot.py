"""One-shot inference: one gradient of the superposition says which task gains most confidence (section 3.3).

p(a) = softmax f(x, W * sum_i a_i M_i),   a = 1/k each
task = argmax_i  -dO/da_i,                dO/da_i = <dO/dW_a * W, M_i>
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap

from supsup_lightning.errors import ConfigurationError, check_choice
from supsup_lightning.inference.consistency import value_of
from supsup_lightning.inference.inference import GradientInference, differentiable, layers_among
from supsup_lightning.inference.objectives import Objective
from supsup_lightning.inference.shortlist import best, objective_where
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import Superposes, require

# `each` holds one gradient of all weights per image: the number of images taken at once.
_IMAGES_AT_ONCE = 16
_NOISE_IMAGES = 64


@differentiable
def confidence_gain(
    method: Superposes,
    images: Tensor,
    num_classes: int,
    objective: Objective,
    coefficients: Tensor | None = None,
    rows: Tensor | None = None,
    layers: str | Sequence[str] = "all",
) -> Tensor:
    """``-dO/da``, ``(k,)``: confidence gained per unit of each task's coefficient.

    One backward pass to the superposed weights and ``k`` inner products, whatever ``k``. Works in inference mode.

    Args:
        method: with ``k`` finished tasks.
        images: ``(batch, *shape)``; the objective is averaged over them.
        num_classes: outputs from there on are superfluous.
        objective: one of `objectives`.
        coefficients: ``(k,)``, where the gradient is taken; by default ``1/k`` each.
        rows: positions of the tasks that are asked about; by default all.
        layers: whose weights count, as in `GradientInference`.
    """
    gradients = _gradients(method, num_classes, objective, method.superposed(coefficients), layers)
    return -method.project(gradients(images), rows)


@differentiable
def confidence_gain_each(
    method: Superposes, images: Tensor, num_classes: int, objective: Objective, layers: str | Sequence[str] = "all"
) -> Tensor:
    """``-dO/da`` at ``1/k`` for each image, ``(batch, k)``."""
    gradient_each = vmap(_gradients(method, num_classes, objective, method.superposed(), layers))
    chunks = images.unsqueeze(1).split(_IMAGES_AT_ONCE)
    return torch.cat([-method.project(gradient_each(chunk)) for chunk in chunks])


def _gradients(
    method: Superposes,
    num_classes: int,
    objective: Objective,
    superposed: dict[str, Tensor],
    layers: str | Sequence[str],
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Gradients of the mean objective by the superposed weights; 0 for layers that are left out."""
    asked = {name: superposed[name] for name in layers_among(layers, superposed)}
    if not asked:
        raise ConfigurationError(f"inference.layers={layers} matches none of {', '.join(superposed)}.")

    def value(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        given = {**superposed, **parameters}
        return value_of(
            objective, lambda copy: method.base.call_superposed(given, copy), images, num_classes, method
        ).mean()

    def gradients(images: Tensor) -> dict[str, Tensor]:
        found = grad(value)(asked, images)
        return {name: found[name] if name in found else torch.zeros_like(part) for name, part in superposed.items()}

    return gradients


def first_gain(self: GradientInference, method: Method, images: Tensor, num_classes: int) -> Tensor:
    """``-dO/da`` of each task at equal coefficients, ``(k,)``, from which a gradient-based inference starts."""
    return confidence_gain(require(method, Superposes), images, num_classes, self.objective, layers=self.layers)


class OneShot(GradientInference):
    """The task with the largest ``-dO/da`` at equal coefficients: one gradient, whatever the number of tasks.

    With ``candidates`` above 1, the most confident of the tasks with the largest ones.

    Args:
        objective: as in `GradientInference`; also ``images``, ``candidates``, ``candidate_objective``, ``layers`` and
            ``temperature``.
        baseline: what is subtracted from each task's ``-dO/da``: ``none``, as in the paper; or ``noise``, what normal
            noise gives it, for tasks that gain more than others whatever the images are. Costs one more gradient.

    Raises:
        ConfigurationError: an option that is unknown or has no effect.

    Example:
        >>> OneShot("superfluous", images="each").images
        'each'
    """

    def __init__(
        self,
        objective: str = "superfluous",
        *,
        images: int | str = 1,
        candidates: int = 1,
        candidate_objective: str | None = None,
        layers: str | Sequence[str] = "all",
        temperature: float = 1.0,
        baseline: str = "none",
    ) -> None:
        super().__init__(
            objective,
            images=images,
            candidates=candidates,
            candidate_objective=candidate_objective,
            layers=layers,
            temperature=temperature,
        )
        check_choice("inference.baseline", baseline, ("none", "noise"))
        self.baseline = baseline

    def evidence(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """``-dO/da`` of each task, less the baseline, ``(k,)``."""
        baseline = 0 if self.baseline == "none" else self._of_noise(method, images, num_classes)
        return first_gain(self, method, images, num_classes) - baseline

    def decide(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """One gradient for all images."""
        gain = self.evidence(method, images, num_classes)
        if self.candidates == 1:
            return gain.argmax()
        rows = gain.topk(min(self.candidates, len(gain))).indices
        return rows[self.judged(method, images, num_classes, rows).mean(1).argmin()]

    def decide_each(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """One gradient per image, in one backward pass for several of them."""
        # (batch, k)
        gain = confidence_gain_each(require(method, Superposes), images, num_classes, self.objective, self.layers)
        if self.baseline != "none":
            gain = gain - self._of_noise(method, images, num_classes)
        if self.candidates == 1:
            return gain.argmax(-1)
        chosen = best(gain, self.candidates)
        return objective_where(chosen, method, images, num_classes, self.judge).argmin(1)

    def _of_noise(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """``-dO/da`` of each task for normal noise in place of images, ``(k,)``; anew, as masks may have changed."""
        if not images.is_floating_point():
            raise ConfigurationError(
                f"inference.baseline=noise takes images, and the inputs here are {images.dtype}; use baseline=none."
            )
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(_NOISE_IMAGES, *images.shape[1:], generator=draw).to(images)
        return first_gain(self, method, noise, num_classes)
