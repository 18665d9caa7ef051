"""Triton kernels for products over packed bits on a GPU; bits are read once, as bytes, and not unpacked to memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Masks, and bytes of each, that a program of `dot` holds at a time; and bytes of a mask that one program processes.
_MASKS, _BYTES, _STRETCH = 16, 128, 2048
# The same for `weighted_sum`, whose programs process all masks.
_SUM_MASKS, _SUM_BYTES = 32, 64


@triton.jit
def _dot_kernel(
    packed, vectors, partial, masks, num_bytes, stretch, MASKS: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """Write ``partial[vector, part, mask]``, the inner products over one stretch of bytes each."""
    mask = tl.program_id(0) * MASKS + tl.arange(0, MASKS)
    part, vector = tl.program_id(1), tl.program_id(2)
    rows = packed + mask.to(tl.int64)[:, None] * num_bytes
    values = vectors + vector.to(tl.int64) * num_bytes * 8
    sums = tl.zeros((MASKS, BYTES), tl.float32)
    for first in range(0, stretch, BYTES):
        byte = part * stretch + first + tl.arange(0, BYTES)
        inside = byte < num_bytes
        tile = tl.load(rows + byte[None, :], mask=(mask < masks)[:, None] & inside[None, :], other=0).to(tl.int32)
        for bit in tl.static_range(8):
            value = tl.load(values + 8 * byte + bit, mask=inside, other=0.0)
            sums += tl.where((tile >> bit) & 1 != 0, value[None, :], 0.0)
    out = (vector * tl.num_programs(1) + part).to(tl.int64) * masks
    tl.store(partial + out + mask, tl.sum(sums, axis=1), mask=mask < masks)


@triton.jit
def _weighted_sum_kernel(packed, coefficients, total, masks, num_bytes, MASKS: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    inside = byte < num_bytes
    sums = tl.zeros((BYTES, 8), tl.float32)
    for first in range(0, masks, MASKS):
        mask = first + tl.arange(0, MASKS)
        coefficient = tl.load(coefficients + mask, mask=mask < masks, other=0.0)
        rows = packed + mask.to(tl.int64)[:, None] * num_bytes
        tile = tl.load(rows + byte[None, :], mask=(mask < masks)[:, None] & inside[None, :], other=0).to(tl.int32)
        is_on = (tile[:, :, None] >> bit[None, None, :]) & 1 != 0
        sums += tl.sum(tl.where(is_on, coefficient[:, None, None], 0.0), axis=0)
    tl.store(total + 8 * byte[:, None] + bit[None, :], sums, mask=inside[:, None])


def dot(packed: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of masks ``(masks, bytes)`` uint8 and ``(vectors, 8 * bytes)`` float32: ``(vectors, masks)``."""
    packed, vectors = packed.contiguous(), vectors.contiguous()
    masks, num_bytes = packed.shape
    parts = triton.cdiv(num_bytes, _STRETCH)
    partial = torch.empty(len(vectors), parts, masks, dtype=torch.float32, device=packed.device)
    if partial.numel():
        grid = (triton.cdiv(masks, _MASKS), parts, len(vectors))
        with torch.cuda.device_of(packed):
            _dot_kernel[grid](packed, vectors, partial, masks, num_bytes, _STRETCH, MASKS=_MASKS, BYTES=_BYTES)
    return partial.sum(1, dtype=torch.float64).float()  # a fixed order of sums, whatever the order of programs


def weighted_sum(packed: Tensor, coefficients: Tensor) -> Tensor:
    """Sum of masks ``(masks, bytes)`` uint8 with coefficients ``(masks,)`` float32: ``(8 * bytes,)`` float32."""
    packed, coefficients = packed.contiguous(), coefficients.contiguous()
    masks, num_bytes = packed.shape
    total = torch.empty(8 * num_bytes, dtype=torch.float32, device=packed.device)
    if num_bytes:
        grid = (triton.cdiv(num_bytes, _SUM_BYTES),)
        with torch.cuda.device_of(packed):
            _weighted_sum_kernel[grid](
                packed, coefficients, total, masks, num_bytes, MASKS=_SUM_MASKS, BYTES=_SUM_BYTES
            )
    return total


def check(device: torch.device | str) -> None:
    """Raise `RuntimeError` if the kernels' results on this device differ from sums over unpacked masks."""
    # No random numbers, as the first use may be within `torch.func.vmap`.
    masks, num_bytes = 37, 2 * _STRETCH + 5
    packed = (torch.arange(masks * num_bytes, device=device) * 2654435761 >> 7).to(torch.uint8).view(masks, num_bytes)
    vectors = torch.arange(16 * num_bytes, device=device).float().sin().view(2, -1)
    coefficients = torch.arange(masks, device=device).float().cos()
    unpacked = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=device) & 1).flatten(1).double()
    for name, own, expected in (
        ("dot", dot(packed, vectors), vectors.double() @ unpacked.T),
        ("weighted_sum", weighted_sum(packed, coefficients), coefficients.double() @ unpacked),
    ):
        error = (own.double() - expected).abs().max().item()
        if not error < 1e-2:
            raise RuntimeError(f"{name} is off by {error}")
