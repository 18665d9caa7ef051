"""Baselines of continual learning that train a network's own weights, for one task or for all of them."""

from supsup_lightning.methods.baselines.batch_ensemble import BatchEnsemble
from supsup_lightning.methods.baselines.bounds import LowerBound, SmallNetworks, UpperBound
from supsup_lightning.methods.baselines.psp import PSP
from supsup_lightning.methods.baselines.separate_heads import SeparateHeads
from supsup_lightning.methods.baselines.trained_network import TrainedNetworkMethod

__all__ = ["PSP", "BatchEnsemble", "LowerBound", "SeparateHeads", "SmallNetworks", "TrainedNetworkMethod", "UpperBound"]
