import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supsup_lightning import SupSup, bits
from supsup_lightning.bank import codec, entropy_coding
from supsup_lightning.networks import GEMResNet18


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    densities=st.lists(st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.99, 1.0]), min_size=0, max_size=4),
    seed=st.integers(0, 9),
)
def test_masks_come_back_bit_for_bit(sizes, densities, seed):
    draw = torch.Generator().manual_seed(seed)
    masks = [torch.rand(sum(sizes), generator=draw) < density for density in densities]
    packed = bits.pack(torch.stack(masks)) if masks else torch.empty(0, -(-sum(sizes) // 8), dtype=torch.uint8)
    assert torch.equal(entropy_coding.decode(**entropy_coding.encode(packed, sizes)), packed)


def test_a_nearly_empty_mask_of_a_large_layer_comes_back():
    packed = bits.pack(torch.rand(1, 5_000_000, generator=torch.Generator().manual_seed(0)) < 2e-4)
    assert torch.equal(entropy_coding.decode(**entropy_coding.encode(packed, [5_000_000])), packed)


def entropy_bytes(density: float, size: int) -> float:
    return -size / 8 * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) if 0 < density < 1 else 0


@pytest.mark.parametrize("budget", [1, 4, 32])
def test_a_file_of_sparse_masks_is_near_its_entropy_limit(budget, tmp_path):
    method = SupSup(GEMResNet18(output_size=5), rule="topk", allocation="erdos_renyi", budget=budget)
    for task in range(3):
        method.begin_task(task)
        method.finish_task(task)
    path = tmp_path / "bank.safetensors"
    method.save(path)
    limit = 3 * sum(entropy_bytes(kept / size, size) for size, kept in zip(*vars(method.rule).values(), strict=True))
    statistics = method.bank.statistics.nbytes
    assert path.stat().st_size - statistics < 1.02 * limit + 4096
    fresh = SupSup(GEMResNet18(output_size=5), rule="topk", allocation="erdos_renyi", budget=budget)
    fresh.load(path)
    assert torch.equal(fresh.bank.packed, method.bank.packed)


def test_masks_of_a_half_stay_packed(tmp_path):
    method = SupSup(torch.nn.Linear(100, 50))
    method.begin_task(0)
    method.finish_task(0)
    method.save(tmp_path / "bank.safetensors")
    with codec.safe_open(tmp_path / "bank.safetensors", "pt") as file:
        assert "packed" in file.keys()  # noqa: SIM118 (not a dict)
        assert file.metadata()["format"] == codec.MASK_BANK
