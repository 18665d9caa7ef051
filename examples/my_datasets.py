"""An ordinary torch Dataset with a training and a test half, to be replaced by yours (docs/data/datasets.md)."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset


class DigitImages(Dataset):
    """scikit-learn's digits: ``(image, label)`` with images ``(1, 8, 8)`` uint8; every fifth is a test image."""

    def __init__(self, *, train: bool) -> None:
        digits = load_digits()
        chosen = (torch.arange(len(digits.target)) % 5 != 0) == train
        self.images = torch.tensor(digits.images, dtype=torch.uint8)[chosen].unsqueeze(1)
        self.targets = torch.tensor(digits.target)[chosen]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.targets[index])
