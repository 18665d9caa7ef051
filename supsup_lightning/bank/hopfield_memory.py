"""Hopfield memory: any number of patterns of +1 and -1 in one symmetric matrix (the paper's HopSupSup).

store     hebbian  W <- W + (z z' - I) / d
          storkey  W <- W + (z z' - I - z h' - h z') / d,    h = W z   (Storkey 1997, as the paper uses it)
energy    E(z) = -z' W z / 2, low at stored patterns
recover   from the mean of the patterns, downhill on  (1 - t) L(z) + gamma t E(z),  t from 0 to 1, for a loss L that
          tells which pattern is wanted. As W is close to the projection onto the span of the patterns, `-W dL/dz`
          descends L among their mixtures alone; the energy then turns a mixture into one pattern.

Nothing here depends on masks or images: `recover` works on any patterns with any loss, or with none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value
from torch.nn.functional import cosine_similarity

from supsup_lightning.bank.rows import check_tensor
from supsup_lightning.errors import ConfigurationError, DataError, check_choice, check_whole
from supsup_lightning.recipe.recorded import recorded

RULES = ("storkey", "hebbian")

Loss = Callable[[Tensor], Tensor]
Schedule = Callable[[float], float]


class HopfieldMemory(nn.Module):
    """Patterns in one matrix per block; its `state_dict` has the same size for any number of patterns.

    Args:
        sizes: number of units per block. Blocks are independent, and a pattern is one flat vector over all of them.
        rule: ``storkey``, or ``hebbian``, which holds fewer patterns and does not depend on their order.

    Attributes:
        total: ``(units,)`` float32, the sum of the patterns.
        num_patterns: ``()`` int64.

    >>> memory = HopfieldMemory([6])
    >>> memory.store(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0]))
    >>> recover(memory, start=torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])).state.tolist()
    [1.0, -1.0, 1.0, -1.0, 1.0, 1.0]
    """

    total: Tensor
    num_patterns: Tensor

    def __init__(self, sizes: Sequence[int], *, rule: str = "storkey") -> None:
        super().__init__()
        check_choice("method.memory", rule, RULES)
        self.sizes = tuple(sizes)
        self.rule = rule
        for block, size in enumerate(self.sizes):
            self.register_buffer(f"weights_{block}", torch.zeros(size, size, dtype=torch.float32))
        self.register_buffer("total", torch.zeros(sum(self.sizes), dtype=torch.float32))
        self.register_buffer("num_patterns", torch.tensor(0))

    def __len__(self) -> int:
        return int(self.num_patterns)

    @property
    def weights(self) -> list[Tensor]:
        """Matrices of the blocks, ``(size, size)`` each, exactly symmetric."""
        return [self.get_buffer(f"weights_{block}") for block in range(len(self.sizes))]

    def store(self, pattern: Tensor) -> None:
        """Store a pattern ``(units,)``. Raises `ValueError` if it holds anything but +1 and -1."""
        if pattern.shape != self.total.shape or not (pattern.abs() == 1).all():
            raise ValueError(
                f"A pattern is {len(self.total)} values +1 or -1; got {pattern.unique()[:5].tolist()} in a shape of "
                f"{tuple(pattern.shape)}."
            )
        pattern = pattern.to(self.total)
        for weights, z in zip(self.weights, pattern.split(self.sizes), strict=True):
            # zz' - zh' - hz' = (z - h)(z - h)' - hh': a square is symmetric to the last bit.
            told = weights @ z if self.rule == "storkey" else torch.zeros_like(z)
            _add_square(weights, (z - told) / sqrt(len(z)), sign=1)
            _add_square(weights, told / sqrt(len(z)), sign=-1)
            weights.diagonal().sub_(1 / len(z))
        self.total += pattern
        self.num_patterns += 1

    def mean(self) -> Tensor:
        """Mean of the patterns, ``(units,)``. Raises `KeyError` if nothing is stored."""
        if not len(self):
            raise KeyError("The Hopfield memory is empty: nothing is stored yet.")
        return self.total / self.num_patterns

    def field(self, state: Tensor) -> Tensor:
        """Field ``W z``: input of each unit from the others, ``(..., units)``."""
        blocks = zip(self.weights, state.split(self.sizes, dim=-1), strict=True)
        return torch.cat([z @ weights for weights, z in blocks], dim=-1)

    def energy(self, state: Tensor) -> Tensor:
        """Energy ``-z' W z / 2``, summed over blocks: ``(..., units)`` to ``(...,)``."""
        return -0.5 * (state * self.field(state)).sum(-1)

    def agreement(self, state: Tensor) -> Tensor:
        """Cosine of ``z`` and ``W z``, ``(..., units)`` to ``(...,)`` in [-1, 1].

        It is near 1 for stored patterns, as Storkey's rule makes each pattern an eigenvector when it is added, and
        lower for mixtures and for noise.
        """
        return cosine_similarity(state, self.field(state), dim=-1)

    def num_bytes(self) -> int:
        """Bytes stored: the upper triangles with the diagonal, and the sum of the patterns, in float32."""
        return 4 * (sum(size * (size + 1) // 2 for size in self.sizes) + sum(self.sizes))

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Check a state, or the output of `packed`, before any of it is loaded.

        Raises:
            DataError: the state is damaged, or belongs to a memory of other sizes.
        """
        whole = "triangle_0" not in stored
        own = {"total": self.total, "num_patterns": self.num_patterns}
        for block, size in enumerate(self.sizes):
            shape, name = ((size, size), "weights") if whole else ((size * (size + 1) // 2,), "triangle")
            own[f"{name}_{block}"] = torch.empty(shape, device="meta")
        for name, value in own.items():
            if check_tensor(stored, name, value, "Hopfield pattern").shape != value.shape:
                raise DataError(
                    f"What is stored of each Hopfield pattern is damaged, or of another network: {name} has shape "
                    f"{tuple(stored[name].shape)} in place of {tuple(value.shape)}."
                )
        matrices = [stored[f"weights_{block}"] for block in range(len(self.sizes))] if whole else []
        most = stored["num_patterns"]
        if (
            not 0 <= most < 2**31
            or (stored["total"].abs() > most).any()
            or not all(torch.equal(w, w.T) for w in matrices)
        ):
            raise DataError("What is stored of each Hopfield pattern is damaged: no sum of patterns is like this.")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.check_state({name: state_dict.get(prefix + name) for name in self._buffers})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors to store, by name; the triangles are ``(size * (size + 1) / 2,)``, row by row."""
        triangles = {f"triangle_{block}": w[_upper(len(w))] for block, w in enumerate(self.weights)}
        return {**triangles, "total": self.total, "num_patterns": self.num_patterns}

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Load the output of `packed`, bit by bit. Raises `DataError`, as `check_state`, before anything changes."""
        self.check_state(tensors)
        for block, weights in enumerate(self.weights):
            rows, columns = _upper(len(weights))
            triangle = tensors[f"triangle_{block}"].to(weights)
            weights[rows, columns] = triangle
            weights[columns, rows] = triangle
        self.total.copy_(tensors["total"])
        self.num_patterns.copy_(tensors["num_patterns"])


def _add_square(weights: Tensor, vector: Tensor, *, sign: int) -> None:
    """Add ``sign v v'`` to ``W``, some rows at a time: temporary whole matrices would fragment memory."""
    for rows, part in zip(weights.split(128), vector.split(128), strict=True):
        rows.add_(torch.outer(part, vector), alpha=sign)


def _upper(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size)
    return rows, columns


def signs(state: Tensor) -> Tensor:
    """Return +1 where ``state`` is not negative, -1 elsewhere."""
    return (state >= 0).to(state.dtype) * 2 - 1


def overlap(state: Tensor, patterns: Tensor) -> Tensor:
    """Mean product of units, in [-1, 1]: ``(..., units)`` and ``(patterns, units)`` to ``(..., patterns)``.

    >>> overlap(torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])).tolist()
    [1.0, 0.0]
    """
    return state @ patterns.T / state.shape[-1]


def capacity(units: int, rule: str) -> float:
    """Number of random patterns that a memory of this many units holds, by theory for many units.

    Hebbian ``d / (2 ln d)`` (McEliece et al. 1987: most patterns are recovered without an error); Storkey
    ``d / sqrt(2 ln d)`` (Storkey 1997).

    >>> round(capacity(2048, "hebbian")), round(capacity(2048, "storkey"))
    (134, 524)
    """
    check_choice("rule", rule, RULES)
    return units / (2 * log(units)) if rule == "hebbian" else units / sqrt(2 * log(units))


# Recovery.


def rising(progress: float) -> float:
    """Schedule ``t``."""
    return progress


def falling(progress: float) -> float:
    """Schedule ``1 - t``."""
    return 1 - progress


@recorded
@dataclass(frozen=True)
class Descent:
    """Options of the gradient descent in `recover`.

    Attributes:
        num_steps: greatest number of steps, with one gradient of the loss each.
        step_size: factor of each step; with ``project``, the loss gradient has a root mean square of 1.
        momentum: factor of the previous step.
        weight_decay: factor of the state that is added to the gradient.
        energy_weight: weight of the energy, ``gamma``.
        project: descend the loss along ``W dL/dz``, scaled to a root mean square of 1, at a state within [-1, 1].
            False is the paper's descent: along ``dL/dz`` itself, at the state's signs, without bounds.
        loss_schedule: weight of the loss at ``t`` in (0, 1].
        energy_schedule: weight of the energy at ``t``.

    Raises:
        ConfigurationError: an option out of its range.
    """

    num_steps: int = 30
    step_size: float = 0.4
    momentum: float = 0.0
    weight_decay: float = 0.0
    energy_weight: float = 1.0
    project: bool = True
    loss_schedule: Schedule = falling
    energy_schedule: Schedule = rising

    def __post_init__(self) -> None:
        check_whole("inference.descent.num_steps", self.num_steps)
        if not self.step_size > 0:
            raise ConfigurationError(f"inference.descent.step_size={self.step_size} must be positive.")
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(f"inference.descent.momentum={self.momentum} must lie in [0, 1).")
        for option in ("weight_decay", "energy_weight"):
            if not getattr(self, option) >= 0:
                raise ConfigurationError(f"inference.descent.{option}={getattr(self, option)} must not be negative.")


# The paper's settings. Its step of 500 is for a score whose mask is 1[s >= 0]. A gradient by z = 2 m - 1 is half of the
# gradient by m, so the step is 1000 here, and the weight decay is half of 1e-4.
PUBLISHED = Descent(
    num_steps=30, step_size=1000.0, momentum=0.9, weight_decay=5e-5, energy_weight=1.5e-3, project=False
)


@dataclass(frozen=True)
class Recovery:
    """Result of `recover`: the state it found, and the steps to it.

    Attributes:
        state: ``(..., units)`` of +1 and -1.
        path: ``(steps + 1, ..., units)`` bool, True where the state was not negative, from the start on.
        energy: ``(steps + 1, ...)``, energy of the state's signs.
        loss: ``(steps + 1,)``, loss at each gradient, and at the end that of ``state``; NaN without a loss.
        agreement: ``(...,)``, see `HopfieldMemory.agreement`.
    """

    state: Tensor
    path: Tensor
    energy: Tensor
    loss: Tensor
    agreement: Tensor

    def distances(self, patterns: Tensor) -> Tensor:
        """Number of units that differ from ``(patterns, units)`` after each step, ``(steps + 1, ..., patterns)``."""
        differ = self.path.unsqueeze(-2) != (patterns > 0)
        return differ.sum(-1)


def recover(
    memory: HopfieldMemory, loss: Loss | None = None, *, start: Tensor | None = None, descent: Descent | None = None
) -> Recovery:
    """Find the stored pattern that has a low loss, or that is near a start.

    A projected descent ends early if the state is a fixed point of +1 and -1. Works in inference mode.

    Args:
        memory: memory with stored patterns.
        loss: differentiable function of a state ``(..., units)`` within [-1, 1], summed to one number.
        start: ``(..., units)``, by default the mean of the patterns.
        descent: options of the descent; by default projected.

    Raises:
        KeyError: nothing is stored.
    """
    descent = Descent() if descent is None else descent
    state = (memory.mean() if start is None else start).clone()
    velocity = torch.zeros_like(state)
    pattern = signs(state)
    told = memory.field(pattern)  # one product per step gives the energy, its gradient, and the test of a fixed point
    path, energy, losses = [state >= 0], [-0.5 * (pattern * told).sum(-1)], []
    for step in range(1, descent.num_steps + 1):
        progress = step / descent.num_steps
        gradient, value = torch.zeros_like(state), state.new_tensor(torch.nan)
        if loss is not None:
            gradient, value = grad_and_value(loss)(state if descent.project else pattern)
        if descent.project:
            gradient = memory.field(gradient)
            size = gradient.square().mean(-1, keepdim=True).sqrt()
            gradient = gradient / size.clamp_min(torch.finfo(size.dtype).tiny)
        gradient = descent.loss_schedule(progress) * gradient
        # Straight-through estimator: the energy's gradient passes the sign unchanged.
        gradient = gradient - descent.energy_weight * descent.energy_schedule(progress) * told
        velocity = descent.momentum * velocity + gradient + descent.weight_decay * state
        state = state - descent.step_size * velocity
        if descent.project:
            state = state.clamp(-1, 1)
        pattern = signs(state)
        told = memory.field(pattern)
        path.append(state >= 0)
        energy.append(-0.5 * (pattern * told).sum(-1))
        losses.append(value)
        if descent.project and torch.equal(state, pattern) and torch.equal(pattern, signs(told)):
            break
    losses.append(losses[-1] if loss is None else loss(pattern))
    return Recovery(
        pattern,
        torch.stack(path),
        torch.stack(energy),
        torch.stack(losses),
        cosine_similarity(pattern, told, dim=-1),
    )
