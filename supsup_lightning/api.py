"""Everything that `supsup_lightning` offers; imported once the first of these names is asked for."""

from supsup_lightning.bank import MaskBank
from supsup_lightning.bank.hopfield_memory import HopfieldMemory
from supsup_lightning.data import ContinualDataModule, DataModuleSequence, PermutedDigits, PermutedMNIST
from supsup_lightning.discovery import (
    AccuracyDiscovery,
    Discovery,
    GradientDiscovery,
    NoveltyDiscovery,
    Unannounced,
    Verdict,
    mean_over_processes,
)
from supsup_lightning.inference import (
    Binary,
    Discriminant,
    Exhaustive,
    Given,
    HopfieldRecovery,
    Inference,
    OneShot,
)
from supsup_lightning.layout import ByName
from supsup_lightning.masks import MaskOptions
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
from supsup_lightning.recipe.loading import load
from supsup_lightning.recipe.prediction import Prediction
from supsup_lightning.scenario import GG, GNS, GNU, NNS, Scenario
