"""LeNet 300-100."""

from collections.abc import Sequence

from supsup_lightning.networks.fully_connected import FullyConnected
from supsup_lightning.recipe.recorded import recorded


@recorded
class LeNet(FullyConnected):
    """LeNet 300-100: two hidden layers, no biases (`FullyConnected`).

    Args:
        output_size: number of outputs; those beyond the classes are not used.
        input_shape: shape of one image, ``(channels, height, width)``.
        width: factor of the hidden sizes.
    """

    def __init__(self, *, output_size: int, input_shape: Sequence[int] = (1, 28, 28), width: float = 1.0) -> None:
        super().__init__(output_size=output_size, input_shape=input_shape, hidden_sizes=(300, 100), width=width)
