"""A kind of data set of your own (docs/plug_ins.md)."""

import numpy as np
import torch

from supsup_lightning.data import Source, halves


class NumpyFile(Source):
    """Images and labels in one .npz file: train_images, train_labels, test_images, test_labels."""

    def __init__(self, file, classes):
        self.file, self.classes = file, classes

    def num_classes(self, root):
        """Known without reading an image."""
        return self.classes

    def load(self, root, reading):
        """Images are ``(images, channels, height, width)`` uint8, labels ``(images,)``."""
        arrays = np.load(root / self.file)
        names = [f"{half}_{what}" for half in ("train", "test") for what in ("images", "labels")]
        return halves(*(torch.from_numpy(arrays[name]) for name in names))
