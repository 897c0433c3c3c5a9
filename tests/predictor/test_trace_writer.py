"""Traces written in parts: put together exactly, gone on with after an end at any point, nothing half trusted."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.predictor import trace_writer
from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.tensor_file import map_tensors, write_tensors
from moe_offload.predictor.trace import Trace, read_trace
from moe_offload.predictor.trace_writer import TraceWriter
from tests.predictor.trace_files import INFO, make_trace, projections_of, same, sequences_of

LENGTHS = [4, 1, 3, 2, 2]


def start(path: Path, trace: Trace, digest: str = "x") -> TraceWriter:
    writer = TraceWriter(path, trace.info, digest)
    if writer.projections is None:
        writer.set_projections(projections_of(trace))
    return writer


def parts(path: Path) -> list[str]:
    return sorted(each.name for each in path.with_name(f"{path.name}.parts").iterdir())


RUNS = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=3)  # sequences, and whether the last are flushed


@given(st.lists(st.integers(1, 4), min_size=1, max_size=7), RUNS, st.sampled_from([0, 200, 400, 10**6]))
@settings(deadline=None, max_examples=25)
def test_interrupted_anywhere(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], runs: list[tuple[int, bool]], part_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("writer") / "t"
    trace = make_trace(lengths)
    sequences = sequences_of(trace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_writer, "_PART_BYTES", part_bytes)
        patch.setattr(os, "fsync", lambda _: None)  # nothing crashes here, and it takes its time
        for count, flushed in [*runs, (len(lengths), False)]:
            writer = start(path, trace)
            assert writer.tokens == sum(lengths[: writer.sequences])
            for sequence in sequences[writer.sequences :][:count]:
                writer.append(sequence)
            if flushed:
                writer.flush()
    writer.finish()
    assert same(read_trace(path), trace)
    assert [each.name for each in path.parent.iterdir()] == ["t"]


def test_parts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_writer, "_PART_BYTES", 1)
    writer = start(tmp_path / "t", make_trace(LENGTHS))
    for sequence in sequences_of(make_trace(LENGTHS)):
        writer.append(sequence)
    assert len(parts(tmp_path / "t")) == len(LENGTHS) + 1


def interrupted(path: Path, monkeypatch: pytest.MonkeyPatch, sequences: int = 4) -> Trace:
    """A run that ended after some sequences, each in a part."""
    monkeypatch.setattr(trace_writer, "_PART_BYTES", 1)
    trace = make_trace(LENGTHS)
    writer = start(path, trace)
    for sequence in sequences_of(trace)[:sequences]:
        writer.append(sequence)
    return trace


def go_on(path: Path, trace: Trace) -> int:
    """Finish, and say how much was there."""
    writer = start(path, trace)
    there = writer.sequences
    for sequence in sequences_of(trace)[there:]:
        writer.append(sequence)
    writer.finish()
    assert same(read_trace(path), trace)
    return there


def test_other_settings_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path / "t", monkeypatch)
    other = make_trace(LENGTHS, seed=1)
    writer = TraceWriter(tmp_path / "t", other.info, "y")
    assert writer.sequences == 0 and writer.projections is None and parts(tmp_path / "t") == []
    assert "5 parts" in caplog.text and "dropped" in caplog.text
    writer.set_projections(projections_of(other))
    for sequence in sequences_of(other):
        writer.append(sequence)
    writer.finish()
    assert same(read_trace(tmp_path / "t"), other)


@pytest.mark.parametrize("damage", ["cut", "gone", "of another", "not ours", "longer", "other tensors"])
def test_what_follows_a_damaged_part_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = tmp_path / "t"
    trace = interrupted(path, monkeypatch)
    part = path.with_name("t.parts") / "000002"
    content = part.read_bytes()
    if damage == "cut":
        part.write_bytes(content[:-1])
    elif damage == "gone":
        part.unlink()
    elif damage == "of another":  # the place of this part, but of other sequences
        part.write_bytes((part.parent / "000001").read_bytes())
    elif damage == "not ours":
        part.write_bytes(b"hello")
    elif damage == "longer":
        part.write_bytes(content + b"x")
    else:
        metadata = map_tensors(part)[0]
        write_tensors(part, {"split": ("U8", (1,))}, metadata, lambda name, put: put([0]))
    assert go_on(path, trace) == 2


def test_without_its_projections_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = interrupted(tmp_path / "t", monkeypatch)
    (tmp_path / "t.parts" / "projection").write_bytes(b"")
    assert go_on(tmp_path / "t", trace) == 0


def full_from(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """The disk is full when so many files were written."""
    written = 0

    def sync(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("files", range(len(LENGTHS) + 2))
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    monkeypatch.setattr(trace_writer, "_PART_BYTES", 1)
    path, trace = tmp_path / "t", make_trace(LENGTHS)
    with monkeypatch.context() as patch, pytest.raises(TraceError, match="No space left on device") as caught:
        full_from(patch, files)
        writer = start(path, trace)
        for sequence in sequences_of(trace):
            writer.append(sequence)
        writer.finish()
    message = str(caught.value)
    assert str(tmp_path) in message and "make room" in message
    assert ("MB are needed" in message) == (files == len(LENGTHS) + 1)
    assert (f"{files - 1} sequences in" in message) == (files > 1)
    assert not path.exists() and not any("tmp" in each.name for each in tmp_path.rglob("*"))
    assert go_on(path, trace) == max(files - 1, 0)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match="cannot write the trace"):
        TraceWriter(tmp_path / "file" / "t", INFO, "x")


def test_nothing_traced(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no sequence"):
        start(tmp_path / "t", make_trace(LENGTHS)).finish()
    assert not (tmp_path / "t").exists()


def test_too_little_data_is_no_file(tmp_path: Path) -> None:
    def fill(name: str, put: Any) -> None:
        put(np.zeros(2, np.uint8))

    with pytest.raises(ValueError, match="another amount"):
        write_tensors(tmp_path / "t", {"a": ("U8", (3,))}, {}, fill)
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    trace = make_trace(LENGTHS)
    writer = start(tmp_path / "t", trace)
    for sequence in sequences_of(trace):
        writer.append(sequence)
    seen: list[tuple[int, int]] = []
    writer.finish(lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == sum(array.nbytes for array in trace[1:])
