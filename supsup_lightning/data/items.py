"""Image and label of a data set's item, or of a loader's batch, in any of the usual forms."""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from supsup_lightning.errors import DataError

_IMAGES = ("image", "images", "img", "pixel_values", "input", "inputs", "x")
_LABELS = ("label", "labels", "target", "targets", "y")

# Pillow's modes whose values are not channel brightnesses, and the mode to convert them to.
_SHOWN_AS = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB"}


def image_and_label(item: Any, whose: str) -> tuple[Any, Any]:
    """Return image and label: the first two entries of a tuple, or the usual keys of a dict. Takes batches, too.

    Args:
        item: ``(image, label)``, ``(image, label, ...)`` or ``{"image": ..., "label": ...}``.
        whose: name of the item, which begins an error message.

    Raises:
        DataError: no label, or an image that is several inputs.
    """
    if isinstance(item, Mapping):
        image, label = (_by_name(item, names, whose) for names in (_IMAGES, _LABELS))
    elif isinstance(item, (tuple, list)) and len(item) >= 2:
        image, label = item[:2]
    else:
        kind = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
        raise DataError(f"{whose} has no labels: it must be (image, label), not {kind}.")
    if isinstance(image, (tuple, list, Mapping)):
        raise DataError(
            f"{whose} has a {type(image).__name__} of {len(image)} as its input, and a network here takes one tensor; "
            "put the parts into one (stack them as channels, say), and take them apart in the network."
        )
    return image, label


def num_ignored(item: Any) -> int:
    """Number of parts of an item that `image_and_label` leaves out."""
    return len(item) - 2


def _by_name(item: Mapping, names: tuple[str, ...], whose: str) -> Any:
    found = [name for name in names if name in item]
    if len(found) != 1:
        raise DataError(
            f"{whose} is a dict with {', '.join(map(repr, item))}: exactly one of {', '.join(names)} has to be in it. "
            "Give (image, label)."
        )
    return item[found[0]]


def label_of(label: Any, whose: str) -> int:
    """Return a label as an `int`. A bool, an integral float, or a tensor or array of one number is accepted, too.

    Args:
        label: the label of an item.
        whose: name of the item, for the error message.

    Raises:
        DataError: anything else.

    >>> label_of(torch.tensor([3.0]), "item 0")
    3
    """
    if type(label) is int:
        return label
    value = label.tolist() if isinstance(label, (Tensor, np.ndarray, np.generic)) else label
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    shape = f" of shape {tuple(np.shape(label))}" if isinstance(value, (list, tuple)) else ""
    remedy = "One-hot labels become numbers with argmax." if shape else "Number the classes."
    shown = shorten(repr(value), 60, placeholder=" ...")
    raise DataError(f"The labels of {whose} are not integers, one per image: {shown}{shape}. {remedy}")


def labels_of_batch(labels: Any, num_images: int, whose: str) -> Tensor:
    """Return the labels of a batch, ``(batch,)`` int64. Raises `DataError` unless they are one integer per image."""
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(np.asarray(labels))
        except (TypeError, ValueError) as error:
            raise DataError(f"The labels of {whose} are not integers: {labels!r}. Number the classes.") from error
    whole = not labels.is_complex() and (not labels.is_floating_point() or bool((labels == labels.round()).all()))
    if not whole or labels.numel() != num_images:
        raise DataError(
            f"The labels of {whose} are not integers, one per image: {labels.dtype} of shape {tuple(labels.shape)} for "
            f"{num_images} images. One-hot labels become numbers with argmax."
        )
    return labels.reshape(-1).long()


def as_tensor(image: Any, whose: str) -> Tensor:
    """Return an image, or a batch, as a tensor of the same type; float64 becomes float32, which layers need.

    Args:
        image: a tensor, an array, or an image of Pillow.
        whose: name of the image, which begins an error message.

    Raises:
        DataError: anything else.
    """
    if isinstance(image, Image.Image):
        return F.pil_to_tensor(image.convert(_SHOWN_AS.get(image.mode, image.mode)))
    try:
        tensor = torch.as_tensor(image) if isinstance(image, (Tensor, np.ndarray)) else None
    except TypeError:  # an array of objects
        tensor = None
    if tensor is None:
        raise DataError(f"{whose} is no image but {type(image).__name__}; give a tensor, an array or Pillow's image.")
    return tensor.float() if tensor.dtype == torch.float64 else tensor
