"""Damaged and foreign files are refused, and files of this format version are read by later versions."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from hashlib import blake2b
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lightning_roulette import Codebook, load_compressed, load_mask, save_compressed
from lightning_roulette.slim.files.container import MARK

KEPT = Path(__file__).with_name("format_1.lrw")
START = len(MARK) + 4


def state() -> dict[str, torch.Tensor]:
    """Tensors of all kinds, by integers alone, so that they are equal everywhere."""
    numbers = torch.arange(600) * 7919 % 1009
    weights = ((numbers - 500).float() / 64).masked_fill(numbers % 5 > 0, 0.0)
    return {
        "conv.weight": weights.reshape(10, 15, 2, 2),
        "conv.half": weights[:200].half().reshape(20, 10),
        "conv.bias": torch.tensor([0.5, -0.0, math.inf, 1e-45]),
        "steps": torch.tensor(12345),
        "flags": numbers[:20] % 3 == 0,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "weights.lrw"
    save_compressed(state(), path)
    return path.read_bytes()


def refusal(path: Path, damaged: bytes) -> str:
    """What the error says that refuses a file."""
    path.write_bytes(damaged)
    with pytest.raises(ValueError) as error:
        load_compressed(path)
    return str(error.value)


def outcome(path: Path) -> object:
    """How many tensors a file has, or that it is refused by an error that names it."""
    try:
        return len(load_compressed(path))
    except ValueError as error:
        return "refused" if "path is " in str(error) else str(error)


def with_checksum(damaged: bytes) -> bytes:
    return damaged[:-8] + blake2b(damaged[:-8], digest_size=8).digest()


def with_header(whole: bytes, **changes) -> bytes:
    """The file with another header and the right checksum."""
    end = START + int.from_bytes(whole[len(MARK) : START], "little")
    text = json.dumps(json.loads(whole[START:end]) | changes).encode()
    return with_checksum(MARK + len(text).to_bytes(4, "little") + text + whole[end:])


def test_a_file_of_this_version_is_read():
    found = load_compressed(KEPT)
    for name, one in state().items():
        assert found[name].dtype == one.dtype
        assert found[name].shape == one.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), one.reshape(-1).view(torch.uint8))
    assert load_mask(KEPT)["conv.weight"].sum() == (state()["conv.weight"] != 0).sum()


def test_every_shorter_file_is_refused(tmp_path, whole):
    for size in range(0, len(whole), 5):
        assert re.search("path is .*, but ", refusal(tmp_path / "short", whole[:size]))


def test_a_longer_file_is_refused(tmp_path, whole):
    assert "its checksum is wrong" in refusal(tmp_path / "long", whole + b"\0")


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_altered_files_are_refused(tmp_path, whole, changes):
    damaged = bytearray(whole)
    for place, change in changes:
        damaged[place % len(damaged)] ^= change
    if bytes(damaged) != whole:
        assert re.search("path is .*, but ", refusal(tmp_path / "altered", bytes(damaged)))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_files_altered_with_a_right_checksum_are_refused_or_read_whole(tmp_path, whole, place, change):
    damaged = bytearray(whole)
    damaged[place % (len(damaged) - 8)] ^= change
    path = tmp_path / "forged"
    path.write_bytes(with_checksum(bytes(damaged)))
    assert outcome(path) in ("refused", 5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "its format is 2, but this version reads format 1"),
        ({"tensors": {"a": [10**6, 10**6]}}, "promises 1,000,000,000,000 numbers, but .* bytes cannot hold them"),
        ({"tensors": {"a": [2**50]}}, "the tensor 'a' in its header has no type and shape"),
        ({"tensors": {"a": [-1]}}, "the tensor 'a' in its header has no type and shape"),
        ({"tensors": {"a": ["object", 3]}}, "the tensor 'a' in its header has no type and shape"),
        ({"tensors": {"a": 3}}, "the tensor 'a' in its header has no shape"),
        ({"tensors": {"a": "b"}}, "is tied to one that is not there"),
        ({"tensors": []}, "lacks the tensors"),
        ({"sections": [1, 2]}, "its sections are not as long as its header says"),
        ({"sections": [-1]}, "lacks the tensors or the sections"),
        ({"sections": [10**9]}, "its sections are not as long"),
        ({"tensors": {}}, "it is longer than its tensors"),
        ({"tensors": {"a": [100, 100], "b": [100, 100]}}, "its content cannot be decoded"),
    ],
)
def test_headers_that_do_not_fit_are_refused_before_memory_is_taken(tmp_path, whole, changes, reason):
    tracemalloc.start()
    assert re.search(reason, refusal(tmp_path / "forged", with_header(whole, **changes)))
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign"
    torch.save({"weight": torch.ones(3)}, path)
    assert "it does not begin as a file of save_compressed does. Pass a file that" in refusal(path, path.read_bytes())
    assert "it does not begin" in refusal(path, b"")
    assert "it is too short" in refusal(path, MARK)
    assert "its header is longer" in refusal(
        path, with_checksum(MARK + (2**31).to_bytes(4, "little") + b"{}" + bytes(8))
    )
    assert "its header is not JSON" in refusal(path, with_checksum(MARK + (2).to_bytes(4, "little") + b"}{" + bytes(8)))
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "missing")


@pytest.mark.parametrize("values", ["int8", Codebook(3)])
def test_narrowed_files_altered_with_a_right_checksum_are_refused_or_read_whole(tmp_path, values):
    path = tmp_path / "narrowed"
    save_compressed({name: one for name, one in state().items() if name != "conv.bias"}, path, values)
    whole = path.read_bytes()
    for place in range(START, len(whole) - 8, 9):
        path.write_bytes(with_checksum(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]))
        assert outcome(path) in ("refused", 4)
