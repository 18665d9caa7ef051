"""Kind of inputs that a network was trained on, and the check that images to infer are of that kind."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from supsup_lightning.data.values import check_numbers
from supsup_lightning.errors import DataError

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Inputs:
    """Shape, type and normalisation of the inputs that a network was trained on.

    Attributes:
        shape: shape of one input; not compared for integer inputs, as sequences of tokens may have any length.
        dtype: type of the inputs.
        normalisation: mean and standard deviation of bytes, ``(channels, 1, 1)`` each. None if the data are not stored
            as bytes, or if more is done to them than to normalise (a permutation, say).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    normalisation: tuple[Tensor, Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """Return the state as a dict, to save in a checkpoint."""
        name = str(self.dtype).removeprefix("torch.")
        return {"shape": self.shape, "dtype": name, "normalisation": self.normalisation}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Inputs":
        """Make the inputs from the state of a checkpoint."""
        return cls(tuple(state["shape"]), getattr(torch, state["dtype"]), state["normalisation"])


def prepared(images: Any, inputs: Inputs | None, network: nn.Module) -> Tensor:
    """Return images ``(batch, *shape)`` as network inputs. Bytes are normalised if training did only that.

    Args:
        images: images to infer.
        inputs: what the network was trained on; None if that is not known, as in checkpoints of older versions.
        network: the network; the type of its parameters is accepted, too.

    Raises:
        DataError: no tensor, or one of another type or shape; or a NaN or infinite value.
    """
    if not isinstance(images, Tensor):
        raise DataError(f"Images to infer have to be a tensor (batch, *shape), not {type(images).__name__}.")
    if inputs is not None:
        if tuple(images.shape[1:]) != inputs.shape and inputs.dtype.is_floating_point:  # token sequences vary
            batch = " Add the batch's dimension: images.unsqueeze(0)." if tuple(images.shape) == inputs.shape else ""
            expected = ", ".join(("batch", *map(str, inputs.shape)))
            raise DataError(f"Images to infer must have shape ({expected}), not {tuple(images.shape)}.{batch}")
        images = _of_type(images, inputs, network)
    check_numbers(images, "Image {} of those to infer".format)
    return images


def _of_type(images: Tensor, inputs: Inputs, network: nn.Module) -> Tensor:
    if images.dtype == inputs.dtype:
        return images
    own = {parameter.dtype for parameter in network.parameters()} & {inputs.dtype, torch.float64, *_HALF}
    if inputs.dtype.is_floating_point and images.dtype in own:  # precision plugins convert images to it
        return images
    if inputs.dtype.is_floating_point and images.dtype in _HALF:
        return images.to(inputs.dtype)
    if images.dtype == torch.uint8 and inputs.normalisation is not None:
        mean, std = (part.to(images.device) for part in inputs.normalisation)
        return images.float().sub_(mean).div_(std)
    if images.dtype == torch.uint8:
        raise DataError(
            f"Images to infer are bytes (uint8), and the network was trained on {inputs.dtype} that the data module "
            "makes of images in a way that it does not do again here: take images from one of its loaders, or prepare "
            "them in the same way."
        )
    raise DataError(
        f"Images to infer are {images.dtype}, and the network was trained on {inputs.dtype}: images.to({inputs.dtype})."
    )
