"""What W&B has on disk of a run: W&B offers no reader for its files, and a killed process loses its last seconds."""

import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# LevelDB's log format: a header of the file, then blocks that hold records, whole or in pieces.
_FILE_HEADER, _BLOCK = 7, 32768
_PIECE = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _LAST = 1, 4


def history(paths: list[Path]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the step and the logged values, as JSON by name, of each row of a run's history, in the order of the files.

    What a killed process left incomplete at the end of a file is left out, and so is a file that cannot be read.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    new_record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]
    for path in paths:
        try:
            for content in _records(path.read_bytes()):
                record = new_record.FromString(content)
                if record.HasField("history"):
                    values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                    yield record.history.step.num, values
        except (OSError, DecodeError) as error:
            logger.warning("%s cannot be read to its end (%s): what it holds may be logged again.", path, error)


def _records(data: bytes) -> Iterator[bytes]:
    place, pieces = _FILE_HEADER, b""
    while place + _PIECE.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _PIECE.size:  # filled up with zeros
            place += left
            continue
        _, length, kind = _PIECE.unpack_from(data, place)
        place += _PIECE.size
        if place + length > len(data):
            return
        pieces += data[place : place + length]
        place += length
        if kind in (_WHOLE, _LAST):
            yield pieces
            pieces = b""
