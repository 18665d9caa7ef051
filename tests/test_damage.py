"""Files and checkpoints with damaged bytes, or made up: refused with one clear error, or read as they were written."""

import json
import logging
from functools import partial

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from supsup_lightning import SupSup, bits, codec, entropy_coding
from supsup_lightning.checkpoints import WholeCheckpoints
from supsup_lightning.errors import DataError, MismatchError, SupSupError
from supsup_lightning.methods import BatchEnsemble, HopSupSup, LowerBound, UpperBound


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 11, bias=False), nn.BatchNorm1d(11), nn.Linear(11, 5))


def with_combination() -> SupSup:
    method = SupSup(network())
    finish(method, 2)
    method.begin_combination(2)
    method.finish_task(2)
    return method


def finish(method, num_tasks: int):
    for task in range(num_tasks):
        method.begin_task(task)
        method.finish_task(task)
    return method


def small_hop() -> HopSupSup:
    return HopSupSup(nn.Sequential(nn.Linear(4, 9, bias=False), nn.LayerNorm(9, bias=False)))


MAKE = {
    "packed": partial(SupSup, network()),
    "coded": lambda: SupSup(nn.Linear(40, 30, bias=False), rule="topk", sparsity=0.95),
    "combined": partial(SupSup, network()),
    "hopfield": small_hop,
    "own_networks": lambda: UpperBound(network()),
    "one_network": lambda: LowerBound(network()),
    "trunk": lambda: BatchEnsemble(network()),
}


def learned(name: str):
    return with_combination() if name == "combined" else finish(MAKE[name](), 3)


@pytest.fixture(scope="module", params=MAKE)
def stored(request, tmp_path_factory):
    """An empty method, a file to load into it, and the tensors that belong in there."""
    method = learned(request.param)
    path = tmp_path_factory.mktemp(request.param) / "bank.safetensors"
    method.save(path)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == (codec.CODED_MASK_BANK if request.param == "coded" else method.file_format)
    return MAKE[request.param](), path, snapshot(method)


def snapshot(method) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in method.kept().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused_or_right(method, path, expected) -> bool:
    """Whether a file is refused, which leaves the method as it was; otherwise it has to be what was written."""
    before = snapshot(method)
    try:
        method.load(path)
    except SupSupError:
        assert same(snapshot(method), before)
        return True
    assert same(snapshot(method), expected)
    return False


