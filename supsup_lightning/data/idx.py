"""Reader of idx files (MNIST and similar): unsigned bytes after a header with their dimensions."""

import struct
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from supsup_lightning.errors import DataError

_UNSIGNED_BYTES = 8


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """Return the array of an idx file, uint8. The file's size is checked against its header before it is read.

    Raises:
        DataError: a file that cannot be read, is of another kind, is empty, or differs in size from its header.
    """
    remedy = "Delete it and run again to download it, or copy it anew."
    right = bytes([0, 0, _UNSIGNED_BYTES, dimensions])
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != right:
                raise DataError(
                    f"The data file {path} is damaged, or of another kind: it begins with {magic.hex() or 'nothing'} "
                    f"where {right.hex()} is due. {remedy}"
                )
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            size, expected = path.stat().st_size, 4 + 4 * dimensions + prod(shape)
            if size != expected:
                raise DataError(
                    f"The data file {path} is damaged: {size} bytes where its header announces {expected}. {remedy}"
                )
            if not prod(shape):
                raise DataError(f"The data file {path} is empty: its header announces {' x '.join(map(str, shape))}.")
            return torch.from_numpy(np.fromfile(file, dtype=np.uint8).reshape(shape))
    except DataError:
        raise
    except (OSError, struct.error) as error:
        raise DataError(f"The data file {path} cannot be read ({error}); check data.root and the file.") from error
