"""Files and checkpoints with damaged bytes, or made up: refused with one clear error, or read as they were written."""

import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import resource
import zipfile
from functools import partial

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from supsup_lightning import ContinualModule, SupSup, bits
from supsup_lightning.bank import checksums, codec, entropy_coding
from supsup_lightning.errors import DataError, MismatchError, SupSupError
from supsup_lightning.methods import BatchEnsemble, HopSupSup, LowerBound, UpperBound
from supsup_lightning.runs.checkpoints import DIGEST, WholeCheckpoints


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


# A longer search: SUPSUP_FUZZ=20 pytest tests/test_damage.py takes twenty times as many examples, each time others.
TIMES = int(os.environ.get("SUPSUP_FUZZ", "1"))
FUZZ = settings(
    max_examples=150 * TIMES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=TIMES == 1,
    database=None,
)


@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_refused_or_right(stored, tmp_path_factory, data):
    method, path, expected = stored
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(data.draw(damage(path.read_bytes())))
    refused_or_right(method, damaged, expected)


def flipped(path, name: str, *, element: int, into) -> None:
    """A copy of a file with one bit flipped in an element of a tensor."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])[name]
    itemsize = (entry["data_offsets"][1] - entry["data_offsets"][0]) // max(1, math.prod(entry["shape"]))
    content[8 + length + entry["data_offsets"][0] + element * itemsize] ^= 4
    into.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "tensor", "element", "message"),
    [
        ("packed", "packed", 20, "the mask of task 1 is not"),
        ("packed", "statistics", 50, "the mask of task 2 is not"),
        ("packed", "tasks", 1, "its list of tasks is not"),
        ("packed", "parameters.1.bias", 0, "what all tasks share is not"),
        ("packed", "digests", 8 * 3, "the mask of task 1 is not"),
        ("coded", "ones", 0, "the mask of task 0 is not"),
        ("coded", "coded", -1, "the mask of task 2 is not"),
        ("combined", "combinations.coefficients", 0, "the mask of task 2 is not"),
        ("own_networks", "values", 0, "the part of task 0 is not"),
        ("one_network", "weights", 0, "what all tasks share is not"),
        ("hopfield", "memory.total", 0, "what all tasks share is not"),
    ],
)
def test_a_flipped_bit_is_named_with_its_task(name, tensor, element, message, tmp_path):
    method, path = learned(name), tmp_path / "bank.safetensors"
    method.save(path)
    if element < 0:
        with safetensors.safe_open(path, "pt") as file:
            element += len(file.get_tensor(tensor))
    flipped(path, tensor, element=element, into=path)
    before = snapshot(method)
    with pytest.raises(DataError, match=message):
        method.load(path)
    assert same(snapshot(method), before)


@FUZZ
@given(data=st.data())
def test_made_up_contents_are_refused(stored, data):
    """With the digest that they should have, or none as in older files."""
    method, path, _ = stored
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    digests = tensors.pop("digests")
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
    if data.draw(st.booleans()):
        tensors["digests"] = data.draw(st.sampled_from([digests, checksums.table_of(tensors)]))
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
    del metadata["sha256"], metadata["checked_by"], tensors["digests"]
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


def written(tensors: dict, metadata: dict) -> bytes:
    """A file without a digest."""
    kept = {name: value for name, value in metadata.items() if name not in ("sha256", "checked_by")}
    return safetensors.torch.save(tensors, kept)


def made_up_file(header: dict | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def made_up_checkpoint(**contents) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {}, **contents}, file)
    return file.getvalue()


def doubled(times: int) -> list:
    """A list that stands for two to so many numbers, in a few bytes of a file."""
    value = [1]
    for _ in range(times):
        value = [value, value]
    return value


def unpacking_to_much() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", bytes(150_000_000))
    return file.getvalue()


def hostile_files(path) -> dict[str, bytes]:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    del tensors["digests"]
    many = 100_000
    one = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    return {
        "a layer of 2^32 weights": written({**tensors, "layer_sizes": torch.tensor([2**32])}, metadata),
        "more ones than weights": written(
            {**tensors, "ones": torch.full((3, 1), 2**31 - 1, dtype=torch.int32)}, metadata
        ),
        "more masks than tasks": written(
            {
                **tensors,
                "coded": torch.empty(0, dtype=torch.uint8),
                "coded_lengths": torch.zeros(many, dtype=torch.int64),
                "ones": torch.zeros(many, 1, dtype=torch.int32),
            },
            metadata,
        ),
        "a header of 2^60 bytes": made_up_file(b"{}", length=2**60),
        "two hundred thousand keys": made_up_file({"__metadata__": dict.fromkeys(map(str, range(200_000)), "")}),
        "twenty thousand tensors": made_up_file({f"t{i}": {**one, "data_offsets": [0, 0]} for i in range(20_000)}),
        "deep brackets": made_up_file(b"[" * 900_000),
        "tensors over one another": made_up_file({"a": one, "b": one}, bytes(4)),
        "a product that overflows": made_up_file({"a": {**one, "shape": [2**33, 2**33]}}, bytes(4)),
        "a long format": made_up_file({"__metadata__": {"format": "x" * 900_000}}),
    }


HOSTILE_CHECKPOINTS = {
    "one value for 2^30": lambda: made_up_checkpoint(rows=torch.zeros(1).expand(2**30)),
    "one value for 2^30, with a digest": lambda: made_up_checkpoint(rows=torch.zeros(1).expand(2**30), **{DIGEST: "0"}),
    "lists of lists": lambda: made_up_checkpoint(rows=doubled(60), **{DIGEST: "0"}),
    "what unpacks to much": unpacking_to_much,
    "a pickle": lambda: pickle.dumps({"state_dict": {}}),
    "nothing": lambda: b"",
}


def refused_in_a_process_of_its_own(read) -> tuple[str, float]:
    """The error of a call, and the MB by which its process grew; of one that goes on and on, nothing."""

    def call(sender) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read()
        except Exception as error:
            kind = "refused" if isinstance(error, SupSupError) else type(error).__name__
            sender.send((f"{kind}: {error}", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=call, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "nothing", 0.0
    finally:
        process.join()


def test_what_is_hostile_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "hostile"
    learned("coded").save(path)
    method = MAKE["coded"]()
    cases = [(name, content, method.load) for name, content in hostile_files(path).items()]
    cases += [(name, make(), WholeCheckpoints().load_checkpoint) for name, make in HOSTILE_CHECKPOINTS.items()]
    for name, content, read in cases:
        path.write_bytes(content)
        message, grown = refused_in_a_process_of_its_own(partial(read, path))
        assert message.startswith("refused"), (name, message)
        assert len(message) < 1000, name
        assert grown < 100, name


def test_a_refused_state_leaves_the_module_as_it_was():
    module, other = ContinualModule(learned("packed")), ContinualModule(learned("packed"))
    module.num_classes, other.num_classes = (2, 2), (5, 5, 5)
    state = other.state_dict()
    with pytest.raises(DataError):
        module.load_state_dict({**state, "method.bank.tasks": torch.tensor([0, 0, 2])})
    assert module.num_classes == (2, 2)
    module.load_state_dict(state)
    assert module.num_classes == (5, 5, 5)


def test_a_refused_merge_leaves_the_bank_as_it_was(tmp_path):
    method, other = finish(MAKE["packed"](), 2), MAKE["packed"]()
    for task in (5, 1):  # the first would fit
        other.begin_task(task)
        with torch.no_grad():
            other.live.values.neg_()
        other.finish_task(task)
    path = tmp_path / "bank.safetensors"
    other.save(path)
    before = snapshot(method)
    with pytest.raises(KeyError, match=r"\[1\] have different masks"):
        method.merge(path)
    assert same(snapshot(method), before)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError):
        method.merge(path)
    assert same(snapshot(method), before)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("combined", {"combinations.masks": torch.tensor([0, 7])}, "does not fit the masks"),
        ("combined", {"combinations.tasks": torch.tensor([1])}, "does not fit the masks"),
        ("combined", {"combinations.coefficients": torch.zeros(1, 2)}, "does not fit the masks"),
        ("packed", {"bank.packed": torch.zeros(3, 16, dtype=torch.uint8, device="meta")}, "packed is"),
        ("packed", {"scores": torch.zeros(121).to_sparse()}, "values is torch.float32 of shape"),
        ("packed", {"_extra_state": None}, "does not say what it was made with"),
        ("hopfield", {"memory.num_patterns": torch.tensor(-1)}, "no sum of patterns"),
        ("hopfield", {"memory.weights_0": torch.arange(81.0).view(9, 9)}, "no sum of patterns"),
        ("own_networks", {"finished.tasks": torch.tensor([0, 0, 1])}, "numbers from 0 on, each once"),
        ("one_network", {"values": torch.zeros(7)}, "belongs to another network"),
        ("trunk", {"trunk_values": torch.zeros(7)}, "of another network"),
    ],
)
def test_a_refused_state_leaves_the_method_as_it_was(name, change, message):
    method = learned(name)
    before = snapshot(method)
    with pytest.raises((DataError, MismatchError), match=message):
        method.load_state_dict({**learned(name).state_dict(), **change})
    assert same(snapshot(method), before)


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
