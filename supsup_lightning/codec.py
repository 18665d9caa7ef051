"""The file of what was learned: a safetensors file, readable from any language.

Of any method: ``tasks`` ``(tasks,)`` int64, ``statistics`` ``(tasks, statistics)`` float32 of normalisation layers,
``parameters.<name>`` for the network's own that no seed regrows, and the ``seed`` that regrows the others.
Of a mask bank: ``packed`` ``(masks, ceil(weights / 8))`` uint8, or, where that takes fewer bytes, what
`entropy_coding.encode` makes of it. Where tasks are combinations of masks, their `Combinations` as
``combinations.<name>``.
Of a Hopfield memory: ``memory.triangle_<block>``, ``memory.total`` and ``memory.num_patterns``, as
`HopfieldMemory.packed` has them.
Of methods that train: ``values`` ``(tasks, values)`` float32, a task's own; ``trunk``, ``weights`` and
``shared_statistics``, those of all tasks.

The header's metadata holds the format, and what identifies the network, the seed and the options.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from supsup_lightning import entropy_coding
from supsup_lightning.errors import DataError
from supsup_lightning.files import replacing

MASK_BANK = "supsup-mask-bank-1"
CODED_MASK_BANK = "supsup-mask-bank-2"
HOPFIELD_MEMORY = "supsup-hopfield-memory-1"
TRAINED_NETWORK = "supsup-trained-network-1"


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    file_format: str,
    identity: Mapping[str, str],
    mask_sizes: Sequence[int] = (),
) -> None:
    """Write a file, under a temporary name first: a kill leaves the former file or the new one, never a part.

    Args:
        path: of the file.
        tensors: by name.
        file_format: one of the constants here.
        identity: what has to agree when the file is read.
        mask_sizes: weights of each layer, where ``packed`` holds masks over them.
    """
    contents = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    if mask_sizes and len(contents["packed"]):
        coded = entropy_coding.encode(contents["packed"], mask_sizes)
        if sum(value.nbytes for value in coded.values()) < contents["packed"].nbytes:
            del contents["packed"]
            contents |= coded
            file_format = CODED_MASK_BANK
    with replacing(path) as temporary:
        temporary.write_bytes(save(contents, metadata={"format": file_format, **identity}))


def read(path: str | Path, *, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and identity. Raises `DataError` where the file is missing, damaged or of another format."""
    try:
        with safe_open(path, "pt") as file:
            identity = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise DataError(f"The file {path} cannot be read: {error}.") from error
    found = identity.pop("format", None)
    if found not in (MASK_BANK, CODED_MASK_BANK, HOPFIELD_MEMORY, TRAINED_NETWORK):
        raise DataError(f"{path} is no file that this package wrote (its format: {found}).")
    if found == CODED_MASK_BANK:
        coded = {name: tensors.pop(name) for name in ("coded", "coded_lengths", "ones", "layer_sizes")}
        tensors["packed"] = entropy_coding.decode(**coded)
        found = MASK_BANK
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
