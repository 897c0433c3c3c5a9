"""A safetensors header may say anything. What is read must lie in the file, or a CheckpointError is raised."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import CheckpointError, MoeOffloadError
from moe_offload.models.safetensors_header import DTYPE_BITS, read_header
from tests import cli_model

ROOT = Path(__file__).parents[1]
DATA = bytes(range(256)) * 2
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]},
    "b.weight": {"dtype": "BF16", "shape": [128], "data_offsets": [256, 512]},
}
VALID = struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode() + DATA

numbers = st.one_of(
    st.integers(-2, 600),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, -(2**63)]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
)
anything = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F7", ""]) | anything,
        "shape": st.lists(numbers, max_size=40) | anything,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | anything,
        "more": anything,
    },
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | anything, max_size=4)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A valid file with some bytes of its length or header changed, cut off or put in."""
    content = bytearray(VALID)
    end = len(VALID) - len(DATA)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(end, len(content)) - 1)) if content else 0
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "cut", "digits"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 8))]
        elif kind == "cut":
            del content[draw(st.integers(0, len(content))) :]
        else:
            content = bytearray(_other_number(bytes(content), draw(st.integers(0, 20)), draw(numbers)))
    return bytes(content)


def _other_number(content: bytes, which: int, number: object) -> bytes:
    """The header's number number `which` replaced, with a length prefix that fits."""
    import re

    text = content[8 : len(content) - len(DATA)]
    found = list(re.finditer(rb"\d+", text))
    if not found:
        return content
    match = found[which % len(found)]
    text = text[: match.start()] + json.dumps(number).encode() + text[match.end() :]
    return struct.pack("<Q", len(text)) + text + content[len(content) - len(DATA) :]


def check(path: Path, content: bytes) -> None:
    """The property: an error of ours, or every byte of every record lies in the file and can be read."""
    path.write_bytes(content)
    try:
        records = read_header(path)
    except CheckpointError as error:
        assert len(str(error)) < 2000, "one line, not a novel"
        return
    length = struct.unpack("<Q", content[:8])[0]
    for name, record in records.items():
        assert record.name == name and record.path == path
        assert 8 + length <= record.offset <= record.offset + record.nbytes <= len(content)
        count = 1
        for size in record.shape:
            count *= size
        assert count * DTYPE_BITS[record.dtype] == record.nbytes * 8
    assert sum(record.nbytes for record in records.values()) == len(content) - 8 - length
    checkpoint = Checkpoint([path])
    for record in records.values():
        try:
            checkpoint.view(record).clone()  # reads every byte through the mapping
        except MoeOffloadError:
            pass
    checkpoint.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


fuzzed = settings(deadline=None, max_examples=1500, suppress_health_check=list(HealthCheck))


def test_valid_file(path: Path) -> None:
    check(path, VALID)
    assert list(read_header(path)) == ["a", "b.weight"]


@fuzzed
@given(content=mutations())
def test_mutated_file(path: Path, content: bytes) -> None:
    check(path, content)


@fuzzed
@given(header=headers, extra=st.binary(max_size=64))
def test_any_json(path: Path, header: Any, extra: bytes) -> None:
    text = json.dumps(header).encode()
    check(path, struct.pack("<Q", len(text)) + text + extra)


@fuzzed
@given(header=anything | st.text(), length=st.integers(0, 2**64 - 1) | st.integers(0, 64))
def test_any_length(path: Path, header: Any, length: int) -> None:
    check(path, struct.pack("<Q", length) + json.dumps(header).encode())


@fuzzed
@given(content=st.binary(max_size=300))
def test_any_bytes(path: Path, content: bytes) -> None:
    check(path, content)
