"""Parameter superposition (Cheung et al. 2019): tasks share weights, each through its own rotation."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from supsup_lightning.methods.baselines.bounds import LowerBound
from supsup_lightning.recipe.recorded import recorded
from supsup_lightning.seeding import generator

# Rotations of tasks that are asked again are kept for a while: drawing them takes longer than a forward pass.
_MOST_CACHED_BYTES = 2**28


@recorded
class PSP(LowerBound):
    """One network, trained on all tasks in turn; task ``k`` computes with ``W C_k``, ``C_k`` a random rotation.

    ``C_k`` turns the inputs of each weight ``(out, in, *kernel)``, flattened to ``(out, in * kernel)``. Rotations
    regrow from (seed, task), on another machine up to rounding, so that a task keeps nothing but its running
    statistics. They make what tasks write nearly orthogonal, not quite: later tasks disturb earlier ones, the more of
    them the more.

    Args:
        network: any module.
        weights: at first: one of `WEIGHT_INITIALISERS`, drawn from the seed; ``keep``: the network's own.
        seed: of weights and rotations.

    >>> method = PSP(nn.Linear(4, 2))
    >>> method.begin_task(0)
    >>> method.finish_task(0)
    >>> method.kept_bytes()
    {'tasks': 8, 'weights': 40, 'seed': 8}
    """

    shares_statistics = False

    def __init__(self, network: nn.Module, *, weights: str = "kaiming_uniform", seed: int = 0) -> None:
        super().__init__(network, weights=weights, seed=seed)
        self._cached: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    @property
    def _needs_seed(self) -> bool:
        """True, as rotations are drawn from the seed."""
        return True

    @torch.inference_mode(False)  # a test may draw what training then needs
    def rotations(self, task: int) -> dict[str, Tensor]:
        """``C_k`` ``(inputs, inputs)`` of each weight of two or more dimensions."""
        if task not in self._cached:
            drawn = {
                name: _rotation(shape[1:].numel(), generator(self.seed, "rotation", task, name)).to(
                    self.live.values.device
                )
                for name, shape in zip(self.base.drawn.names, map(torch.Size, self.base.drawn.shapes), strict=True)
            }
            most = _MOST_CACHED_BYTES // max(1, sum(rotation.nbytes for rotation in drawn.values()))
            while len(self._cached) > max(0, most - 1):
                self._cached.popitem(last=False)
            self._cached[task] = drawn
        self._cached.move_to_end(task)
        return self._cached[task]

    def _start(self) -> tuple[list[Tensor] | None, Tensor | None]:
        return super()._start()[0], self.base.fresh_statistics()

    def live_parameters(self, values: Tensor) -> dict[str, Tensor]:
        """Parameters by name, rotated for the task in training."""
        return self._rotated(self.live.task, self.layout.split(values))

    def _of(self, task: int, row: Tensor) -> dict[str, Tensor]:
        return self._rotated(task, self.layout.split(self.live.values[0].detach()))

    def _rotated(self, task: int, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(self.live.values.device.type, enabled=False):  # weights keep their precision
            for name, rotation in self.rotations(task).items():
                weight = parameters[name]
                parameters[name] = (weight.flatten(1) @ rotation).view_as(weight)
        return parameters

    def _kept_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
        return ("rotated" if name in self.base.drawn.names else "overwritten"), 0.0

    def _apply(self, fn, recurse=True):
        self._cached.clear()  # they regrow on the new device
        return super()._apply(fn, recurse)


def _rotation(size: int, draw: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniformly distributed."""
    orthogonal, triangle = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    return (orthogonal * triangle.diagonal().sign()).float()  # without the signs, QR's own convention would show
