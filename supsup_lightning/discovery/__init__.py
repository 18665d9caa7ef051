"""Streams that announce no task (scenario NNs): the order of tasks, the rules that find them, and the learner."""

from supsup_lightning.discovery.learner import Decision, Learner
from supsup_lightning.discovery.novelty import NoveltyDiscovery
from supsup_lightning.discovery.rules import (
    AccuracyDiscovery,
    Discovery,
    GradientDiscovery,
    Verdict,
    mean_over_processes,
)
from supsup_lightning.discovery.stream import Blocks, Order, Recurring, Switching, Unannounced

__all__ = [
    "AccuracyDiscovery",
    "Blocks",
    "Decision",
    "Discovery",
    "GradientDiscovery",
    "Learner",
    "NoveltyDiscovery",
    "Order",
    "Recurring",
    "Switching",
    "Unannounced",
    "Verdict",
    "mean_over_processes",
]
