"""A trace's file: what is read is what was written, and nothing else is taken for a trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.trace import KEY, TEST, TRAIN, VALIDATION, read_trace, split_of
from moe_offload.predictor.trace_writer import write_trace
from tests.cli_model import read_shard, write_shard
from tests.predictor.trace_files import INFO, make_trace, same


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("trace") / "small"
    write_trace(found, make_trace([4, 1, 3]))
    return found


@pytest.mark.parametrize("experts", [6, 300])
def test_what_is_read_is_what_was_written(tmp_path: Path, experts: int) -> None:
    trace = make_trace([3, 2], experts=experts)
    write_trace(tmp_path / "t", trace)
    found = read_trace(tmp_path / "t", INFO.model)
    assert same(found, trace)
    assert found.experts.dtype == (np.uint8 if experts <= 256 else np.uint16)
    assert [each.name for each in tmp_path.iterdir()] == ["t"]


def test_arrays_are_mapped_and_cannot_be_changed(path: Path) -> None:
    trace = read_trace(path)
    assert not trace.look.flags.owndata and not trace.look.flags.writeable
    assert all(array.flags.aligned for array in trace[1:])


def test_safetensors_reads_it_too(path: Path) -> None:
    from safetensors.numpy import load_file

    found, trace = load_file(path), read_trace(path)
    assert all(np.array_equal(found[name], getattr(trace, name)) for name in found)
    assert set(found) == set(trace._fields) - {"info"}


def test_tokens_and_sequences(path: Path) -> None:
    trace = read_trace(path)
    assert trace.tokens([2, 1]).tolist() == [5, 6, 7, 4]
    assert trace.before(np.arange(8)).tolist() == [-1, 0, 1, 2, -1, -1, 5, 6]
    assert trace.sequence_of(np.arange(8)).tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert trace.generated(np.arange(8)).tolist() == [False, False, True, True, False, False, True, True]
    assert trace.in_split(VALIDATION, TEST).tolist() == [1, 2]


def test_another_model_is_refused(path: Path) -> None:
    with pytest.raises(TraceError, match="another model"):
        read_trace(path, "cd" * 32)


def test_a_missing_trace_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="moe-offload trace"):
        read_trace(tmp_path / "none")


def test_a_folder_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError):
        read_trace(tmp_path)


def _info(**changed: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        values = json.loads(header["__metadata__"][KEY])
        header["__metadata__"][KEY] = json.dumps(values | changed)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_info(format=2), "format 2"),
        (_info(top_k=7), "impossible"),
        (_info(layers=True), "impossible"),
        (_info(note=5), "impossible"),
        (_info(distances=2), "impossible"),
        (_info(surprise=1), "damaged"),
        (_info(projected=3), "hidden, offset, projection, variance"),
        (_info(layers=10**17), "does not hold"),
        (lambda header: header.pop("__metadata__"), "does not say so"),
        (lambda header: header["__metadata__"].update({KEY: "[1]"}), "format"),
        (lambda header: header["__metadata__"].update({KEY: "{"}), "damaged"),
        (lambda header: header["look"].update(dtype="BF16"), "type"),
        (lambda header: header["look"]["shape"].append(1), "does not hold"),
        (lambda header: header["look"]["shape"].append(-1), "impossible"),
        (lambda header: header["split"].update(data_offsets=[0, 3]), "begins at"),
    ],
)
def test_a_heading_that_lies(path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    header, data = read_shard(path)
    change(header)
    write_shard(tmp_path / "t", header, data)
    with pytest.raises(TraceError, match=said):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [("starts", 1, 0), ("starts", 0, 1), ("starts", 3, 7), ("prompt_tokens", 1, 0), ("prompt_tokens", 1, 2),
     ("split", 0, 3), ("experts", 5, 6), ("variance", 0, np.nan), ("variance", 0, -1), ("offset", 1, np.inf)],
)  # fmt: skip
def test_values_that_cannot_be(tmp_path: Path, name: str, at: int, value: float) -> None:
    trace = make_trace([4, 1, 3])
    getattr(trace, name).reshape(-1)[at] = value
    write_trace(tmp_path / "t", trace)
    with pytest.raises(TraceError, match="make it again"):
        read_trace(tmp_path / "t")


def _opens_or_says_why(path: Path) -> None:
    try:
        trace = read_trace(path)
    except TraceError:
        return
    assert trace.experts.max() < trace.info.experts and trace.tokens(trace.in_split(TRAIN)).max(initial=0) < 8


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_damaged_files(path: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    heading = 8 + int.from_bytes(content[:8], "little")
    # most of the file is data: damage its heading as often
    places = st.one_of(st.integers(0, heading - 1), st.integers(0, len(content) - 1))
    for place in data.draw(st.lists(places, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    damaged = tmp_path_factory.getbasetemp() / "damaged"
    damaged.write_bytes(bytes(content[:cut]) + data.draw(st.binary(max_size=2)))
    _opens_or_says_why(damaged)


@given(st.binary(max_size=64))
@settings(deadline=None, max_examples=50)
def test_anything_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    damaged = tmp_path_factory.getbasetemp() / "anything"
    damaged.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(TraceError):
        read_trace(damaged)


def test_a_heading_nested_without_end(tmp_path: Path) -> None:
    text = b'{"__metadata__":' + b"[" * 100_000
    write_shard(tmp_path / "t", text, b"")
    with pytest.raises(TraceError):
        read_trace(tmp_path / "t")


def test_splits_by_sequence() -> None:
    found = np.bincount([split_of([number, 5]) for number in range(4000)]) / 4000
    assert np.abs(found - [0.8, 0.1, 0.1]).max() < 0.02
    assert split_of([1, 2, 3]) == split_of(np.array([1, 2, 3], np.int32))
    # of the test since the first release: text that was never trained on must not move
    assert [split_of([number]) for number in range(12)] == [0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 0, 0]
