"""Plain networks without a word about masks; any other `torch.nn.Module` does as well."""

from supsup_lightning.networks.fully_connected import FullyConnected
from supsup_lightning.networks.lenet import LeNet

__all__ = ["FullyConnected", "LeNet"]
