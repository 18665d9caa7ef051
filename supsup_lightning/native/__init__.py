"""Kernels for products over packed bits: C on a CPU, if a compiler was present at installation; Triton on a GPU."""

import ctypes
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from supsup_lightning.native.build import library_path

logger = logging.getLogger(__name__)

LEVELS = ("portable", "avx2", "avx512")

# Below this number of packed bytes (about a millisecond of work) a thread costs more than it saves.
_BYTES_PER_THREAD = 2**23
# Number of rows that the kernel adds up at a time. Threads take whole groups, so that sums do not depend on threads.
_ROWS_TOGETHER = 16
_PARTS_PER_THREAD = 8
_CACHE_LINE = 64  # bytes; a thread of the weighted sum takes whole cache lines


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernel; None, with a warning the first time, if it was not built."""
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:
        logger.warning(
            "The C kernel for packed bits is not there (%s), so products over masks run in PyTorch, several times "
            "slower. Install a C compiler, then this package again.",
            path.name,
        )
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    loaded.packed_dot.argtypes = [ctypes.c_int, pointer, size, size, pointer, pointer]
    loaded.packed_weighted_sum.argtypes = [ctypes.c_int, pointer, size, size, size, size, pointer, pointer]
    loaded.packed_select.argtypes = [ctypes.c_int, pointer, size, size, size, pointer, pointer]
    loaded.packed_dot.restype = loaded.packed_weighted_sum.restype = loaded.packed_select.restype = None
    return loaded


def takes(*tensors: Tensor) -> bool:
    """Whether the C kernel accepts these tensors: plain CPU tensors outside of transforms and autograd graphs."""
    return _are_plain(tensors, "cpu") and library() is not None


def takes_on_gpu(*tensors: Tensor) -> bool:
    """Whether Triton's kernels accept these tensors: plain CUDA tensors outside of transforms and autograd graphs."""
    return _are_plain(tensors, "cuda") and gpu_kernels() is not None


@cache
def gpu_kernels() -> Any:
    """Import `triton_kernels` and test them on the device; None, with a warning the first time, if they fail."""
    try:
        from supsup_lightning.native import triton_kernels

        triton_kernels.check("cuda")
    except Exception as error:  # Triton, its compiler or the driver may raise any error; PyTorch takes over
        logger.warning("Triton's kernels for packed bits do not work here (%r), so PyTorch's own are used.", error)
        return None
    return triton_kernels


def _are_plain(tensors: Sequence[Tensor], device: str) -> bool:
    return all(
        tensor.device.type == device
        and tensor.dtype in (torch.float32, torch.uint8)
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
    )


def best_level() -> int:
    """Index in `LEVELS` of the best instruction set that this processor supports."""
    loaded = library()
    assert loaded is not None
    return loaded.packed_best_level()


def dot(packed: Tensor, vectors: Tensor, *, level: int | None = None) -> Tensor:
    """Inner products of masks ``(masks, bytes)`` uint8 and ``(vectors, 8 * bytes)`` float32: ``(vectors, masks)``."""
    loaded = library()
    assert loaded is not None
    level = best_level() if level is None else level
    packed, vectors = packed.contiguous(), vectors.contiguous()
    masks, num_bytes = packed.shape
    sums = torch.empty(len(vectors), masks, dtype=torch.float64)

    def some(first: int, last: int) -> None:
        for vector, row in zip(vectors, sums, strict=True):
            loaded.packed_dot(
                level,
                packed.data_ptr() + first * num_bytes,
                last - first,
                num_bytes,
                vector.data_ptr(),
                row.data_ptr() + first * sums.itemsize,
            )

    _in_threads(some, masks, unit=_ROWS_TOGETHER, work=packed.numel() * len(vectors))
    return sums.float()


def weighted_sum(packed: Tensor, coefficients: Tensor, *, level: int | None = None) -> Tensor:
    """Sum of masks ``(masks, bytes)`` uint8 with coefficients ``(masks,)`` float32: ``(8 * bytes,)`` float32."""
    loaded = library()
    assert loaded is not None
    level = best_level() if level is None else level
    packed, coefficients = packed.contiguous(), coefficients.contiguous()
    masks, num_bytes = packed.shape
    total = torch.empty(8 * num_bytes, dtype=torch.float32)
    call = partial(loaded.packed_weighted_sum, level, packed.data_ptr(), masks, num_bytes)

    def some(first: int, last: int) -> None:
        call(first, last, coefficients.data_ptr(), total.data_ptr())

    _in_threads(some, num_bytes, unit=_CACHE_LINE, work=packed.numel())
    return total


def select(packed: Tensor, vector: Tensor, *, level: int | None = None) -> Tensor:
    """Masked copies of a vector: ``(masks, bytes)`` uint8 and ``(8 * bytes,)`` float32 to ``(masks, 8 * bytes)``."""
    loaded = library()
    assert loaded is not None
    level = best_level() if level is None else level
    vector = vector.contiguous()
    packed = packed if packed.stride(1) == 1 else packed.contiguous()  # rows may be strided
    masks, num_bytes = packed.shape
    selected = torch.empty(masks, len(vector), dtype=torch.float32)
    stride = packed.stride(0)

    def some(first: int, last: int) -> None:
        loaded.packed_select(
            level,
            packed.data_ptr() + first * stride,
            stride,
            last - first,
            num_bytes,
            vector.data_ptr(),
            selected.data_ptr() + first * selected.stride(0) * selected.itemsize,
        )

    _in_threads(some, masks, unit=1, work=packed.numel())
    return selected


def _in_threads(some: Callable[[int, int], None], size: int, *, unit: int, work: int) -> None:
    """Call ``some(first, last)`` for parts of ``range(size)`` in whole units, in parallel threads.

    ctypes releases the lock of the interpreter. The calling thread works as well. Each thread takes the next part when
    it has finished one, because PyTorch's own threads keep a core busy for a while after their work.
    """
    threads = max(1, min(torch.get_num_threads(), work // _BYTES_PER_THREAD))
    if threads == 1:
        some(0, size)
        return
    share = -(-size // (threads * _PARTS_PER_THREAD * unit)) * unit
    parts = iter([(first, min(first + share, size)) for first in range(0, size, share)])

    def work_on() -> None:
        for part in parts:  # threads share this iterator
            some(*part)

    helpers = [_pool(threads - 1).submit(work_on) for _ in range(threads - 1)]
    work_on()
    for helper in helpers:
        helper.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="packed_bits")
