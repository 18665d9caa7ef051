"""The file of what was learned: a safetensors file, readable from any language.

Of a mask bank: tensors ``packed`` ``(masks, ceil(weights / 8))`` uint8 and ``tasks`` ``(masks,)`` int64, and
``parameters.<name>`` for the network's own that no seed regrows; with normalisation layers also ``statistics``
``(masks, statistics)`` float32. Where tasks are combinations of masks, their `Combinations` as ``combinations.<name>``.
Of a Hopfield memory: ``memory.triangle_<block>``, ``memory.total`` and ``memory.num_patterns``, as
`HopfieldMemory.packed` has them.

The header's metadata holds the format, and what identifies the network, the seed and the options.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from supsup_lightning.errors import DataError
from supsup_lightning.files import replacing

MASK_BANK = "supsup-mask-bank-1"
HOPFIELD_MEMORY = "supsup-hopfield-memory-1"


def write(path: str | Path, tensors: Mapping[str, Tensor], *, file_format: str, identity: Mapping[str, str]) -> None:
    """Write a file, under a temporary name first: a kill leaves the former file or the new one, never a part."""
    with replacing(path) as temporary:
        contents = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        temporary.write_bytes(save(contents, metadata={"format": file_format, **identity}))


def read(path: str | Path, *, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and identity. Raises `DataError` where the file is missing, damaged or of another format."""
    try:
        with safe_open(path, "pt") as file:
            identity = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise DataError(f"The mask bank {path} cannot be read: {error}.") from error
    found = identity.pop("format", None)
    if found not in (MASK_BANK, HOPFIELD_MEMORY):
        raise DataError(f"{path} is no file that this package wrote (its format: {found}).")
    if found != file_format:
        raise DataError(f"{path} is of format {found}, not {file_format}: it was made with another method.")
    return tensors, identity


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each under ``prefix`` and its name."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those under ``prefix``, by the rest of their names.

    >>> import torch
    >>> under("a.", prefixed("a.", {"b": torch.tensor(1)}))
    {'b': tensor(1)}
    """
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
