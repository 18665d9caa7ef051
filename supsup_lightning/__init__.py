"""Supermasks in Superposition on PyTorch Lightning: one frozen network, one bit a weight for each task."""

from importlib.metadata import PackageNotFoundError, version

from supsup_lightning.bank import MaskBank
from supsup_lightning.data import ContinualDataModule, DataModuleSequence, PermutedDigits, PermutedMNIST, Unannounced
from supsup_lightning.hopfield import HopfieldMemory
from supsup_lightning.inference import (
    AccuracyDiscovery,
    Binary,
    Discovery,
    Exhaustive,
    Given,
    GradientDiscovery,
    HopfieldRecovery,
    Inference,
    OneShot,
    Verdict,
    mean_over_processes,
)
from supsup_lightning.layout import ByName
from supsup_lightning.methods import (
    PSP,
    BatchEnsemble,
    HopSupSup,
    LowerBound,
    Method,
    SeparateHeads,
    SmallNetworks,
    SupSup,
    UpperBound,
)
from supsup_lightning.module import ContinualModule
from supsup_lightning.networks import FullyConnected, GEMResNet18, HopNet, LeNet, ResNet50
from supsup_lightning.scenario import GG, GNS, GNU, NNS, Scenario

try:
    __version__ = version("supsup-lightning")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "GG",
    "GNS",
    "GNU",
    "NNS",
    "PSP",
    "AccuracyDiscovery",
    "BatchEnsemble",
    "Binary",
    "ByName",
    "ContinualDataModule",
    "ContinualModule",
    "DataModuleSequence",
    "Discovery",
    "Exhaustive",
    "FullyConnected",
    "GEMResNet18",
    "Given",
    "GradientDiscovery",
    "HopNet",
    "HopSupSup",
    "HopfieldMemory",
    "HopfieldRecovery",
    "Inference",
    "LeNet",
    "LowerBound",
    "MaskBank",
    "Method",
    "OneShot",
    "PermutedDigits",
    "PermutedMNIST",
    "ResNet50",
    "Scenario",
    "SeparateHeads",
    "SmallNetworks",
    "SupSup",
    "Unannounced",
    "UpperBound",
    "Verdict",
    "mean_over_processes",
]
