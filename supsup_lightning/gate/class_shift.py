"""Has a batch been drawn from a known task? By how far the means of its classes are from the known ones.

U_t = mean over labels of |m - mu|^2 - Q / (n (n - 1)),  in whitened features
m: the batch's mean of a label with n images; Q: their squared distances from m; mu: the task's mean of that label

U estimates the squared Mahalanobis distance between the two means without bias: it is 0 on average if the batch is of
the task, whatever the spread of its images, which a mean distance of images is not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from supsup_lightning.errors import DataError
from supsup_lightning.gate.linear_discriminant import LinearDiscriminant

_LEAST_SHARE = 0.1  # of a batch's images: labels that a task has never had are overlooked below it


class Shift(NamedTuple):
    """Distance of a batch from each task, and how far a batch of the same task is at most.

    Attributes:
        distances: ``U`` per task, ``(k,)``; infinite if the task does not know the batch's labels.
        expected: its mean for a batch of the same task, ``(k,)``: the error of the known means.
        deviation: its standard deviation for a batch of the same task, ``(k,)``.
    """

    distances: Tensor
    expected: Tensor
    deviation: Tensor


def shift(discriminant: LinearDiscriminant, features: Tensor, labels: Tensor) -> Shift:
    """How far the classes of a batch have moved away from those of each task.

    Args:
        discriminant: over the known tasks.
        features: of the batch, ``(batch, features)``.
        labels: ``(batch,)`` int64.

    Raises:
        DataError: no label has two images.
    """
    total = torch.zeros(3, discriminant.num_tasks, dtype=torch.float64, device=features.device)
    compared = torch.zeros(discriminant.num_tasks, dtype=torch.float64, device=features.device)
    number = 0
    for label in labels.unique().tolist():
        own = features[labels == label]
        if len(own) < 2:
            continue
        number += len(own)
        for part in discriminant.covariances:
            classes = part.classes[discriminant.labels[part.classes] == label]
            if not len(classes):
                continue
            images = part.whitened(own - part.centre).double()
            middle = images.mean(0, keepdim=True)
            spread = images - middle
            products = spread @ spread.T
            squares = products.diagonal().sum()
            pairs = len(own) * (len(own) - 1)
            known = torch.isin(part.classes, classes)
            apart = torch.cdist(part.whitened_means[known].double(), middle).square()[:, 0]
            # Less the mean of the products of different images, -Q / pairs, which they owe to their common middle.
            unlike = products.square().sum() - products.diagonal().square().sum() - squares**2 / pairs
            variance = 2 * unlike.clamp(min=0) / pairs**2
            places = discriminant.places[classes]
            values = torch.stack(
                [
                    apart - squares / pairs,
                    squares / (len(own) - 1) / discriminant.counts[classes],
                    variance.expand_as(apart) * len(own),  # the mean's weights are squared below
                ]
            )
            total[:, places] += values * len(own)
            compared[places] += len(own)
    if not number:
        raise DataError(
            f"discovery=novelty compares classes by their means, and in a batch of {len(labels)} images no label has "
            "two; use a larger data.batch_size."
        )
    distances, expected, variance = total / compared.clamp(min=1)
    distances = torch.where(compared < (1 - _LEAST_SHARE) * number, torch.inf, distances)
    return Shift(distances, expected, (variance / compared.clamp(min=1)).sqrt())
