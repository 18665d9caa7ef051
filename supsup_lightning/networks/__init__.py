"""Plain networks without masks; any other `torch.nn.Module` works as well."""

from supsup_lightning.networks.fully_connected import FullyConnected
from supsup_lightning.networks.gem_resnet import GEMResNet18
from supsup_lightning.networks.hop_net import HopNet
from supsup_lightning.networks.lenet import LeNet
from supsup_lightning.networks.timm_models import timm_model
from supsup_lightning.networks.torchvision_models import ResNet50, torchvision_model

__all__ = ["FullyConnected", "GEMResNet18", "HopNet", "LeNet", "ResNet50", "timm_model", "torchvision_model"]
