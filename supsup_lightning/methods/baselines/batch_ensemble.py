"""BatchEnsemble (Wen et al. 2020): tasks share weights, each scaled by a matrix of rank one."""

from torch import Tensor, nn

from supsup_lightning.layout import Layout
from supsup_lightning.methods.baselines.trunk import TrunkMethod
from supsup_lightning.recipe.recorded import recorded


@recorded
class BatchEnsemble(TrunkMethod):
    """One trunk, trained on the first task or random; a task is two vectors per weight, ``W * (s t')``.

    For a weight ``(out, in, *kernel)``, ``s`` has a factor for each output and ``t`` one for each input. Biases and
    gains belong to the trunk.

    Args:
        network: any module.
        trunk: ``trained`` on the first task, together with its factors, and frozen from then on; or ``random``.
        learning_rate: of factors alone, in place of the optimizer's, which is for a trunk; None for the optimizer's.
        weights: of the trunk at first: one of `WEIGHT_INITIALISERS`, drawn from the seed; ``keep``: the network's own.
        store_weights: with a random trunk, put it into checkpoints and files.
        seed: of the weights.

    >>> method = BatchEnsemble(nn.Linear(4, 2, bias=False))
    >>> method.begin_task(0)
    >>> {name: tuple(weight.shape) for name, weight in method.effective(0).items()}, method.task_bytes()
    ({'weight': (2, 4)}, 24)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        trunk: str = "trained",
        learning_rate: float | None = 0.1,
        weights: str = "kaiming_uniform",
        store_weights: bool = False,
        seed: int = 0,
    ) -> None:
        layout = Layout.choosing(network, lambda name, parameter: parameter.ndim >= 2)
        weighted = dict(zip(layout.names, layout.shapes, strict=True))
        # Shapes that broadcast: (out, 1, ...) and (1, in, 1, ...).
        outputs = Layout(tuple(weighted), tuple((s[0], *(1 for _ in s[1:])) for s in weighted.values()))
        inputs = Layout(tuple(weighted), tuple((1, s[1], *(1 for _ in s[2:])) for s in weighted.values()))
        super().__init__(
            network,
            trunk=trunk,
            shared=Layout.choosing(network, lambda name, parameter: True),
            row_size=outputs.num_weights + inputs.num_weights,
            learning_rate=learning_rate,
            weights=weights,
            store_weights=store_weights,
            seed=seed,
        )
        self.outputs, self.inputs = outputs, inputs

    def _initial_row(self) -> Tensor:
        """Vectors of ones, so that a task starts from the trunk."""
        return self.live.values.new_ones(self.outputs.num_weights + self.inputs.num_weights)

    def _combined(self, row: Tensor, trunk: dict[str, Tensor]) -> dict[str, Tensor]:
        s, t = row.split([self.outputs.num_weights, self.inputs.num_weights])
        columns, rows = self.outputs.split(s), self.inputs.split(t)
        return {**trunk, **{name: trunk[name] * columns[name] * rows[name] for name in self.outputs.names}}

    def _kept_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
        return ("factors", 4.0 * (shape[0] + shape[1])) if name in self.outputs.names else self._kept_of_trunk()
