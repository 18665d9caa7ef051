import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supsup_lightning import bits, native
from supsup_lightning.native import build

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler was there at install")

LEVELS = range(native.best_level() + 1) if native.library() is not None else ()


def case(masks: int, weights: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks, the same packed, a vector padded to whole bytes, and coefficients."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(masks, weights, generator=draw) < torch.rand((), generator=draw)
    vector = torch.zeros(-(-weights // 8) * 8)
    vector[:weights] = torch.randn(weights, generator=draw)
    coefficients = torch.randn(masks, generator=draw) * (torch.rand(masks, generator=draw) < 0.7)
    return mask, bits.pack(mask), vector, coefficients


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: native.LEVELS[level])
@given(masks=st.integers(0, 40), weights=st.integers(1, 1500), vectors=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_every_level_is_the_sum_over_what_is_on(level, masks, weights, vectors, seed):
    mask, packed, vector, coefficients = case(masks, weights, seed)
    several = torch.stack([vector * (number + 1) for number in range(vectors)])
    torch.testing.assert_close(
        native.dot(packed, several, level=level).double(),
        several[:, :weights].double() @ mask.double().T,
        rtol=1e-5,
        atol=1e-4,
    )
    torch.testing.assert_close(
        native.weighted_sum(packed, coefficients, level=level)[:weights].double(),
        coefficients.double() @ mask.double(),
        rtol=1e-5,
        atol=1e-5,
    )
    chosen = native.select(packed, vector, level=level)[:, :weights]
    assert torch.equal(chosen, torch.where(mask, vector[:weights], 0))
    some = native.select(packed[:, 1:], vector[8:], level=level)[:, : max(0, weights - 8)]
    assert torch.equal(some, torch.where(mask[:, 8:], vector[8:weights], 0))


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: native.LEVELS[level])
def test_threads_change_nothing_and_rounding_does_not_grow_with_the_weights(level, monkeypatch):
    mask, packed, vector, coefficients = case(37, 300_001, seed=0)
    alone = native.dot(packed, vector[None], level=level), native.weighted_sum(packed, coefficients, level=level)
    monkeypatch.setattr(native, "_BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert torch.equal(native.dot(packed, vector[None], level=level), alone[0])
    assert torch.equal(native.weighted_sum(packed, coefficients, level=level), alone[1])
    exact = mask.double() @ vector[:300_001].double()
    assert (alone[0][0].double() - exact).abs().max() < 2e-3  # of sums of about 400


def test_what_is_off_does_not_count_even_where_it_is_no_number():
    vector = torch.tensor([1.0, float("nan"), float("inf"), 2.0, 0, 0, 0, 0])
    packed = bits.pack(torch.tensor([[True, False, False, True]]))
    for level in LEVELS:
        assert native.dot(packed, vector[None], level=level).item() == 3


def test_transforms_and_graphs_go_another_way():
    _, packed, vector, _ = case(3, 16, seed=1)
    assert native.takes(packed, vector)
    assert not native.takes(packed, vector.double())
    assert not native.takes(packed, vector.clone().requires_grad_())
    several = torch.stack([vector, 2 * vector])
    mapped = torch.func.vmap(lambda v: bits.dot(packed, v))(several)
    torch.testing.assert_close(mapped, bits.dot(packed, several))
    coefficients = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    summed = torch.func.vmap(lambda a: bits.weighted_sum(packed, a, 16))(coefficients)
    torch.testing.assert_close(summed, torch.stack([bits.weighted_sum(packed, a, 16) for a in coefficients]))


def test_rows_that_are_not_dense_are_read_right():
    _, packed, vector, _ = case(16, 128, seed=1)
    turned = packed.T  # (16, 16), not dense along the last dimension
    assert torch.equal(bits.select(turned, vector), bits.select(turned.contiguous(), vector))
    assert torch.equal(bits.dot(turned, vector), bits.dot(turned.contiguous(), vector))


def test_without_it_pytorch_gives_the_same_and_says_so_once(monkeypatch, caplog):
    _, packed, vector, coefficients = case(5, 77, seed=2)
    with_kernel = bits.dot(packed, vector[:77]), bits.weighted_sum(packed, coefficients, 77)
    selected = bits.select(packed, vector[:77])
    native.library.cache_clear()
    monkeypatch.setattr(native, "library_path", lambda: Path("/nowhere/packed_bits-0.so"))
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(bits.dot(packed, vector[:77]), with_kernel[0])
        torch.testing.assert_close(bits.weighted_sum(packed, coefficients, 77), with_kernel[1])
        assert torch.equal(bits.select(packed, vector[:77]), selected)
    native.library.cache_clear()
    assert len([record for record in caplog.records if record.name == "supsup_lightning.native"]) == 1
    assert "Install a C compiler" in caplog.text


def test_an_installation_without_a_compiler_goes_on(tmp_path):
    folder = tmp_path / "native"
    shutil.copytree(build.FOLDER, folder, ignore=shutil.ignore_patterns("packed_bits-*"))
    done = subprocess.run(
        [sys.executable, str(folder / "build.py")], env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert "no C compiler" in done.stderr
    broken = subprocess.run(
        [sys.executable, str(folder / "build.py")], env={"PATH": "", "CC": shutil.which("false")}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "the C kernel was not built" in broken.stderr
    assert not list(folder.glob("packed_bits-*"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not here")
def test_kernels_for_gpus_give_the_same_sums_in_tritons_interpreter():
    code = """
import torch
from supsup_lightning import bits
from supsup_lightning.native import triton_kernels as kernels

kernels.check("cpu")
for masks, num_bytes, vectors, seed in ((1, 1, 1, 0), (16, 128, 2, 1), (33, 2050, 1, 2), (0, 7, 3, 3)):
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, (masks, num_bytes), generator=draw, dtype=torch.uint8)
    several = torch.randn(vectors, 8 * num_bytes, generator=draw)
    coefficients = torch.randn(masks, generator=draw)
    torch.testing.assert_close(kernels.dot(packed, several), bits.dot(packed, several), rtol=1e-4, atol=1e-3)
    expected = bits.weighted_sum(packed, coefficients, 8 * num_bytes)
    torch.testing.assert_close(kernels.weighted_sum(packed, coefficients), expected, rtol=1e-4, atol=1e-4)
try:
    kernels._STRETCH, kernels.dot = 100, lambda packed, vectors: torch.zeros(len(vectors), len(packed))
    kernels.check("cpu")
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("Triton's interpreter of this version does not work with this NumPy")
    assert done.returncode == 0, done.stderr
    assert "dot is off by" in done.stdout


def test_where_they_do_not_work_pytorch_does_and_says_why(caplog):
    if torch.cuda.is_available():
        pytest.skip("they work here")
    native.gpu_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert native.gpu_kernels() is None
        assert native.gpu_kernels() is None
    native.gpu_kernels.cache_clear()
    assert len([record for record in caplog.records if record.name == "supsup_lightning.native"]) == 1
    assert "so PyTorch's own are used" in caplog.text
