"""Products over packed bits, by each of the ways that they are computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supsup_lightning import bits, native

sizes = st.integers(1, 70)


BACKENDS = ("c", "pytorch", "triton")


@contextmanager
def using(backend: str) -> Iterator[torch.device]:
    """The device to compute on, where products go this way and no other; fails if none did."""
    if backend == "c" and native.library() is None:
        pytest.skip("there is no C compiler")
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    calls = []

    def counted(name: str, function):
        def call(*arguments, **options):
            calls.append(name)
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        if backend == "pytorch":
            patch.setattr(native, "library", lambda: None)
            patch.setattr(native, "gpu_kernels", lambda: None)
        patch.setattr(bits, "_tiles", counted("pytorch", bits._tiles))
        kernels = {"c": native, "triton": native.gpu_kernels() if backend == "triton" else None}.get(backend)
        for product in ("dot", "weighted_sum") if kernels is not None else ():
            patch.setattr(kernels, product, counted(backend, getattr(kernels, product)))
        yield torch.device("cuda" if backend == "triton" else "cpu")
    assert {*calls} == {backend}


def random_masks(masks: int, weights: int, seed: int) -> torch.Tensor:
    return torch.rand(masks, weights, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(weights=sizes, masks=st.integers(0, 5), seed=st.integers(0, 1000))
def test_unpack_inverts_pack(weights, masks, seed):
    mask = random_masks(masks, weights, seed)
    packed = bits.pack(mask)
    assert packed.shape == (masks, -(-weights // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(bits.unpack(packed, weights), mask)


@given(weights=sizes, seed=st.integers(0, 1000))
def test_pack_puts_weight_8b_plus_j_into_bit_j_of_byte_b(weights, seed):
    mask = random_masks(1, weights, seed)[0]
    expected = [0] * -(-weights // 8)
    for weight, on in enumerate(mask.tolist()):
        expected[weight // 8] |= on << weight % 8
    assert bits.pack(mask).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@given(weights=sizes, masks=st.integers(0, 5), vectors=st.integers(1, 3), seed=st.integers(0, 1000))
def test_dot_against_a_loop(backend, weights, masks, vectors, seed):
    mask = random_masks(masks, weights, seed)
    several = torch.randn(vectors, weights, generator=torch.Generator().manual_seed(seed))
    expected = [[sum(x for x, on in zip(v, m, strict=True) if on) for m in mask.tolist()] for v in several.tolist()]
    with using(backend) as device:
        packed = bits.pack(mask).to(device)
        products = bits.dot(packed, several.to(device)).cpu()
        alone = bits.dot(packed, several[0].to(device)).cpu()
    right = torch.tensor(expected, dtype=torch.float32).view(vectors, masks)
    torch.testing.assert_close(products, right, rtol=1e-5, atol=1e-5)
    assert alone.shape == (masks,)
    torch.testing.assert_close(alone, products[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@given(weights=sizes, masks=st.integers(1, 5), seed=st.integers(0, 1000))
def test_weighted_sum_against_a_loop(backend, weights, masks, seed):
    mask = random_masks(masks, weights, seed)
    coefficients = torch.randn(masks, generator=torch.Generator().manual_seed(seed))
    expected = torch.zeros(weights)
    for coefficient, row in zip(coefficients, mask, strict=True):
        expected += coefficient * row
    with using(backend) as device:
        found = bits.weighted_sum(bits.pack(mask).to(device), coefficients.to(device), weights).cpu()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["c", "pytorch"])
def test_select_is_the_vector_where_a_mask_is_on(backend, monkeypatch):
    mask = random_masks(5, 77, seed=0)
    vector = torch.randn(77, generator=torch.Generator().manual_seed(0))
    if backend == "pytorch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("there is no C compiler")
    assert native.takes(bits.pack(mask), vector) == (backend == "c")
    assert torch.equal(bits.select(bits.pack(mask), vector), torch.where(mask, vector, 0))


@settings(max_examples=20)
@given(masks=st.integers(1, 9), tile=st.integers(1, 60))
def test_products_do_not_depend_on_the_tiles(masks, tile):
    mask = random_masks(masks, 99, seed=3)
    vector = torch.randn(99, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch, using("pytorch"):
        patch.setattr(bits, "_TILE_BYTES_CPU", tile)
        torch.testing.assert_close(bits.dot(bits.pack(mask), vector), mask.float() @ vector)
        torch.testing.assert_close(bits.weighted_sum(bits.pack(mask), torch.ones(masks), 99), mask.float().sum(0))


def test_a_product_holds_one_tile_of_floats_at_once():
    packed = torch.zeros(400, 4000, dtype=torch.uint8)  # 51 MB as float32 masks
    vector = torch.ones(32000)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with using("pytorch"), profiler as profile:
        bits.dot(packed, vector)
        bits.weighted_sum(packed, torch.ones(400), 32000)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * bits._TILE_BYTES_CPU * 1.1


@pytest.mark.parametrize("packed", [torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 1), torch.zeros(1).byte()])
def test_a_wrong_shape_or_type_is_refused(packed):
    with pytest.raises(ValueError, match=r"packed must be uint8 of shape \(masks, 1\) for 8 weights"):
        bits.dot(packed, torch.zeros(8))
