"""Products over packed masks beside the same products over float32 masks, and beside reading the bits once.

    python benchmarks/packed_bits.py [--masks 2500] [--weights 315200] [--rounds 7] [--json results.json]

The inner products of one gradient with all masks are what finding a task costs beside one forward and one backward
pass. All are timed in turns in one run and the median is taken. Dense float32 masks of the usual size take 3.2 GB.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from supsup_lightning import MaskBank, bits, native

TARGETS = {
    "dot / dense float32": 1 / 4,
    "dot / reading the bytes once": 4,
    "packed bytes / dense bytes": 1 / 30,
    "bank in memory / bits": 1.05,
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VECTORS = 16  # gradients at once, where each image finds its own task


def by_matrix_product(packed: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """The inner products of all masks with several vectors as float32 matrix products of unpacked tiles."""
    products = torch.zeros(len(packed), len(vectors))
    for first in range(0, packed.shape[1], 2048):
        columns = packed[:, first : first + 2048]
        ones, part = torch.ones(8 * columns.shape[1]), vectors[:, 8 * first : 8 * (first + 2048)].T.contiguous()
        for rows, tile in zip(products.split(128), columns.split(128), strict=True):
            rows.addmm_(native.select(tile, ones), part)
    return products.T


def medians(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):  # the first warms up
        for name, task in tasks.items():
            started = perf_counter()
            task()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(1000 * (perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(num_masks: int, num_weights: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, and the ratios of `TARGETS`."""
    draw = torch.Generator().manual_seed(0)
    num_bytes = -(-num_weights // 8)
    packed = torch.randint(256, (num_masks, num_bytes), generator=draw, dtype=torch.uint8)
    vector = torch.randn(8 * num_bytes, generator=draw)
    vectors = torch.randn(VECTORS, 8 * num_bytes, generator=draw)
    coefficients = torch.full((num_masks,), 1 / num_masks)
    packed, vector, vectors, coefficients = (part.to(DEVICE) for part in (packed, vector, vectors, coefficients))
    dense = torch.empty(num_masks, 8 * num_bytes, device=DEVICE)
    for row in range(num_masks):
        dense[row] = bits.unpack(packed[row], 8 * num_bytes)
    tasks: dict[str, Callable[[], object]] = {
        "reading the bytes once": lambda: packed.view(-1)[: packed.numel() // 8 * 8].view(torch.int64).sum(),
        "dense float32": lambda: dense @ vector,
        "dense float32, weighted sum": lambda: coefficients @ dense,
        "dot": lambda: bits.dot(packed, vector),
        "weighted sum": lambda: bits.weighted_sum(packed, coefficients, num_weights),
        "dot in PyTorch": lambda: bits.dot_in_tiles(packed, vector.view(1, -1)),
        f"{VECTORS} dots": lambda: bits.dot(packed, vectors),
    }
    if native.takes(packed, vector):
        tasks[f"{VECTORS} dots by matrix product"] = lambda: by_matrix_product(packed, vectors)
    for level in range(native.best_level() + 1) if native.takes(packed, vector) else ():
        tasks[f"dot, {native.LEVELS[level]}"] = lambda level=level: native.dot(packed, vector.view(1, -1), level=level)
    milliseconds = medians(tasks, rounds)
    torch.testing.assert_close(bits.dot(packed, vector), dense @ vector, rtol=1e-3, atol=0.05)
    of_tiles = bits.dot_in_tiles(packed, vectors)
    torch.testing.assert_close(bits.dot(packed, vectors), of_tiles, rtol=1e-3, atol=0.05)

    bank = MaskBank(num_weights)
    for task in range(8):
        bank.add(task, bits.unpack(packed[task], num_weights))
    of_masks = sum(buffer.nbytes for buffer in (bank.packed, bank.tasks, bank.statistics))
    ratios = {
        "dot / dense float32": milliseconds["dot"] / milliseconds["dense float32"],
        "dot / reading the bytes once": milliseconds["dot"] / milliseconds["reading the bytes once"],
        "packed bytes / dense bytes": packed.nbytes / dense.nbytes,
        "bank in memory / bits": of_masks / (8 * num_weights / 8),
    }
    return {"milliseconds": milliseconds, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=2500)
    parser.add_argument("--weights", type=int, default=315_200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = measure(options.masks, options.weights, options.rounds)
    print(f"{options.masks} masks of {options.weights} weights, {torch.get_num_threads()} threads; medians")
    for name, value in measured["milliseconds"].items():
        print(f"{name:30} {value:9.2f} ms")
    for name, value in measured["ratios"].items():
        print(f"{name:30} {value:9.3f}   target at most {TARGETS[name]:.3f}")
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