@st.composite
def damage(draw, content: bytes) -> bytes:
    """A file cut short, with flipped bits, zeroed or repeated stretches, or bytes put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # Half of it in the header and what follows it, where most can go wrong.
        place = draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(1200, len(content) - 1))))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "zero", "repeat", "insert", "number"]))
        if kind == "flip":
            changed[place % len(changed)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[max(1, place) :]
        elif kind == "zero":
            changed[place : place + length] = bytes(len(changed[place : place + length]))
        elif kind == "repeat":
            changed[place : place + length] = changed[:length]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=16))
        else:
            changed[place : place + 1] = str(draw(st.sampled_from([0, 2**31, 2**32, 2**63, -1]))).encode()
    return bytes(changed)


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_refused_or_right(stored, tmp_path_factory, data):
    method, path, expected = stored
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(data.draw(damage(path.read_bytes())))
    refused_or_right(method, damaged, expected)


@FUZZ
@given(data=st.data())
def test_made_up_contents_are_refused(stored, data):
    """With the digest that they should have, or none as in older files."""
    method, path, _ = stored
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    chosen = data.draw(st.sampled_from(sorted(tensors)))
    value = tensors[chosen]
    kind = data.draw(st.sampled_from(["drop", "extra", "type", "shorter", "longer", "nan", "negative", "flat", "huge"]))
    if kind == "drop":
        del tensors[chosen]
    elif kind == "extra":
        tensors["other"] = torch.zeros(3)
    elif kind == "type":
        tensors[chosen] = value.to(torch.int16 if value.is_floating_point() else torch.float64)
    elif kind == "shorter" and value.ndim and "weights" not in tensors:  # of one network, tasks are numbers alone
        tensors[chosen] = value[:-1]
    elif kind == "longer" and value.ndim:
        tensors[chosen] = torch.cat([value, value[:1]])
    elif kind == "nan" and value.is_floating_point():
        tensors[chosen] = torch.full_like(value, torch.nan)
    elif kind == "negative" and value.dtype == torch.int64:
        tensors[chosen] = -1 - value
    elif kind == "flat" and value.ndim > 1:
        tensors[chosen] = value.flatten()
    elif kind == "huge" and value.dtype in (torch.int64, torch.int32):
        tensors[chosen] = torch.full_like(value, torch.iinfo(value.dtype).max)
    else:
        return
    made_up = path.with_name("made_up.safetensors")
    del metadata["sha256"], metadata["checked_by"]
    if data.draw(st.booleans()):
        metadata["checked_by"] = "sha256"
        metadata["sha256"] = codec._digest(metadata, tensors)
    safetensors.torch.save_file({key: each.contiguous() for key, each in tensors.items()}, made_up, metadata)
    before = snapshot(method)
    with pytest.raises(SupSupError):
        method.load(made_up)
    assert same(snapshot(method), before)


@pytest.mark.parametrize("name", MAKE)
def test_an_older_file_without_a_digest_is_read(name, tmp_path, caplog):
    method, path = learned(name), tmp_path / "old.safetensors"
    method.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    del metadata["sha256"], metadata["checked_by"]
    safetensors.torch.save_file(tensors, path, metadata)
    fresh = MAKE[name]()
    with caplog.at_level(logging.INFO):
        fresh.load(path)
    assert "older version" in caplog.text
    assert same(snapshot(fresh), snapshot(method))


def test_equal_banks_make_equal_files(tmp_path):
    for name in ("packed", "coded"):
        files = []
        for place in ("one", "other"):
            learned(name).save(tmp_path / place)
            files.append((tmp_path / place).read_bytes())
        assert files[0] == files[1]
        header = json.loads(files[0][8 : 8 + int.from_bytes(files[0][:8], "little")])
        assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_a_layer_of_four_thousand_million_weights_is_refused_before_there_is_room_for_it(tmp_path):
    method, path = learned("coded"), tmp_path / "bank.safetensors"
    method.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    tensors["layer_sizes"] = torch.tensor([2**32])
    del metadata["sha256"], metadata["checked_by"]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(DataError, match="over other layers than those of this network"):
        MAKE["coded"]().load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": torch.tensor([0, 0, 2])}, "numbers from 0 on, each once"),
        ({"tasks": torch.tensor([0, -1, 2])}, "numbers from 0 on, each once"),
        ({"tasks": torch.tensor([0, 1])}, "rows of packed for 2"),
        ({"packed": torch.zeros(3, 15, dtype=torch.uint8)}, "another network"),
        ({"packed": torch.full((3, 16), 255, dtype=torch.uint8)}, "bits are set that stand for no weight"),
        ({"statistics": torch.full((3, 23), torch.inf)}, "NaN or infinite"),
        ({"packed": None}, "missing"),
    ],
)
def test_a_refused_state_leaves_the_bank_as_it_was(change, message):
    method = learned("packed")
    before = snapshot(method)
    foreign = {f"bank.{name}": value for name, value in change.items()}
    state = {**learned("packed").state_dict(), **foreign}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises((DataError, MismatchError), match=message):
        method.load_state_dict(state)
    assert same(snapshot(method), before)


@FUZZ
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_right(tmp_path_factory, data):
    content, expected = checkpoint(tmp_path_factory)
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    path.write_bytes(data.draw(damage(content)))
    method = MAKE["packed"]()
    try:
        state = WholeCheckpoints().load_checkpoint(path)["state_dict"]
        method.load_state_dict(state)
    except SupSupError:
        return
    assert same(snapshot(method), expected)


CHECKPOINT: list = []


def checkpoint(tmp_path_factory) -> tuple[bytes, dict[str, torch.Tensor]]:
    if not CHECKPOINT:
        method, path = learned("packed"), tmp_path_factory.getbasetemp() / "whole.ckpt"
        WholeCheckpoints().save_checkpoint({"state_dict": method.state_dict(), "epoch": 3}, path)
        CHECKPOINT.extend((path.read_bytes(), snapshot(method)))
    return CHECKPOINT[0], CHECKPOINT[1]


def test_no_mask_is_coded_where_nothing_is_gained(monkeypatch):
    packed = bits.pack(torch.rand(20, 4000, generator=torch.Generator().manual_seed(0)) < 0.5)
    monkeypatch.setattr(entropy_coding, "RangeEncoder", None)
    assert entropy_coding.encode_if_smaller(packed, [1000, 3000]) is None
