"""How raw images become network inputs, as the data module made them in training: for images that come later.

PIL image or path   as read from a file: depth, orientation, transparency, then grey or colour
bytes (uint8)       size and channels, then mean and standard deviation
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from supsup_lightning.data.decoding import picture_of, read_image
from supsup_lightning.data.images import bring_to
from supsup_lightning.data.inputs import Inputs, prepared
from supsup_lightning.data.workers import ImageFiles
from supsup_lightning.errors import DataError

RESIZES = ("none", "files", "crop", "inputs")
_FULL_RANGE = 128  # images whose highest value is below have another range than 0 to 255


@dataclass(frozen=True)
class RawImages:
    """What training did to the images of its data set.

    Attributes:
        shape: of an image as the data set has it, ``(channels, height, width)``.
        mean: of each channel, in units of the bytes.
        std: standard deviation of each channel.
        highest: highest byte of the training images.
        resize: ``none``; ``files``: image files were resized; ``crop``: to more, and their centre was cropped;
            ``inputs``: normalised images were resized.
        refused: why raw images cannot be prepared again; empty if they can.
    """

    shape: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    highest: int = 255
    resize: str = "none"
    refused: str = ""

    def state(self) -> dict[str, Any]:
        """Return plain values, for a file or a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "RawImages":
        """Make it from `state`. Raises `ValueError` or `TypeError` for anything else."""
        made = cls(
            shape=tuple(map(int, state["shape"])),
            mean=tuple(map(float, state["mean"])),
            std=tuple(map(float, state["std"])),
            highest=int(state["highest"]),
            resize=str(state["resize"]),
            refused=str(state["refused"]),
        )
        if not made.refused and (
            made.resize not in RESIZES
            or len(made.shape) != 3
            or not len(made.mean) == len(made.std) == made.shape[0]
            or not all(value > 0 for value in made.std)
        ):
            raise ValueError("what it says of raw images is no preparation")
        return made


REFUSED = RawImages(refused="the data module does not say how it prepares images")


def network_inputs(images: Any, inputs: Inputs | None, raw: RawImages | None, network: nn.Module) -> Tensor:
    """Return any kind of images as network inputs ``(batch, *shape)``.

    Args:
        images: prepared floats ``(batch, *shape)``; bytes ``(batch, channels, height, width)``; a PIL image or a path;
            or a list of these, single tensors without the batch's dimension.
        inputs: what the network was trained on.
        raw: how raw images were prepared in training; None if that is not known.
        network: the network.

    Raises:
        DataError: images of another kind, or raw ones that cannot be prepared as in training.
    """
    if isinstance(images, (Image.Image, str, Path)):
        images = [images]
    if isinstance(images, Tensor):
        return _batch(images, inputs, raw, network)
    if not isinstance(images, Sequence):
        raise DataError(
            f"Images to predict are a tensor (batch, *shape), a PIL image, a path, or a list of these, not "
            f"{type(images).__name__}."
        )
    if not len(images):
        raise DataError("Images to predict are an empty list.")
    return torch.cat([_one(image, place, inputs, raw, network) for place, image in enumerate(images)])


def _one(image: Any, place: int, inputs: Inputs | None, raw: RawImages | None, network: nn.Module) -> Tensor:
    """``(1, *shape)``."""
    name = f"Image {place} of those to predict"
    if isinstance(image, Tensor):
        return _batch(image.unsqueeze(0), inputs, raw, network)
    if not isinstance(image, (Image.Image, str, Path)):
        raise DataError(f"{name} is neither a tensor, nor a PIL image, nor a path, but {type(image).__name__}.")
    known, shape = _known(inputs, raw)
    channels = known.shape[0]
    picture = picture_of(image, channels=channels, name=name) if isinstance(image, Image.Image) else None
    picture = read_image(Path(image), channels=channels) if picture is None else picture  # type: ignore[arg-type]
    if known.resize != "inputs":  # a picture of any size; where training did not resize, its images had this shape
        files = ImageFiles((), shape if known.resize != "none" else known.shape, resized_crop=known.resize == "crop")
        return _normalised(files.evaluated(picture).unsqueeze(0), known, shape, name)
    return _normalised(F.pil_to_tensor(picture).unsqueeze(0), known, shape, name)


def _batch(images: Tensor, inputs: Inputs | None, raw: RawImages | None, network: nn.Module) -> Tensor:
    if images.dtype != torch.uint8 or (inputs is not None and inputs.dtype == torch.uint8):
        return prepared(images, inputs, network)
    known, shape = _known(inputs, raw)
    channels, *size = known.shape
    if images.ndim != 4 or images.shape[1] != channels or (known.resize == "none" and list(images.shape[2:]) != size):
        rest = "height, width" if known.resize != "none" else ", ".join(map(str, size))
        batch = " Add the batch's dimension: images.unsqueeze(0)." if images.ndim == 3 else ""
        raise DataError(
            f"Images of bytes to predict must have shape (batch, {channels}, {rest}), not {tuple(images.shape)}.{batch}"
        )
    if known.resize in ("files", "crop"):
        images = ImageFiles((), shape, resized_crop=known.resize == "crop").resized(images)
    return _normalised(images, known, shape, "An image of those to predict")


def _known(inputs: Inputs | None, raw: RawImages | None) -> tuple[RawImages, tuple[int, ...]]:
    if inputs is None or raw is None or raw.refused:
        reason = "its file does not say how raw images were prepared" if raw is None or inputs is None else raw.refused
        raise DataError(
            f"Raw images cannot be prepared as in training: {reason}. Give tensors (batch, *shape) as the loaders of "
            "the data module have them."
        )
    return raw, inputs.shape


def _normalised(pixels: Tensor, raw: RawImages, shape: tuple[int, ...], name: str) -> Tensor:
    """Bytes ``(batch, channels, height, width)`` to network inputs ``(batch, *shape)``."""
    if pixels.numel() and raw.highest < _FULL_RANGE and (most := int(pixels.max())) > raw.highest:
        raise DataError(
            f"{name} has the value {most}, and the images of training had values from 0 to {raw.highest}; scale it to "
            "that range."
        )
    mean, std = (pixels.new_tensor(part, dtype=torch.float32).view(-1, 1, 1) for part in (raw.mean, raw.std))
    images = pixels.float().sub_(mean).div_(std)
    return images if tuple(images.shape[1:]) == shape else bring_to(images, shape)
