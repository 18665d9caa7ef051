"""Packed bits: eight weights of a mask in one byte, and the products of masks that inference needs.

Bit ``j`` of byte ``b`` is weight ``8 b + j``. Rows are masks. The products read packed bits directly, in C on the CPU
and in Triton on a GPU (`native`). On other devices, or without a kernel, they unpack one small tile of the bank after
another, so that memory does not grow with the number of masks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from supsup_lightning import native

# A tile's float copy is 4 times its packed bytes and should stay in a core's cache; on an accelerator, a larger
# tile is needed to fill the device.
_TILE_BYTES_CPU = 2**18
_TILE_BYTES_ACCELERATOR = 2**25
# On a GPU, inner products with more vectors than this are matrix products of unpacked tiles.
_FEW_VECTORS = 4


def pack(mask: Tensor) -> Tensor:
    """Pack bools ``(..., weights)`` into bytes ``(..., ceil(weights / 8))`` uint8; spare bits of the last byte are 0.

    >>> pack(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist()
    [9, 1]
    """
    mask = mask.to(torch.uint8)
    spare = -mask.shape[-1] % 8
    octets = torch.nn.functional.pad(mask, (0, spare)).unflatten(-1, (-1, 8))  # (..., bytes, 8)
    packed = octets[..., 0].clone()
    for bit in range(1, 8):
        packed |= octets[..., bit] << bit
    return packed


def unpack(packed: Tensor, num_weights: int) -> Tensor:
    """Unpack bytes ``(..., ceil(weights / 8))`` to bools ``(..., weights)``.

    >>> unpack(torch.tensor([9, 1], dtype=torch.uint8), 9).int().tolist()
    [1, 0, 0, 1, 0, 0, 0, 0, 1]
    """
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1).flatten(-2)[..., :num_weights].bool()


def dot(packed: Tensor, vector: Tensor) -> Tensor:
    """Inner product of each mask with a vector, for example the gradient by each task's coefficient.

    Args:
        packed: ``(masks, ceil(weights / 8))`` uint8.
        vector: ``(weights,)`` float32, or several as ``(vectors, weights)``.

    Returns:
        ``(masks,)`` float32, or ``(vectors, masks)``.

    >>> dot(pack(torch.tensor([[True, False, True], [False, True, False]])), torch.tensor([1.0, 10.0, 100.0]))
    tensor([101.,  10.])
    """
    _check(packed, vector.shape[-1])
    vectors = vector.reshape(-1, vector.shape[-1])
    padded = _padded(vectors)
    if native.takes(packed, padded):
        products = native.dot(packed, padded)
    elif len(vectors) <= _FEW_VECTORS and native.takes_on_gpu(packed, padded):
        products = native.gpu_kernels().dot(packed, padded)
    else:
        products = dot_in_tiles(packed, padded)
    return products.reshape(*vector.shape[:-1], len(packed))


def dot_in_tiles(packed: Tensor, vectors: Tensor) -> Tensor:
    """`dot` in PyTorch: ``(masks, bytes)`` uint8 and ``(vectors, 8 * bytes)`` to ``(vectors, masks)``."""
    masks, num_bytes = packed.shape
    planes = vectors.view(-1, num_bytes, 8).permute(2, 1, 0).contiguous()  # (8, bytes, vectors)
    products = vectors.new_zeros(masks, len(vectors))
    for rows, tile in _tiles(packed, products):
        for bit in range(8):
            rows.addmm_((tile >> bit & 1).to(vectors.dtype), planes[bit])
    return products.T


def weighted_sum(packed: Tensor, coefficients: Tensor, num_weights: int) -> Tensor:
    """Superposition of the masks, ``sum_i a_i M_i``.

    Args:
        packed: ``(masks, ceil(weights / 8))`` uint8.
        coefficients: ``(masks,)`` float32.
        num_weights: number of masked weights; the spare bits of the last byte are dropped.

    Returns:
        ``(weights,)`` float32.

    >>> weighted_sum(pack(torch.tensor([[True, False], [True, True]])), torch.tensor([0.25, 0.5]), 2)
    tensor([0.7500, 0.5000])
    """
    _check(packed, num_weights)
    if native.takes(packed, coefficients):
        return native.weighted_sum(packed, coefficients)[:num_weights]
    if not torch._C._functorch.is_functorch_wrapped_tensor(coefficients):
        rows = coefficients.nonzero().flatten()  # masks with a coefficient of 0 are not read
        if len(rows) < len(packed):
            packed, coefficients = packed[rows], coefficients[rows]
    if native.takes_on_gpu(packed, coefficients):
        return native.gpu_kernels().weighted_sum(packed, coefficients)[:num_weights]
    planes = coefficients.new_zeros(8, packed.shape[1])  # (8, bytes)
    for coefficient, tile in _tiles(packed, coefficients):
        for bit in range(8):
            planes[bit] += coefficient @ (tile >> bit & 1).to(coefficients.dtype)
    return planes.T.reshape(-1)[:num_weights]


def select(packed: Tensor, vector: Tensor) -> Tensor:
    """Return the vector where each mask is on, 0 elsewhere.

    Args:
        packed: ``(masks, ceil(weights / 8))`` uint8.
        vector: ``(weights,)`` float32.

    Returns:
        ``(masks, weights)`` float32.

    >>> select(pack(torch.tensor([[True, False, True]])), torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 0., 3.]])
    """
    _check(packed, len(vector))
    padded = _padded(vector)
    if native.takes(packed, padded):
        return native.select(packed, padded)[:, : len(vector)]
    return unpack(packed, len(vector)) * vector


def _padded(vectors: Tensor) -> Tensor:
    """Pad ``(..., weights)`` with zeros to a multiple of 8 weights."""
    spare = -vectors.shape[-1] % 8
    return torch.nn.functional.pad(vectors, (0, spare)) if spare else vectors


def _tiles(packed: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return pairs of blocks of rows: rows of ``other``, and the same rows of ``packed``."""
    size = _TILE_BYTES_CPU if packed.device.type == "cpu" else _TILE_BYTES_ACCELERATOR
    rows = max(1, size // packed.shape[1])
    return zip(other.split(rows), packed.split(rows), strict=True)


def _check(packed: Tensor, num_weights: int) -> None:
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] != -(-num_weights // 8):
        raise ValueError(
            f"packed must be uint8 of shape (masks, {-(-num_weights // 8)}) for {num_weights} weights; "
            f"got {packed.dtype} of shape {tuple(packed.shape)}."
        )
