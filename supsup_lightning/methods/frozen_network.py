"""Base class of methods that learn masks over one frozen network."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.layout import Layout
from supsup_lightning.masks import MaskOptions, Rule, kaiming_uniform_scores, masked_weights
from supsup_lightning.methods.method import Method
from supsup_lightning.seeding import generator


class FrozenNetworkMethod(Method):
    """One frozen network, and scores of the mask in training.

    Args:
        network: any module. Its base weights are overwritten with random ones; none is trained.
        layout: of the masked parameters.
        drawn: layout of the base weights, drawn from the seed unless ``weights`` is ``keep``.
        mask: options of masks.
        sparsity: in place of ``auto``.
        weights: ``signed_constant`` or ``kaiming_normal``, drawn from the seed; ``keep`` leaves the network's own.
        options: of `Method`: ``store_weights``, ``compile``, ``seed``.

    Attributes:
        frozen: ``(weights,)`` float32, the masked parameters. ``live.values`` are the scores of masks in training.
        mask_options: names of the options of `MaskOptions` that have an effect.
    """

    frozen: Tensor
    mask_options: tuple[str, ...] = ("rule", "sparsity", "allocation", "budget", "is_masked")

    def __init__(
        self,
        network: nn.Module,
        *,
        layout: Layout,
        drawn: Layout,
        mask: MaskOptions,
        sparsity: float | None = None,
        weights: str,
        **options: Any,
    ) -> None:
        for name, value in mask.without_effect(self.mask_options).items():
            raise ConfigurationError(
                f"{_option(name)}={value} has no effect with {type(self).__name__} and the other mask options; leave "
                "it out."
            )
        identified = tuple(dict.fromkeys([*layout.names, *drawn.names]))
        super().__init__(network, layout=layout, drawn=drawn, identified=identified, weights=weights, **options)
        self.rule: Rule = mask.make_rule(layout.shapes, sparsity=sparsity)
        self.register_buffer("frozen", self._flat_weights(), persistent=False)
        self.identity |= mask.identity()

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


def mask_options(mask: MaskOptions | None, options: dict[str, Any]) -> MaskOptions:
    """Options of masks, as one value or as keywords of a method.

    Raises:
        ConfigurationError: both are given, or a keyword is unknown.
    """
    if mask is not None and options:
        raise ConfigurationError(f"Give {', '.join(options)} within mask=MaskOptions(...), or without it, not both.")
    if mask is not None:
        return mask
    known = [field.name for field in fields(MaskOptions)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigurationError(
                f"There is no option {name!r}{f'; did you mean {near[0]!r}' if near else ''}. Masks have "
                f"{', '.join(known)}."
            )
    return MaskOptions(**options)


def _option(name: str) -> str:
    return f"mask.{name.replace('search_', 'search.')}"
