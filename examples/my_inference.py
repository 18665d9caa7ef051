"""A way of your own to find the task of images (docs/plug_ins.md)."""

import torch

from supsup_lightning import Inference


class LargestMargin(Inference):
    """The task whose best class is furthest ahead of its second, for each image by itself; every task is tried."""

    finds_task = True

    def __call__(self, method, images, num_classes):
        """``(batch, *shape)`` to ``(batch,)`` int64."""
        tasks = method.tasks.tolist()
        chances = torch.stack([method(images, task)[:, :num_classes].softmax(1) for task in tasks])
        best = chances.topk(2, dim=-1).values  # (tasks, batch, 2)
        return method.tasks[(best[..., 0] - best[..., 1]).argmax(0)]
