"""Fully connected networks."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

from supsup_lightning.networks.width import LEAST_UNITS, scaled
from supsup_lightning.recipe.recorded import recorded


@recorded
class FullyConnected(nn.Sequential):
    """Linear layers without biases, ReLU between them; images are flattened.

    Args:
        output_size: number of outputs; those beyond the classes are not used.
        input_shape: shape of one image, ``(channels, height, width)``; 28 x 28 greyscale by default.
        hidden_sizes: sizes of the hidden layers; the paper's FC network has two layers of 1024.
        width: factor of the hidden sizes, each of which stays at least 10.

    >>> FullyConnected(output_size=10, input_shape=(1, 8, 8), hidden_sizes=(32,))
    FullyConnected(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=64, out_features=32, bias=False)
      (2): ReLU()
      (3): Linear(in_features=32, out_features=10, bias=False)
    )
    """

    def __init__(
        self,
        *,
        output_size: int,
        input_shape: Sequence[int] = (1, 28, 28),
        hidden_sizes: Sequence[int] = (1024, 1024),
        width: float = 1.0,
    ) -> None:
        hidden = [scaled(size, width, least=LEAST_UNITS) for size in hidden_sizes]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise([prod(input_shape), *hidden, output_size]):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
        super().__init__(*layers[:-1])
