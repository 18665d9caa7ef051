"""File format of finished tasks: a safetensors file, readable from any language.

Every method: ``tasks`` ``(tasks,)`` int64, ``statistics`` ``(tasks, statistics)`` float32 of normalisation layers,
``parameters.<name>`` for the network's parameters that no seed regrows, and the ``seed`` that regrows the others.
Mask bank: ``packed`` ``(masks, ceil(weights / 8))`` uint8, or the output of `entropy_coding.encode` if that takes fewer
bytes. ``standardisation`` ``(masks, 2)`` float32, where superfluous outputs learn transformed copies. Combinations of
masks, if there are any, as ``combinations.<name>`` (`Combinations`).
Hopfield memory: ``memory.triangle_<block>``, ``memory.total`` and ``memory.num_patterns`` (`HopfieldMemory.packed`).
Methods that train weights: ``values`` ``(tasks, values)`` float32, one row per task; ``trunk``, ``weights`` and
``shared_statistics``, which all tasks share.

``digests`` ``(2 + tasks, 8)`` uint8 names the task whose part is damaged (`checksums`). ``recipe`` uint8 is JSON,
compressed by zlib: all that it takes to predict without the run's code and configuration (`recipe.contents`).

The header's metadata holds the format, what identifies the network, the seed and the options, and the ``sha256`` of
all this and the tensors. The same contents make the same file, byte for byte.
"""

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from supsup_lightning.bank import checksums, entropy_coding
from supsup_lightning.bank.digests import digest
from supsup_lightning.errors import DataError, SaveError
from supsup_lightning.files import replacing

logger = logging.getLogger(__name__)

MASK_BANK = "supsup-mask-bank-1"
CODED_MASK_BANK = "supsup-mask-bank-2"
HOPFIELD_MEMORY = "supsup-hopfield-memory-1"
TRAINED_NETWORK = "supsup-trained-network-1"

_MOST_HEADER = 2**20  # bytes, about ten thousand tensors; a longer header takes seconds to read
_MOST_RECIPE = 2**22  # bytes of text; names of ten thousand tasks and their classes

# Larger elements first, so that every tensor is aligned to its element's size.
_DTYPES = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    file_format: str,
    identity: Mapping[str, str],
    mask_sizes: Sequence[int] = (),
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Write a file under a temporary name, then rename it: an interrupted write keeps the old file.

    Args:
        path: path of the file.
        tensors: tensors by name.
        file_format: one of the constants here.
        identity: text values that are compared when the file is read.
        mask_sizes: number of weights per layer, if ``packed`` holds masks over them.
        recipe: plain values that `read_recipe` returns.

    Raises:
        SaveError: too many tensors, or the file system refuses the file. The old file is kept.
    """
    contents = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    if mask_sizes and len(contents["packed"]):
        coded = entropy_coding.encode_if_smaller(contents["packed"], mask_sizes)
        if coded is not None:
            del contents["packed"]
            contents |= coded
            file_format = CODED_MASK_BANK
    if recipe is not None:
        contents["recipe"] = _compressed(recipe, path)
    contents[checksums.TABLE] = checksums.table_of(contents)
    # `checked_by` as well: without it, a damaged `sha256` key would look like an older file without a digest.
    metadata = {"format": file_format, "checked_by": "sha256", **identity}
    order = list(_DTYPES)
    contents = dict(sorted(contents.items(), key=lambda item: (order.index(item[1].dtype), item[0])))
    header, place = {"__metadata__": {**metadata, "sha256": _digest(metadata, contents)}}, 0
    for name, value in contents.items():
        ends = [place, place + value.nbytes]
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": ends}  # type: ignore[dict-item]
        place = ends[1]
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        raise SaveError(f"{path} cannot be written: {len(contents)} tensors are more than a file of this kind holds.")
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in contents.values():
            file.write(value.flatten().view(torch.uint8).numpy().data)


def read(
    path: str | Path, *, file_format: str, mask_sizes: Sequence[int] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the identity of a file.

    Args:
        path: path of the file.
        file_format: one of the constants here.
        mask_sizes: as for `write`; coded masks with other sizes raise an error before they are decoded.

    Raises:
        DataError: the file is missing, damaged or of another format.
    """
    tensors, identity = _checked(Path(path))
    tensors.pop("recipe", None)
    found = identity.pop("format")
    if found == CODED_MASK_BANK and file_format == MASK_BANK:
        try:
            coded = {name: tensors.pop(name) for name in ("coded", "coded_lengths", "ones", "layer_sizes")}
            if tensors["tasks"].numel() != len(coded["coded_lengths"]):
                raise ValueError("there are not as many coded masks as tasks")
            tensors["packed"] = entropy_coding.decode(**coded, sizes=mask_sizes)
        except (KeyError, ValueError) as error:
            raise DataError(f"The file {path} is damaged: {error}.") from error
        found = MASK_BANK
    if found != file_format:
        raise DataError(f"{path} is of format {found}, not {file_format}: it was made with another method.")
    return tensors, identity


