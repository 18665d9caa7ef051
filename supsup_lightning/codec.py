"""The mask bank's file: a safetensors file, readable from any language.

Tensors ``packed`` ``(masks, ceil(weights / 8))`` uint8 and ``tasks`` ``(masks,)`` int64, and ``parameters.<name>``
for the network's own that no seed regrows; with normalisation layers also ``statistics`` ``(masks, statistics)``
float32. Where tasks are combinations of masks, their `Combinations` as ``combinations.<name>``. The header's metadata
holds what identifies the network, the seed and the mask rule.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from supsup_lightning.combinations import Combinations
from supsup_lightning.errors import DataError
from supsup_lightning.files import replacing

FORMAT = "supsup-mask-bank-1"


class StoredBank(NamedTuple):
    """What a bank file holds: the states of a `MaskBank` and of `Combinations`, and what they belong to."""

    bank: dict[str, Tensor]
    combinations: dict[str, Tensor]
    identity: dict[str, str]
    parameters: dict[str, Tensor]


def write(
    path: str | Path,
    *,
    bank: Mapping[str, Tensor],
    combinations: Mapping[str, Tensor],
    identity: Mapping[str, str],
    parameters: Mapping[str, Tensor],
) -> None:
    """Write a bank, under a temporary name first: a kill leaves the former file or the new one, never a part."""
    tensors = {name: value for name, value in bank.items() if name != "statistics" or value.shape[1]}
    tensors |= {f"parameters.{name}": value for name, value in parameters.items()}
    if len(combinations["tasks"]):
        tensors |= {f"combinations.{name}": value for name, value in combinations.items()}
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
    bank = {name: tensors[name] for name in ("packed", "tasks")}
    bank["statistics"] = tensors.get("statistics", torch.empty(len(bank["tasks"]), 0))
    combinations = _under("combinations.", tensors) or Combinations(bank["statistics"].shape[1]).state_dict()
    return StoredBank(bank, combinations, metadata, _under("parameters.", tensors))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
