"""The mask bank's file: a safetensors file, readable from any language.

Tensors ``packed`` ``(masks, ceil(weights / 8))`` uint8 and ``tasks`` ``(masks,)`` int64, and ``parameters.<name>``
for the network's own that no seed regrows; with normalisation layers also ``statistics`` ``(masks, statistics)``
float32. The header's metadata holds what identifies the network, the seed and the mask rule.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from supsup_lightning.errors import DataError
from supsup_lightning.files import replacing

FORMAT = "supsup-mask-bank-1"


class StoredBank(NamedTuple):
    """What a bank file holds."""

    packed: Tensor
    tasks: Tensor
    statistics: Tensor
    identity: dict[str, str]
    parameters: dict[str, Tensor]


def write(
    path: str | Path,
    *,
    packed: Tensor,
    tasks: Tensor,
    statistics: Tensor,
    identity: Mapping[str, str],
    parameters: Mapping[str, Tensor],
) -> None:
    """Write a bank, under a temporary name first: a kill leaves the former file or the new one, never a part."""
    tensors = {"packed": packed, "tasks": tasks, **{f"parameters.{name}": value for name, value in parameters.items()}}
    if statistics.shape[1]:
        tensors["statistics"] = statistics
    with replacing(path) as temporary:
        contents = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        temporary.write_bytes(save(contents, metadata={"format": FORMAT, **identity}))


def read(path: str | Path) -> StoredBank:
    """Read a bank. Raises `DataError` where the file is missing, damaged or of another format."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise DataError(f"The mask bank {path} cannot be read: {error}.") from error
    if metadata.pop("format", None) != FORMAT:
        raise DataError(f"{path} is not a mask bank of format {FORMAT}.")
    prefix = "parameters."
    parameters = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    packed, tasks = tensors["packed"], tensors["tasks"]
    statistics = tensors.get("statistics", torch.empty(len(tasks), 0))
    return StoredBank(packed, tasks, statistics, metadata, parameters)
