"""Density of masks, and overlap between them, by layer."""

from typing import NamedTuple

import torch

from supsup_lightning.bank.mask_bank import MaskBank
from supsup_lightning.layout import Layout


class LayerStatistics(NamedTuple):
    """Statistics of all masks of a bank on one parameter of the network.

    Attributes:
        layer: name of the parameter.
        weights: number of its weights.
        density: share of its weights that a mask switches on, mean over masks.
        density_std: standard deviation of that share over masks; NaN for fewer than two.
        overlap: share of a mask's weights that another mask switches on as well, over all pairs; NaN for fewer than
            two masks, or if none switches a weight on. Independent masks overlap by their density.
    """

    layer: str
    weights: int
    density: float
    density_std: float
    overlap: float


def layer_statistics(bank: MaskBank, layout: Layout) -> list[LayerStatistics]:
    """Statistics of each parameter in a layout; no mask is unpacked.

    >>> bank = MaskBank(4)
    >>> bank.add(0, torch.tensor([True, True, False, False]))
    >>> bank.add(1, torch.tensor([True, False, True, False]))
    >>> layer_statistics(bank, Layout(("weight",), ((2, 2),)))
    [LayerStatistics(layer='weight', weights=4, density=0.5, density_std=0.0, overlap=0.5)]
    """
    masks, statistics, first = len(bank), [], 0
    for name, size in zip(layout.names, layout.sizes, strict=True):
        inside = torch.zeros(layout.num_weights, device=bank.counts.device)
        inside[first : first + size] = 1
        densities = bank.project(inside).double() / size  # (masks,)
        on = bank.counts[first : first + size].double()
        # A weight that is on in c of k masks is shared by c (c - 1) of their k (k - 1) ordered pairs.
        pairs = (on * (on - 1)).sum() / (on.sum() * (masks - 1)) if masks > 1 else torch.tensor(torch.nan)
        deviation = densities.std() if masks > 1 else torch.tensor(torch.nan)
        statistics.append(LayerStatistics(name, size, densities.mean().item(), deviation.item(), pairs.item()))
        first += size
    return statistics
