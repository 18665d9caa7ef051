"""Digest over many tensors, by which damage to a file or a checkpoint is found."""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256 over a tree of mappings, sequences, tensors, numbers and text, with names, types and shapes.

    Any other object counts by the name of its type alone.

    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)})
    True
    >>> digest({"a": torch.zeros(2)}) == digest({"b": torch.zeros(2)})
    False
    """
    hashed = hashlib.sha256()
    _add(hashed, value, {})
    return hashed.hexdigest()


def _add(hashed: Any, value: Any, known: dict[int, tuple[Any, bytes]]) -> None:
    """Hash each collection once: nested ones that repeat the same collection would take exponential time."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        hashed.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, (Mapping, list, tuple)):
        if id(value) not in known:
            parts: Iterable[Any] = chain(*value.items()) if isinstance(value, Mapping) else value
            name = "mapping" if isinstance(value, Mapping) else "sequence"
            inside = hashlib.sha256(f"{name} {len(value)};".encode())
            for part in parts:
                _add(inside, part, known)
            known[id(value)] = value, inside.digest()  # the value as well: Python reuses the ids of deleted objects
        hashed.update(known[id(value)][1])
    elif isinstance(value, str):
        hashed.update(f"text {len(value)} {value};".encode(errors="surrogatepass"))
    elif isinstance(value, (int, float)):  # 1, 1.0 and True differ; a NumPy number equals its Python value
        kind = next(kind for kind in (bool, int, float) if isinstance(value, kind))
        hashed.update(f"{kind.__name__} {kind(value)!r};".encode())
    else:
        hashed.update(f"{type(value).__name__};".encode())
