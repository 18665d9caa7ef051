"""Entropy coding of masks: a range coder with one probability per layer and mask.

A mask of density ``p`` carries ``H2(p)`` bits per weight: 1 at a half, 0.47 at a tenth, 0.08 at a hundredth. The coder
(`constriction`) adds about 0.0001 bits per weight at any density: 0.01 % at a half, 0.03 % at a tenth, 0.15 % at a
hundredth, 0.8 % at a thousandth; and about 4 bytes per mask. Length and counts add 8 bytes per mask and 4 per layer.
"""

from collections.abc import Iterator, Sequence

import constriction
import numpy as np
import torch
from torch import Tensor

Bernoulli = constriction.stream.model.Bernoulli
RangeDecoder, RangeEncoder = constriction.stream.queue.RangeDecoder, constriction.stream.queue.RangeEncoder

# Coded size may differ from the entropy by this many bytes (the coder's last words), this share, and this many bits per
# weight: twice what the coder loses by rounding its range, which is more than the share in masks that are nearly empty.
_SPARE_BYTES = 16
_SPARE_SHARE = 0.01
_SPARE_BITS_PER_WEIGHT = 2.5e-4


def encode(packed: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Encode masks, each by itself.

    Args:
        packed: ``(masks, ceil(weights / 8))`` uint8.
        sizes: number of weights per layer, in the order of the bits.

    Returns:
        ``coded`` ``(bytes,)`` uint8, all masks one after another; ``coded_lengths`` ``(masks,)`` int64, bytes of each;
        ``ones`` ``(masks, layers)`` int32, weights that are on; ``layer_sizes`` ``(layers,)`` int64.

    >>> from supsup_lightning import bits
    >>> packed = bits.pack(torch.rand(3, 1000) < 0.02)
    >>> coded = encode(packed, [600, 400])
    >>> torch.equal(decode(**coded), packed), len(coded["coded"]) < packed.numel() / 2
    (True, True)
    """
    ones = count(packed, sizes)
    words, lengths = bytearray(), []
    symbols = np.empty(sum(sizes), dtype=np.int32)  # of one mask at a time
    for on, counts in zip(_unpacked(packed, sizes), ones.tolist(), strict=True):
        encoder = RangeEncoder()
        symbols[:] = on
        for part, number in zip(np.split(symbols, np.cumsum(sizes)[:-1]), counts, strict=True):
            if 0 < number < len(part):
                encoder.encode(part, Bernoulli(number / len(part), perfect=False))
        coded = encoder.get_compressed().astype("<u4").tobytes()
        words += coded
        lengths.append(len(coded))
    return {
        "coded": torch.frombuffer(words, dtype=torch.uint8) if words else torch.empty(0, dtype=torch.uint8),
        "coded_lengths": torch.tensor(lengths, dtype=torch.int64),
        "ones": ones,
        "layer_sizes": torch.tensor(list(sizes), dtype=torch.int64),
    }


def encode_if_smaller(packed: Tensor, sizes: Sequence[int]) -> dict[str, Tensor] | None:
    """Return `encode`'s result, or None if it is not smaller; the entropy often shows that without encoding."""
    besides = len(packed) * (8 + 4 * len(sizes)) + 8 * len(sizes)
    least = entropy_bytes(count(packed, sizes), sizes).sum() - len(packed) * _SPARE_BYTES + besides
    if least >= packed.nbytes:
        return None
    coded = encode(packed, sizes)
    return coded if sum(value.nbytes for value in coded.values()) < packed.nbytes else None


def count(packed: Tensor, sizes: Sequence[int]) -> Tensor:
    """Number of weights that are on per mask and layer, ``(masks, layers)`` int32."""
    ends = np.cumsum(sizes)
    ones = [[np.count_nonzero(part) for part in np.split(on, ends[:-1])] for on in _unpacked(packed, sizes)]
    return torch.tensor(ones, dtype=torch.int32).view(len(packed), len(sizes))


def entropy_bytes(ones: Tensor, sizes: Sequence[int]) -> Tensor:
    """Entropy in bytes of masks with these numbers of weights on, ``(masks, layers)`` to ``(masks,)`` float64."""
    size = torch.tensor(list(sizes), dtype=torch.float64)
    share = ones / size.clamp_min(1)
    bits_per_weight = torch.special.entr(share) + torch.special.entr(1 - share)  # in nats
    return (bits_per_weight * size).sum(1) / np.log(2) / 8


def decode(
    coded: Tensor, coded_lengths: Tensor, ones: Tensor, layer_sizes: Tensor, *, sizes: Sequence[int] | None = None
) -> Tensor:
    """Decode the output of `encode` to packed masks, ``(masks, ceil(weights / 8))`` uint8.

    Args:
        coded: ``(bytes,)`` uint8, all masks one after another.
        coded_lengths: ``(masks,)`` int64, bytes of each mask.
        ones: ``(masks, layers)`` int32, number of weights that are on.
        layer_sizes: ``(layers,)`` int64, number of weights per layer.
        sizes: expected ``layer_sizes``, if known; compared before memory is allocated.

    Raises:
        ValueError: the input is not an output of `encode`.
    """
    sizes = layer_sizes.tolist() if sizes is None else sizes
    _check(coded, coded_lengths, ones, layer_sizes, sizes)
    packed = torch.empty(len(ones), -(-sum(sizes) // 8), dtype=torch.uint8)
    lengths = coded_lengths.numpy()
    masks = zip(packed.numpy(), lengths.cumsum(), lengths, ones.numpy(), strict=True)
    for number, (row, end, length, counts) in enumerate(masks):
        on = np.concatenate(list(_layers(coded[end - length : end], counts, sizes, number)))
        row[:] = np.packbits(on, bitorder="little")
    return packed


def _check(coded: Tensor, lengths: Tensor, ones: Tensor, layer_sizes: Tensor, sizes: Sequence[int]) -> None:
    wanted = {torch.uint8: (coded, 1), torch.int64: (lengths, 1), torch.int32: (ones, 2)}
    if any(tensor.dtype != dtype or tensor.ndim != ndim for dtype, (tensor, ndim) in wanted.items()):
        raise ValueError("coded masks have other types or dimensions")
    if layer_sizes.dtype != torch.int64 or layer_sizes.tolist() != list(sizes):
        raise ValueError("coded masks are over other layers than those of this network")
    if ones.shape != (len(lengths), len(sizes)):
        raise ValueError(f"{len(lengths)} coded masks have counts of shape {tuple(ones.shape)}")
    if (lengths < 0).any() or (lengths % 4).any() or int(lengths.double().sum()) != len(coded):
        raise ValueError("the lengths of coded masks do not add up")
    if (ones < 0).any() or (ones > layer_sizes).any():
        raise ValueError("a layer has more weights on than weights")
    entropy = entropy_bytes(ones, sizes)
    spare = _SPARE_BYTES + sum(sizes) * _SPARE_BITS_PER_WEIGHT / 8
    if ((lengths - entropy).abs() > entropy * _SPARE_SHARE + spare).any():
        raise ValueError("a coded mask is not as long as its number of ones makes it")


def _layers(coded: Tensor, counts: Sequence[int], sizes: Sequence[int], number: int) -> Iterator[np.ndarray]:
    decoder = RangeDecoder(coded.numpy().view("<u4").astype(np.uint32))
    for ones, size in zip(counts, sizes, strict=True):
        on = np.full(size, ones == size)
        if 0 < ones < size:
            try:
                on = decoder.decode(Bernoulli(ones / size, perfect=False), size).astype(bool)
            except (AssertionError, RuntimeError, ValueError) as error:  # constriction raises them for invalid words
                raise ValueError(f"coded mask {number} cannot be decoded ({error})") from error
        if np.count_nonzero(on) != ones:
            raise ValueError(f"coded mask {number} has another number of ones than was written")
        yield on


def _unpacked(packed: Tensor, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the masks unpacked, ``(weights,)`` uint8 each."""
    for row in packed.cpu().numpy():
        yield np.unpackbits(row, count=sum(sizes), bitorder="little")
