"""Masks in as few bytes as their densities allow: a range coder with one probability a layer and mask.

A mask of density ``p`` carries ``H2(p)`` bits a weight: 1 at a half, 0.47 at a tenth, 0.08 at a hundredth. The coder
(`constriction`) comes within 0.2 % of that.
"""

from collections.abc import Iterator, Sequence

import constriction
import numpy as np
import torch
from torch import Tensor

from supsup_lightning import bits

Bernoulli = constriction.stream.model.Bernoulli
RangeDecoder, RangeEncoder = constriction.stream.queue.RangeDecoder, constriction.stream.queue.RangeEncoder


def encode(packed: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Code each mask by itself.

    Args:
        packed: ``(masks, ceil(weights / 8))`` uint8.
        sizes: weights in each layer, in the order of the bits.

    Returns:
        ``coded`` ``(bytes,)`` uint8, all masks one after another; ``coded_lengths`` ``(masks,)`` int64, bytes of each;
        ``ones`` ``(masks, layers)`` int32, weights that are on; ``layer_sizes`` ``(layers,)`` int64.

    >>> packed = bits.pack(torch.rand(3, 1000) < 0.02)
    >>> coded = encode(packed, [600, 400])
    >>> torch.equal(decode(**coded), packed), len(coded["coded"]) < packed.numel() / 2
    (True, True)
    """
    ones = torch.zeros(len(packed), len(sizes), dtype=torch.int32)
    words = []
    for row, mask in enumerate(packed.cpu()):
        encoder = RangeEncoder()
        on = bits.unpack(mask, sum(sizes)).numpy().astype(np.int32)
        for layer, part in enumerate(np.split(on, np.cumsum(sizes)[:-1])):
            ones[row, layer] = count = int(part.sum())
            if 0 < count < len(part):
                encoder.encode(part, Bernoulli(count / len(part), perfect=False))
        words.append(torch.from_numpy(encoder.get_compressed().astype("<u4").view(np.uint8)))
    return {
        "coded": torch.cat([torch.empty(0, dtype=torch.uint8), *words]),
        "coded_lengths": torch.tensor([len(each) for each in words], dtype=torch.int64),
        "ones": ones,
        "layer_sizes": torch.tensor(list(sizes), dtype=torch.int64),
    }


def decode(coded: Tensor, coded_lengths: Tensor, ones: Tensor, layer_sizes: Tensor) -> Tensor:
    """The packed masks, ``(masks, ceil(weights / 8))`` uint8, out of what `encode` gave."""
    sizes = layer_sizes.tolist()
    masks = zip(coded.split(coded_lengths.tolist()), ones.tolist(), strict=True)
    rows = [bits.pack(torch.from_numpy(np.concatenate(list(_layers(each, counts, sizes))))) for each, counts in masks]
    return torch.stack(rows) if rows else torch.empty(0, -(-sum(sizes) // 8), dtype=torch.uint8)


def _layers(coded: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> Iterator[np.ndarray]:
    decoder = RangeDecoder(coded.numpy().view("<u4").astype(np.uint32))
    for count, size in zip(counts, sizes, strict=True):
        if 0 < count < size:
            yield decoder.decode(Bernoulli(count / size, perfect=False), size).astype(bool)
        else:
            yield np.full(size, count == size)
