"""Network of the paper's HopSupSup experiments."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

from supsup_lightning.networks.width import LEAST_UNITS, scaled
from supsup_lightning.recipe.recorded import recorded


@recorded
class HopNet(nn.Sequential):
    """Linear layers without biases; after each but the last, BatchNorm by batch statistics, and Swish.

    BatchNorm has gains and no biases. `HopSupSup` masks the gains: 0 switches a unit off.

    Args:
        output_size: number of outputs.
        input_shape: shape of one image, ``(channels, height, width)``; 28 x 28 greyscale by default.
        hidden_sizes: sizes of the hidden layers; the paper has two layers of 2048.
        width: factor of the hidden sizes, each of which stays at least 10.

    >>> [name for name, parameter in HopNet(output_size=10, hidden_sizes=(32, 16)).named_parameters()]
    ['1.weight', '2.weight', '4.weight', '5.weight', '7.weight']
    """

    def __init__(
        self,
        *,
        output_size: int,
        input_shape: Sequence[int] = (1, 28, 28),
        hidden_sizes: Sequence[int] = (2048, 2048),
        width: float = 1.0,
    ) -> None:
        sizes = [prod(input_shape), *(scaled(size, width, least=LEAST_UNITS) for size in hidden_sizes)]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            norm = nn.BatchNorm1d(outputs, track_running_stats=False)
            norm.register_parameter("bias", None)
            layers += [nn.Linear(inputs, outputs, bias=False), norm, nn.SiLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], output_size, bias=False))
