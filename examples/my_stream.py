"""Tasks of your own, out of any data set (docs/plug_ins.md)."""

from dataclasses import replace
from functools import partial

import torch

from supsup_lightning.data import OneSource
from supsup_lightning.seeding import generator


class Rolled(OneSource):
    """Each task sees the images moved around the edge, by a number of rows and columns of its own."""

    def transformed(self, images, task, seed):
        """The same images, and what is done to each batch of them."""
        height, width = images.store.shape()[1:]
        rows, columns = torch.randint(1, min(height, width), (2,), generator=generator(seed, "roll", task)).tolist()
        return replace(images, transform=partial(torch.roll, shifts=(rows, columns), dims=(-2, -1)))
