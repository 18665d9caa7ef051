"""Binary masks from real scores: rules, straight-through gradient, initialisers, allocation.

forward    effective = W * 1[s >= 0]            (threshold)
           effective = W * 1[|s| among largest] (top-k, a count a layer)
backward   d effective / d s = W           (threshold: the step is taken for the identity of s)
           d effective / d s = W * sign(s)  (top-k: the step is taken for the identity of |s|)
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod, sqrt
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from supsup_lightning.errors import ConfigurationError, check_choice
from supsup_lightning.layout import ByName, Layout, MaskRule
from supsup_lightning.recipe.recorded import recorded

Shape = Sequence[int]


class Rule(Protocol):
    """A map from scores ``(..., weights)`` to a mask of zeros and ones of the same shape and dtype."""

    def __call__(self, scores: Tensor) -> Tensor:
        """The mask; works along the last dimension."""
        ...

    def masked(self, scores: Tensor, frozen: Tensor) -> Tensor:
        """The mask times ``frozen`` ``(weights,)``, without a gradient."""
        ...

    def importance(self, scores: Tensor) -> Tensor:
        """Importance of each weight, which gets the straight-through gradient; differentiable."""
        ...

    def scores_of(self, mask: Tensor, drawn: Tensor) -> Tensor:
        """Scores with this mask from freshly drawn ones, all ``(weights,)``; for training a stored mask further."""
        ...


@dataclass(frozen=True)
class Threshold:
    """Weights with a score of at least 0 are on.

    >>> Threshold()(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 1., 1.])
    """

    def __call__(self, scores: Tensor) -> Tensor:
        """Zeros and ones, ``(..., weights)``."""
        # In place on a copy: on CPUs 15 times faster than `torch.where` (torch 2.14, 275,200 weights).
        return scores.detach().clone().ge_(0)

    def masked(self, scores: Tensor, frozen: Tensor) -> Tensor:
        """In one pass on a CPU: what goes back through a ReLU is this product, but for its bound.

        That is the next number below 0, so a process that flushes denormal numbers has to take scores of 0 for off.
        """
        if scores.device.type != "cpu":
            return torch.where(scores.detach() >= 0, frozen, 0)
        bound = -torch.finfo(scores.dtype).smallest_normal * torch.finfo(scores.dtype).eps
        return torch.ops.aten.threshold_backward(frozen.expand_as(scores), scores.detach(), bound)

    def importance(self, scores: Tensor) -> Tensor:
        """The scores."""
        return scores

    def scores_of(self, mask: Tensor, drawn: Tensor) -> Tensor:
        """The drawn magnitudes with signs set by the mask."""
        magnitude = drawn.abs().clamp_min(torch.finfo(drawn.dtype).tiny)
        return torch.where(mask.bool(), magnitude, -magnitude)


@dataclass(frozen=True)
class TopK:
    """In each layer, the weights with the largest absolute scores are on ("edge-popup"), exactly ``kept`` of them.

    Attributes:
        sizes: weights in each layer, in the order of the flat vector.
        kept: how many of them stay on.

    >>> TopK(sizes=(3, 2), kept=(2, 1))(torch.tensor([-3.0, 1.0, 2.0, 5.0, 5.0]))
    tensor([1., 0., 1., 1., 0.])
    """

    sizes: tuple[int, ...]
    kept: tuple[int, ...]

    def __call__(self, scores: Tensor) -> Tensor:
        """Zeros and ones, ``(..., weights)``."""
        layers = scores.detach().split(self.sizes, dim=-1)
        return torch.cat([_largest(layer, kept) for layer, kept in zip(layers, self.kept, strict=True)], dim=-1)

    def masked(self, scores: Tensor, frozen: Tensor) -> Tensor:
        """Their product."""
        return self(scores).mul_(frozen)

    def importance(self, scores: Tensor) -> Tensor:
        """Absolute scores."""
        return scores.abs()

    def scores_of(self, mask: Tensor, drawn: Tensor) -> Tensor:
        """The drawn signs; in each layer, weights that are on get the largest magnitudes, at random."""
        layers = zip(mask.bool().split(self.sizes), drawn.split(self.sizes), strict=True)
        return torch.cat([_with_largest_on(on, layer) for on, layer in layers])


def _largest(scores: Tensor, count: int) -> Tensor:
    """Ones at the ``count`` largest ``|score|`` of the last dimension, zeros elsewhere, ``(..., n)``; ties by order."""
    size = scores.shape[-1]
    magnitude = scores.abs()
    rank = size - count  # of the smallest magnitude that is kept, from 0
    if magnitude.device.type == "cpu":
        # Selection by numpy: a tenth of the time of torch.topk or torch.kthvalue (2.14), a sixtieth of a sort.
        limit = torch.from_numpy(np.partition(magnitude.numpy(), rank, axis=-1)[..., rank, None])
    else:
        limit = magnitude.kthvalue(rank + 1, dim=-1, keepdim=True).values
    mask = (magnitude >= limit).to(scores.dtype)
    if (mask.sum(-1, dtype=torch.int64) != count).any():  # magnitudes equal to the limit: the first of them stay
        above = magnitude > limit
        tied = magnitude == limit
        tied &= tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)
        mask = (above | tied).to(scores.dtype)
    return mask


def _with_largest_on(mask: Tensor, drawn: Tensor) -> Tensor:
    """``drawn`` ``(n,)`` with its magnitudes dealt out anew: any that is on has a larger one than any that is off."""
    magnitude = drawn.abs()
    # The weights in the order of (on or off, drawn magnitude) get the magnitudes in ascending order.
    order = (magnitude / magnitude.max().clamp_min(torch.finfo(drawn.dtype).tiny) + 2 * mask).argsort()
    dealt = torch.empty_like(drawn)
    dealt[order] = magnitude.sort().values
    return torch.where(drawn < 0, -dealt, dealt)


class _MaskedWeights(torch.autograd.Function):
    @staticmethod
    def forward(scores: Tensor, frozen: Tensor, rule: Rule, layout: Layout) -> tuple[Tensor, ...]:
        return tuple(layout.split(rule.masked(scores, frozen)).values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Rule, Layout], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.layout, ctx.batch_dims = inputs[3], inputs[0].ndim - 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (frozen,) = ctx.saved_tensors
        layout, batch_dims = ctx.layout, ctx.batch_dims
        if torch.is_grad_enabled() or torch._C._functorch.is_functorch_wrapped_tensor(gradients[0]):
            return layout.flatten(gradients, batch_dims=batch_dims) * frozen, None, None, None
        # Each layer's product straight to its place, in one pass over the weights instead of three.
        flat = frozen.new_empty(*gradients[0].shape[:batch_dims], layout.num_weights)
        for gradient, weights, part in zip(
            gradients, layout.split(frozen).values(), layout.split(flat).values(), strict=True
        ):
            torch.mul(gradient, weights, out=part)
        return flat, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], scores: Tensor, frozen: Tensor, rule: Rule, layout: Layout
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        # Rules work along the last dimension, so a batch of tasks is one more dimension in front.
        batched = in_dims[0]
        scores = scores.expand(info.batch_size, *scores.shape) if batched is None else scores.movedim(batched, 0)
        return _MaskedWeights.apply(scores, frozen, rule, layout), (0,) * len(layout.names)


def masked_weights(scores: Tensor, frozen: Tensor, rule: Rule, layout: Layout) -> dict[str, Tensor]:
    """``W * mask(scores)`` with the straight-through gradient to the scores' importance.

    Args:
        scores: ``(..., weights)`` float.
        frozen: the base weights, ``(weights,)``.
        rule: `Threshold` or `TopK`.
        layout: of the masked parameters.

    Returns:
        Effective weights by name, ``(..., *shape)`` each. Works under `torch.func.vmap` over the scores, and under
        `torch.func.grad`.

    >>> layout = Layout(("weight",), ((2,),))
    >>> scores = torch.tensor([-1.0, 1.0], requires_grad=True)
    >>> masked_weights(scores, torch.tensor([3.0, 4.0]), Threshold(), layout)["weight"].sum().backward()
    >>> scores.grad
    tensor([3., 4.])
    """
    parts = _MaskedWeights.apply(rule.importance(scores), frozen, rule, layout)
    return dict(zip(layout.names, parts, strict=True))


# Initialisers: one flat vector over all layers, drawn on the CPU so that every device gets the same.


def fan_in(shape: Shape) -> int:
    """Inputs of one output unit of a weight ``(out, in, *kernel)``."""
    return prod(shape[1:]) if len(shape) > 1 else shape[0]


def kaiming_uniform_scores(shapes: Sequence[Shape], generator: Generator) -> Tensor:
    """Scores of a new task: uniform within ``1 / sqrt(fan_in)``, that is Kaiming-uniform with ``a = sqrt(5)``."""
    return torch.cat(
        [(torch.rand(prod(s), generator=generator, dtype=torch.float32) * 2 - 1) / sqrt(fan_in(s)) for s in shapes]
    )


def kaiming_normal_weights(shapes: Sequence[Shape], generator: Generator) -> Tensor:
    """Base weights: normal with standard deviation ``sqrt(2 / fan_in)``."""
    return torch.cat(
        [torch.randn(prod(s), generator=generator, dtype=torch.float32) * sqrt(2 / fan_in(s)) for s in shapes]
    )


def signed_constant_weights(shapes: Sequence[Shape], generator: Generator) -> Tensor:
    """Base weights of the paper: a random sign times ``sqrt(2 / fan_in)``."""
    return torch.cat([_random_signs(prod(s), generator) * sqrt(2 / fan_in(s)) for s in shapes])


def _random_signs(size: int, generator: Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


# Allocation: how many weights each layer keeps, for a share of all weights that is off.


def uniform_allocation(shapes: Sequence[Shape], sparsity: float) -> tuple[int, ...]:
    """Number of weights kept in each layer, at the same density; exact to the nearest weight.

    >>> uniform_allocation([(10, 10), (5, 4)], 0.9)
    (10, 2)
    """
    return _kept(shapes, [1 - sparsity] * len(shapes), f"mask.sparsity={sparsity}")


def erdos_renyi_densities(shapes: Sequence[Shape], budget: float) -> list[float]:
    """Density ``min(0.5, b (out + in) / (out in kh kw))`` of each layer for the budget ``b`` (the paper's section 4.1).

    Small layers keep a larger share. The original calls ``b`` sparsity, although more of it is denser.

    >>> erdos_renyi_densities([(20, 20, 3, 3), (5, 160)], 1.0)
    [0.011111111111111112, 0.20625]
    """
    return [min(0.5, budget * ((s[0] + s[1]) / prod(s) if len(s) > 1 else 1.0)) for s in shapes]


def erdos_renyi_allocation(shapes: Sequence[Shape], sparsity: float) -> tuple[int, ...]:
    """`erdos_renyi_densities` for the budget with which the share ``sparsity`` of all weights is off.

    Raises:
        ConfigurationError: ``sparsity`` below 0.5, which the cap of 0.5 on each layer's density cannot reach.

    >>> erdos_renyi_allocation([(100, 100), (10, 100)], 0.9)
    (710, 390)
    """
    if sparsity < 0.5:
        raise ConfigurationError(
            f"mask.sparsity={sparsity} cannot be met with mask.allocation=erdos_renyi, whose layers keep at most half "
            "of their weights; give a sparsity of at least 0.5, or mask.allocation=uniform."
        )
    sizes = [prod(s) for s in shapes]
    target = (1 - sparsity) * sum(sizes)
    low, high = 0.0, float(max(sizes))
    for _ in range(100):  # bisection of an increasing function, to the last bit of a float
        middle = (low + high) / 2
        densities = erdos_renyi_densities(shapes, middle)
        reached = sum(size * density for size, density in zip(sizes, densities, strict=True))
        low, high = (middle, high) if reached < target else (low, middle)
    return _kept(shapes, erdos_renyi_densities(shapes, high), f"mask.sparsity={sparsity}")


def _kept(shapes: Sequence[Shape], densities: Sequence[float], option: str) -> tuple[int, ...]:
    kept = tuple(round(density * prod(shape)) for density, shape in zip(densities, shapes, strict=True))
    for shape, count in zip(shapes, kept, strict=True):
        if count == 0:
            raise ConfigurationError(
                f"{option} leaves no weight of the layer of shape {tuple(shape)}; keep more of them"
                " (or try mask.allocation=erdos_renyi, which spares small layers)."
            )
    return kept


ALLOCATIONS = {"uniform": uniform_allocation, "erdos_renyi": erdos_renyi_allocation}
WEIGHT_INITIALISERS = {
    "signed_constant": signed_constant_weights,
    "kaiming_normal": kaiming_normal_weights,
    "kaiming_uniform": kaiming_uniform_scores,  # what PyTorch's layers have by themselves
}


@recorded
@dataclass(frozen=True)
class MaskOptions:
    """All options of masks: ``mask.*`` on the command line.

    Attributes:
        rule: ``threshold`` (on where the score is not negative) or ``topk`` (a fixed share of each layer is on).
        sparsity: with ``topk``, the share of weights switched off, in [0, 1); or ``auto``: each task gets the sparsest
            mask about as accurate as its densest (`SparsitySearch`), for several times the training.
        allocation: with ``topk``, how layers share it: ``uniform`` or ``erdos_renyi``.
        budget: in place of ``sparsity`` with ``erdos_renyi``: the paper's ``b``, more of it is denser.
        init: where the scores of a task start: ``random``, or from earlier tasks (`StartingScores`), on which its mask
            depends then.
        search_candidates: for ``sparsity="auto"``, sparsities to choose from; 2, 4, 8 or 16 of them.
        search_tolerance: for ``sparsity="auto"``, by how much validation accuracy may be below the densest mask's.
        is_masked: which parameters are masked: `ByName`, or any function of name and tensor. None for a method's own
            choice.

    Raises:
        ConfigurationError: an option that is unknown, out of its range, missing, or without effect.

    >>> MaskOptions(rule="topk", sparsity=0.75).make_rule([(2, 2)])
    TopK(sizes=(4,), kept=(1,))
    """

    rule: str = "threshold"
    sparsity: float | str | None = None
    allocation: str = "uniform"
    budget: float | None = None
    init: str = "random"
    search_candidates: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
    search_tolerance: float = 0.01
    is_masked: MaskRule | None = None

    @classmethod
    def of_config(
        cls,
        *,
        search: Mapping[str, Any],
        include: Sequence[str],
        exclude: Sequence[str],
        min_dimensions: int,
        max_dimensions: int | None,
        **options: Any,
    ) -> "MaskOptions":
        """Create from the keys of conf/mask."""
        is_masked = ByName(include, exclude, min_dimensions, max_dimensions)
        searching = {f"search_{name}": value for name, value in search.items()}
        return cls(**options, **searching, is_masked=is_masked)

    def __post_init__(self) -> None:
        check_choice("mask.rule", self.rule, ("threshold", "topk"))
        if not isinstance(self.search_candidates, str) and isinstance(self.search_candidates, Sequence):
            object.__setattr__(self, "search_candidates", tuple(self.search_candidates))  # equal however it is given
        check_choice("mask.allocation", self.allocation, tuple(ALLOCATIONS))
        sparsity, budget = self.sparsity, self.budget
        if isinstance(sparsity, str) and (sparsity != "auto" or self.rule != "topk"):
            raise ConfigurationError(
                f"mask.sparsity={sparsity} with mask.rule={self.rule}: give a share in [0, 1) or auto, and "
                "mask.rule=topk."
            )
        if budget is not None and not budget > 0:
            raise ConfigurationError(f"mask.budget={budget} must be positive; the paper's are 1, 2, 4, 8, 16 and 32.")
        if not isinstance(sparsity, str):
            _check_share(sparsity)
        if self.rule == "threshold":
            for option, value in (("sparsity", sparsity), ("budget", budget)):
                if value is not None:
                    raise ConfigurationError(
                        f"mask.{option}={value} has no effect with mask.rule=threshold, where the signs of the scores "
                        f"decide; use mask.rule=topk, or leave mask.{option} out."
                    )
            if self.allocation != "uniform":
                raise ConfigurationError(
                    f"mask.allocation={self.allocation} has no effect with mask.rule=threshold; use topk."
                )
            return
        if budget is not None and self.allocation != "erdos_renyi":
            raise ConfigurationError(f"mask.budget={budget} is for mask.allocation=erdos_renyi; or give mask.sparsity.")
        if (sparsity is None) == (budget is None):
            raise ConfigurationError(
                f"mask.rule=topk needs mask.sparsity, the share of weights switched off, in [0, 1), or with "
                f"mask.allocation=erdos_renyi mask.budget, and not both; got sparsity={sparsity}, budget={budget}."
            )

    @property
    def searches(self) -> bool:
        """Whether the sparsity of each task is searched for (``auto``)."""
        return self.sparsity == "auto"

    def make_rule(self, shapes: Sequence[Shape], *, sparsity: float | None = None) -> Rule:
        """The rule for layers of these shapes.

        Args:
            shapes: of the masked parameters.
            sparsity: in place of ``auto``.

        Raises:
            ConfigurationError: a layer would keep no weight.
        """
        if self.rule == "threshold":
            return Threshold()
        sizes = tuple(prod(shape) for shape in shapes)
        share = sparsity if self.searches else self.sparsity
        if share is None:
            assert self.budget is not None  # `__post_init__`
            return TopK(sizes, _kept(shapes, erdos_renyi_densities(shapes, self.budget), f"mask.budget={self.budget}"))
        assert not isinstance(share, str)
        _check_share(share)
        return TopK(sizes, ALLOCATIONS[self.allocation](shapes, share))

    def identity(self) -> dict[str, str]:
        """The options that a checkpoint or file has to share."""
        return {
            "rule": self.rule,
            "sparsity": str(self.sparsity),
            "allocation": self.allocation if self.rule == "topk" else "none",
            "budget": str(self.budget),
        }

    def without_effect(self, used: Collection[str]) -> dict[str, Any]:
        """Options by name that were set and have no effect.

        Args:
            used: names of the options that a method looks at.
        """
        unused = {field.name for field in fields(self)} - {*used}
        if not self.searches:
            unused |= {"search_candidates", "search_tolerance"}
        own = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in sorted(unused) if getattr(self, name) != own[name]}


def _check_share(sparsity: float | None) -> None:
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ConfigurationError(f"mask.sparsity={sparsity} is the share of weights switched off; it lies in [0, 1).")
