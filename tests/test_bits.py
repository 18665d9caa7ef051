import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supsup_lightning import bits

sizes = st.integers(1, 70)


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


@given(weights=sizes, masks=st.integers(0, 5), vectors=st.integers(1, 3), seed=st.integers(0, 1000))
def test_dot_against_a_loop(weights, masks, vectors, seed):
    mask = random_masks(masks, weights, seed)
    several = torch.randn(vectors, weights, generator=torch.Generator().manual_seed(seed))
    expected = [[sum(x for x, on in zip(v, m, strict=True) if on) for m in mask.tolist()] for v in several.tolist()]
    packed = bits.pack(mask)
    torch.testing.assert_close(
        bits.dot(packed, several),
        torch.tensor(expected, dtype=torch.float32).view(vectors, masks),
        rtol=1e-5,
        atol=1e-5,
    )
    assert bits.dot(packed, several[0]).shape == (masks,)
    torch.testing.assert_close(bits.dot(packed, several[0]), bits.dot(packed, several)[0], rtol=1e-5, atol=1e-6)


@given(weights=sizes, masks=st.integers(1, 5), seed=st.integers(0, 1000))
def test_weighted_sum_against_a_loop(weights, masks, seed):
    mask = random_masks(masks, weights, seed)
    coefficients = torch.randn(masks, generator=torch.Generator().manual_seed(seed))
    expected = torch.zeros(weights)
    for coefficient, row in zip(coefficients, mask, strict=True):
        expected += coefficient * row
    torch.testing.assert_close(bits.weighted_sum(bits.pack(mask), coefficients, weights), expected)


@settings(max_examples=20)
@given(masks=st.integers(1, 9), tile=st.integers(1, 60))
def test_products_do_not_depend_on_the_tiles(masks, tile):
    mask = random_masks(masks, 99, seed=3)
    vector = torch.randn(99, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "_TILE_BYTES_CPU", tile)
        torch.testing.assert_close(bits.dot(bits.pack(mask), vector), mask.float() @ vector)
        torch.testing.assert_close(bits.weighted_sum(bits.pack(mask), torch.ones(masks), 99), mask.float().sum(0))


def test_a_product_holds_one_tile_of_floats_at_once():
    packed = torch.zeros(400, 4000, dtype=torch.uint8)  # 51 MB as float32 masks
    vector = torch.ones(32000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        bits.dot(packed, vector)
        bits.weighted_sum(packed, torch.ones(400), 32000)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * bits._TILE_BYTES_CPU * 1.1


@pytest.mark.parametrize("packed", [torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 1), torch.zeros(1).byte()])
def test_a_wrong_shape_or_type_is_refused(packed):
    with pytest.raises(ValueError, match=r"packed must be uint8 of shape \(masks, 1\) for 8 weights"):
        bits.dot(packed, torch.zeros(8))
