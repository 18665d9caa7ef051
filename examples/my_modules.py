"""An ordinary LightningDataModule; a sequence of them makes a task of each (docs/data/lightning_data_modules.md)."""

from collections.abc import Sequence

import lightning as L
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader


class SomeDigits(L.LightningDataModule):
    """The images of some of scikit-learn's digits, with labels from 0; the first hundred are test images."""

    def __init__(self, digits: Sequence[int]) -> None:
        super().__init__()
        self.num_classes = len(digits)
        items = zip(*load_digits(return_X_y=True), strict=True)  # (64,) float64, int64
        self.items = [(Tensor(image).view(1, 8, 8), digits.index(digit)) for image, digit in items if digit in digits]

    def train_dataloader(self) -> DataLoader:
        """Batches of ``(images, labels)``."""
        return DataLoader(self.items[100:], batch_size=32, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        """The test half."""
        return DataLoader(self.items[:100], batch_size=32)
