"""What methods share that learn masks over the parameters of one frozen network."""

import torch
from torch import Tensor, nn

from supsup_lightning.errors import check_choice
from supsup_lightning.layout import Layout
from supsup_lightning.masks import ALLOCATIONS, Rule, kaiming_uniform_scores, make_rule
from supsup_lightning.methods.network_method import NetworkMethod
from supsup_lightning.seeding import generator


class FrozenNetworkMethod(NetworkMethod):
    """One frozen network, and the scores of the mask in training over its masked parameters.

    Args:
        network: any module. Its base weights are overwritten with random ones; none is trained.
        layout: of the masked parameters.
        base: of the base weights; ``weights`` draws these.
        rule: of masks; with ``sparsity``, ``allocation`` and ``budget`` as in `make_rule`.
        weights: ``signed_constant`` or ``kaiming_normal``, drawn from the seed; ``keep`` leaves the network's own.
        store_weights: put base weights and masked parameters into checkpoints and files, too.
        seed: of weights and scores.

    Attributes:
        frozen: ``(weights,)`` float32, the masked parameters.
        scores: ``(weights,)``, of the task in training.
    """

    frozen: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        layout: Layout,
        base: Layout,
        rule: str,
        sparsity: float | None,
        allocation: str,
        budget: float | None,
        weights: str,
        store_weights: bool,
        seed: int,
    ) -> None:
        check_choice("mask.rule", rule, ("threshold", "topk"))
        check_choice("mask.allocation", allocation, tuple(ALLOCATIONS))
        super().__init__(
            network,
            layout=layout,
            base=base,
            identified=tuple(dict.fromkeys([*layout.names, *base.names])),
            weights=weights,
            store_weights=store_weights,
            seed=seed,
        )
        self.rule: Rule = make_rule(rule, layout.shapes, sparsity=sparsity, allocation=allocation, budget=budget)
        self.scores = nn.Parameter(torch.zeros(layout.num_weights, dtype=torch.float32))
        self.register_buffer("frozen", self._flat_weights(), persistent=False)
        self.identity |= {
            "rule": rule,
            "sparsity": str(sparsity),
            "allocation": allocation if rule == "topk" else "none",
            "budget": str(budget),
        }

    def trainable(self) -> list[nn.Parameter]:
        """The scores, ``(weights,)``."""
        return [self.scores]

    def _start(self, task: int, scores: Tensor) -> None:
        """Put ``task`` into training from these scores; the places that they leave are 0."""
        with torch.no_grad():
            self.scores.zero_()
            self.scores[: len(scores)] = scores
        self.scores.grad = None
        self.task_in_training = task

    def _drawn_scores(self, task: int) -> Tensor:
        return kaiming_uniform_scores(self.layout.shapes, generator(self.seed, "scores", task))

    def _flat_weights(self) -> Tensor:
        parameters = dict(self.network.named_parameters())
        return self.layout.flatten({name: parameters[name].detach().float() for name in self.layout.names})

    def _follow_network(self) -> None:
        super()._follow_network()
        weights = self._flat_weights()
        if self._conventions.types != self._types_at_first:  # rounded: what rounds to the same stays as it was
            types = self._conventions.types
            parts = self.layout.split(self.frozen)
            rounded = {name: part.to(types.get(name, part.dtype)).float() for name, part in parts.items()}
            weights = torch.where(self.layout.flatten(rounded) == weights, self.frozen, weights)
        self.frozen.copy_(weights)