class Contents(NamedTuple):
    """All that a file holds, as it is stored.

    Attributes:
        tensors: by name, masks coded where they are; without the recipe and the digests.
        file_format: one of the constants here.
        identity: text values.
        recipe: plain values; None if the file has none.
    """

    tensors: dict[str, Tensor]
    file_format: str
    identity: dict[str, str]
    recipe: dict[str, Any] | None


def read_contents(path: str | Path) -> Contents:
    """Read a file as it is stored; `write_contents` writes it again, byte for byte.

    Raises:
        DataError: the file is missing, damaged or of another format.
    """
    tensors, identity = _checked(Path(path))
    recipe = _unpacked(tensors.pop("recipe", None), path)
    return Contents(tensors, identity.pop("format"), identity, recipe)


def has_digest(path: str | Path) -> bool:
    """Whether a file has a SHA-256 of its contents; those of the first versions have none."""
    return "checked_by" in _open(Path(path))[1]


def write_contents(path: str | Path, contents: Contents) -> None:
    """Write what `read_contents` returned, or what was made of it. Raises `SaveError` as `write` does."""
    write(
        path,
        contents.tensors,
        file_format=contents.file_format,
        identity=contents.identity,
        recipe=contents.recipe,
    )


def read_recipe(path: str | Path) -> dict[str, Any] | None:
    """Read what `write` was given as ``recipe``; None if the file has none, as those of earlier versions.

    Raises:
        DataError: the file is missing, damaged or of another format.
    """
    return _unpacked(_checked(Path(path))[0].get("recipe"), path)


def _unpacked(stored: Tensor | None, path: str | Path) -> dict[str, Any] | None:
    if stored is None:
        return None
    try:
        if stored.dtype != torch.uint8 or stored.ndim != 1:
            raise ValueError("it is no text")
        unpacking = zlib.decompressobj()
        text = unpacking.decompress(stored.numpy().tobytes(), _MOST_RECIPE)
        if not unpacking.eof:
            raise ValueError("it ends too early, or is too long")
        recipe = json.loads(text)
        if not isinstance(recipe, dict):
            raise ValueError("it is no mapping")
    except (ValueError, RecursionError, zlib.error) as error:
        raise DataError(f"The file {path} is damaged: its recipe cannot be read ({error!s:.200}).") from error
    return recipe


def _compressed(recipe: Mapping[str, Any], path: str | Path) -> Tensor:
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > _MOST_RECIPE:
        raise SaveError(f"{path} cannot be written: a recipe of {len(text)} bytes is longer than such a file holds.")
    return torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)


def _checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of this package whose contents are what was written; without the digests."""
    tensors, identity = _open(path)
    expected = identity.pop("sha256", None)
    unchecked = expected is None and "checked_by" not in identity
    whole = unchecked or expected == _digest(identity, tensors)
    table = tensors.pop(checksums.TABLE, None)
    found = None if table is None else checksums.damaged(tensors, table)
    if found is not None:
        raise DataError(f"The file {path} is damaged: {found} is not what was written. Take a copy of it.")
    if not whole:
        raise DataError(f"The file {path} is damaged: its SHA-256 is not that of what was written. Take a copy of it.")
    if unchecked:
        logger.info("%s is of an older version, without a digest by which damage shows.", path)
    identity.pop("checked_by", None)
    if identity.get("format") not in (MASK_BANK, CODED_MASK_BANK, HOPFIELD_MEMORY, TRAINED_NETWORK):
        found = identity.get("format")
        raise DataError(f"{path} is no file that this package wrote (its format: {found!s:.60}).")
    return tensors, identity


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file."""
    try:
        with path.open("rb") as opened:
            if int.from_bytes(opened.read(8), "little") > _MOST_HEADER:
                raise ValueError("its header is too long, or it is no safetensors file")
        with safe_open(path, "pt") as file:  # checks all sizes against that of the file
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise DataError(f"The file {path} cannot be read: {error}.") from error


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return digest([dict(sorted(metadata.items())), dict(sorted(tensors.items()))])


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with ``prefix`` before their names."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, named without it.

    >>> import torch
    >>> under("a.", prefixed("a.", {"b": torch.tensor(1)}))
    {'b': tensor(1)}
    """
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
