"""What methods share that learn masks over the parameters of one frozen network."""

import torch
from torch import Tensor, nn

from supsup_lightning.errors import check_choice
from supsup_lightning.layout import Layout
from supsup_lightning.masks import ALLOCATIONS, Rule, kaiming_uniform_scores, make_rule, masked_weights
from supsup_lightning.methods.method import Method
from supsup_lightning.seeding import generator


class FrozenNetworkMethod(Method):
    """One frozen network, and the scores of the mask in training over its masked parameters.

    Args:
        network: any module. Its base weights are overwritten with random ones; none is trained.
        layout: of the masked parameters.
        drawn: layout of the base weights, drawn from the seed unless ``weights`` is ``keep``.
        rule: of masks; with ``sparsity``, ``allocation`` and ``budget`` as in `make_rule`.
        weights: ``signed_constant`` or ``kaiming_normal``, drawn from the seed; ``keep`` leaves the network's own.
        store_weights: put base weights and masked parameters into checkpoints and files, too.
        seed: of weights and scores.

    Attributes:
        frozen: ``(weights,)`` float32, the masked parameters. ``live.values`` are the scores of masks in training.
    """

    frozen: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        layout: Layout,
        drawn: Layout,
        rule: str,
        sparsity: float | None,
        allocation: str,
        budget: float | None,
        weights: str,
        store_weights: bool,
        compile: bool = False,
        seed: int,
    ) -> None:
        check_choice("mask.rule", rule, ("threshold", "topk"))
        check_choice("mask.allocation", allocation, tuple(ALLOCATIONS))
        super().__init__(
            network,
            layout=layout,
            drawn=drawn,
            identified=tuple(dict.fromkeys([*layout.names, *drawn.names])),
            weights=weights,
            store_weights=store_weights,
            compile=compile,
            seed=seed,
        )
        self.rule: Rule = make_rule(rule, layout.shapes, sparsity=sparsity, allocation=allocation, budget=budget)
        self.register_buffer("frozen", self._flat_weights(), persistent=False)
        self.identity |= {
            "rule": rule,
            "sparsity": str(sparsity),
            "allocation": allocation if rule == "topk" else "none",
            "budget": str(budget),
        }

    def live_parameters(self, values: Tensor) -> dict[str, Tensor]:
        """``W * mask``, ``(*tasks, *shape)`` by name, out of scores ``(*tasks, weights)``; differentiable in them."""
        return masked_weights(values, self.frozen, self.rule, self.layout)

    def _drawn_scores(self, task: int) -> Tensor:
        return kaiming_uniform_scores(self.layout.shapes, generator(self.seed, "scores", task))

    def _flat_weights(self) -> Tensor:
        parameters = dict(self.network.named_parameters())
        return self.layout.flatten({name: parameters[name].detach().float() for name in self.layout.names})

    def _follow_network(self) -> None:
        super()._follow_network()
        weights = self._flat_weights()
        if self.base.types_changed:  # rounded: what rounds to the same stays as it was
            types = self.base.conventions.types
            parts = self.layout.split(self.frozen)
            rounded = {name: part.to(types.get(name, part.dtype)).float() for name, part in parts.items()}
            weights = torch.where(self.layout.flatten(rounded) == weights, self.frozen, weights)
        self.frozen.copy_(weights)
