"""An ordinary ``nn.Module`` that knows nothing of masks, to be replaced by yours (docs/networks.md)."""

from collections.abc import Sequence

from torch import Tensor, nn


class RowLSTM(nn.Module):
    """An LSTM that reads an image row by row: ``(batch, *input_shape)`` to ``(batch, output_size)``."""

    def __init__(self, *, output_size: int, input_shape: Sequence[int], hidden_size: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_shape[0] * input_shape[2], hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, output_size)

    def forward(self, images: Tensor) -> Tensor:
        """The output after the last row."""
        rows = images.movedim(1, 2).flatten(2)  # (batch, height, channels * width)
        return self.head(self.lstm(rows)[0][:, -1])
