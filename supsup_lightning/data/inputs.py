"""What a network was trained on, to see that images to infer are of that kind."""

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
        shape: of one input.
        dtype: of inputs.
        normalisation: mean and standard deviation, ``(channels, 1, 1)`` each, of bytes; None where bytes are not how
            the data lie, or where more is done to them than to normalise (a permutation, say).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    normalisation: tuple[Tensor, Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        name = str(self.dtype).removeprefix("torch.")
        return {"shape": self.shape, "dtype": name, "normalisation": self.normalisation}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Inputs":
        """From a checkpoint."""
        return cls(tuple(state["shape"]), getattr(torch, state["dtype"]), state["normalisation"])


def prepared(images: Any, inputs: Inputs | None, network: nn.Module) -> Tensor:
    """Images ``(batch, *shape)`` as the network takes them: bytes normalised where that is all, others as they are.

    Args:
        images: to infer.
        inputs: what the network was trained on; None where that is not known, as in checkpoints of former versions.
        network: for the type of its parameters.

    Raises:
        DataError: no tensor, or one of another type or shape; or a NaN or infinite value.
    """
    if not isinstance(images, Tensor):
        raise DataError(f"Images to infer have to be a tensor (batch, *shape), not {type(images).__name__}.")
    if inputs is not None:
        if tuple(images.shape[1:]) != inputs.shape and inputs.dtype.is_floating_point:  # tokens may be any number
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
    if inputs.dtype.is_floating_point and images.dtype in own:  # as precision plugins make them
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
