"""Reduced ResNet-18 of Gradient Episodic Memory (Lopez-Paz & Ranzato 2017), for images of 32 x 32."""

from collections.abc import Sequence

from torch import Tensor, nn

from supsup_lightning.networks.width import scaled
from supsup_lightning.recipe.recorded import recorded


@recorded
class GEMResNet18(nn.Sequential):
    """ResNet-18 for small images, with a third of the usual channels, without biases and BatchNorm gains.

    The stem is one 3 x 3 convolution with stride 1 and no max-pooling follows it, so that images of 32 x 32 keep
    their resolution up to the second stage. There are no biases, and BatchNorm has neither gain nor bias.

    Args:
        output_size: number of outputs; those beyond the classes are not used.
        input_shape: shape of one image, ``(channels, height, width)``. Only the channels matter: the network pools
            over the remaining height and width, 1/8 of the image's.
        base_channels: channels of the first stage; the next three have 2, 4 and 8 times as many. GEM has 20, ResNet-18
            has 64.
        width: factor of the channels.

    >>> network = GEMResNet18(output_size=5)
    >>> sum(parameter.numel() for parameter in network.parameters())
    1090940
    """

    def __init__(
        self,
        *,
        output_size: int,
        input_shape: Sequence[int] = (3, 32, 32),
        base_channels: int = 20,
        width: float = 1.0,
    ) -> None:
        first, second, third, fourth = (scaled(base_channels * multiple, width) for multiple in (1, 2, 4, 8))
        super().__init__(
            nn.Conv2d(input_shape[0], first, kernel_size=3, padding=1, bias=False),  # (batch, first, height, width)
            nn.BatchNorm2d(first, affine=False),
            nn.ReLU(),
            BasicBlock(first, first, stride=1),
            BasicBlock(first, first, stride=1),
            BasicBlock(first, second, stride=2),  # (batch, second, height/2, width/2)
            BasicBlock(second, second, stride=1),
            BasicBlock(second, third, stride=2),
            BasicBlock(third, third, stride=1),
            BasicBlock(third, fourth, stride=2),  # (batch, fourth, height/8, width/8)
            BasicBlock(fourth, fourth, stride=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(fourth, output_size, bias=False),
        )


class BasicBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions.

    Maps ``(batch, inputs, h, w)`` to ``(batch, outputs, h/stride, w/stride)``.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        stride: stride of the first convolution, and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs, affine=False),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs, affine=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(outputs, affine=False),
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return ``relu(residual + shortcut)``."""
        return (self.residual(images) + self.shortcut(images)).relu()
