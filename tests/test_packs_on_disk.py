"""Packs as files: whatever was done to them, or to the one who writes them, there is a whole one afterwards or an error
that says what to do.

One layer's worth of a model stands for all: sections of a few records, whose bytes are their numbers.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix
from moe_offload.models.errors import PackError
from moe_offload.pack_cache import PackCache
from moe_offload.transfer import pack_layout
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.transfer.pack_layout import PackPlan, UnusablePackError
from moe_offload.transfer.pack_writer import PackWriter, journal_path, partial_path
from tests.pack_cases import files

EXPERTS = ExpertRecord(32, 32, "int8", bias=True)
PLAN = PackPlan.plan(
    "0123456789abcdef",
    [("layers.0", EXPERTS, 3), ("layers.1", ExpertRecord(32, 64, "int4", gated=False), 2),
     ("lm_head", PackedMatrix(33, 32, "int8"), 1)],
)  # fmt: skip
Report = Callable[[int, int], None]


def content(section: int, index: int) -> np.ndarray:
    return np.full(PLAN.sections[section].record_bytes, 16 * section + index + 1, np.uint8)


class Conversion:
    """Stands for the conversion of a model; `done` lists the sections that were written. May be told to stop before a
    section.
    """

    def __init__(self, stop_at: str = "", error: BaseException | None = None) -> None:
        self.done: list[str] = []
        self._stop_at, self._error = stop_at, error

    def __call__(self, writer: PackWriter, report: Report) -> None:
        for number, section in enumerate(PLAN.sections):
            if section.name in writer.finished:
                continue
            crcs = [writer.write(section, index, content(number, index)) for index in range(section.count)]
            if section.name == self._stop_at and self._error is not None:
                raise self._error
            writer.finish_section(section, crcs)
            self.done.append(section.name)
            report(number, len(PLAN.sections))


def check(pack: ExpertPack) -> None:
    """Every byte is where the plan says, and the addresses lead to it."""
    for number, section in enumerate(PLAN.sections):
        for index in range(section.count):
            assert np.array_equal(pack.record(section.name, index), content(number, index))
    table = pack.table("layers.0")
    first = pack.record("layers.0", 0).ctypes.data
    assert table.shape == (3, 6) and table[0].tolist() == [first + each for each in EXPERTS.offsets]
    assert np.all(np.diff(table, axis=0) == EXPERTS.nbytes)
    assert not pack.table("layers.1")[:, [0, 3, 4, 5]].any()
    pack.close()


ALL = [section.name for section in PLAN.sections]


@pytest.fixture
def cache(tmp_path: Path) -> PackCache:
    return PackCache(tmp_path / "packs" / "model-int8.pack", PLAN, threads=2)


def test_written_read_and_remembered(cache: PackCache) -> None:
    conversion = Conversion()
    check(cache.open(conversion))
    assert conversion.done == ALL and cache.is_there()
    assert files(cache.path.parent) == {"pack", "verified", "lock"}
    check(cache.open(conversion))
    assert conversion.done == ALL


def test_places_are_aligned(cache: PackCache) -> None:
    cache.open(Conversion()).close()
    assert cache.path.stat().st_size == PLAN.size
    for section in PLAN.sections:
        assert PLAN.position(section, 0) % 4096 == 0 and section.record_bytes % 64 == 0
    with pytest.raises(IndexError):
        PLAN.position(PLAN.sections[0], 3)
    text = cache.path.read_bytes()[24 : PLAN.data_start].rstrip(b"\0")
    matrix = json.loads(text)["sections"][2]
    assert (matrix["kind"], matrix["rows"], matrix["cols"], matrix["count"]) == ("matrix", 33, 32, 1)


@pytest.mark.parametrize("stop_at", ALL)
def test_what_was_finished_is_not_done_again(cache: PackCache, stop_at: str) -> None:
    """As after Ctrl-C: only what can be resumed is left."""
    with pytest.raises(KeyboardInterrupt):
        cache.open(Conversion(stop_at, KeyboardInterrupt()))
    assert files(cache.path.parent) == {"partial", "journal", "lock"}
    rest = Conversion()
    check(cache.open(rest))
    assert rest.done == ALL[ALL.index(stop_at) :]
    assert files(cache.path.parent) == {"pack", "verified", "lock"}


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda journal: journal + b'{"section": "lm_head", "cr', ["lm_head"]),  # torn by a power cut
        (lambda journal: journal + b'{"section": "lm_head", "crc": "00"}\n', ["lm_head"]),
        (lambda journal: journal + b"[1]\n\xff\n", ["lm_head"]),
        (lambda journal: journal.rpartition(b"{")[0], ["layers.1", "lm_head"]),
        (lambda journal: journal.replace(b'"version": 1', b'"version": 0'), ALL),
        (lambda journal: journal.replace(b"0123456789abcdef", b"fedcba9876543210"), ALL),
        (lambda journal: b"", ALL),
        (lambda journal: b"null\n", ALL),
    ],
    ids=["torn", "lying", "garbage", "shorter", "version", "key", "empty", "null"],
)
def test_journals_are_trusted_as_far_as_they_fit(
    cache: PackCache, damage: Callable[[bytes], bytes], left: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache.open(Conversion("lm_head", KeyboardInterrupt()))
    journal = journal_path(cache.path)
    journal.write_bytes(damage(journal.read_bytes()))
    rest = Conversion()
    check(cache.open(rest))
    assert rest.done == left


def test_a_partial_file_that_is_too_short(cache: PackCache) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache.open(Conversion("lm_head", KeyboardInterrupt()))
    os.truncate(partial_path(cache.path), PLAN.position(PLAN.section("layers.1"), 1))
    rest = Conversion()
    check(cache.open(rest))
    assert rest.done == ALL[1:]


def overwrite(path: Path, at: int, data: bytes) -> None:
    """As another program would: the pack's time changes, so its stamp no longer holds."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(0, time.time_ns() + 10**9))


@pytest.mark.parametrize(
    ("at", "data", "said"),
    [
        (PLAN.position(PLAN.section("layers.1"), 1) + 70, b"\0", r"is damaged at layers\.1, expert 1"),
        (PLAN.position(PLAN.section("lm_head"), 0), b"\0", r"is damaged at lm_head"),
        (0, b"\0", "is no pack"),
        (8, b"\0", "is of version 0, this program reads 1"),
        (16, b"\xff" * 8, "has a damaged header"),
        (24, b"[", "has a damaged header"),
    ],
    ids=["expert", "matrix", "magic", "version", "length", "JSON"],
)
def test_a_damaged_pack_is_made_again(
    cache: PackCache, caplog: pytest.LogCaptureFixture, at: int, data: bytes, said: str
) -> None:
    cache.open(Conversion()).close()
    overwrite(cache.path, at, data)
    again = Conversion()
    check(cache.open(again))
    assert again.done == ALL
    assert re.search(rf"model-int8\.pack {said}.*converted again", caplog.text)


@pytest.mark.parametrize("size", [0, 10, PLAN.data_start, PLAN.size - 1, PLAN.size + 1])
def test_a_pack_of_another_size_is_made_again(cache: PackCache, size: int) -> None:
    cache.open(Conversion()).close()
    os.truncate(cache.path, size)
    assert not cache.is_there()
    check(cache.open(Conversion()))


def test_a_pack_of_other_weights_is_made_again(cache: PackCache) -> None:
    """A name holds 16 digits of the key, the header all of them."""
    cache.open(Conversion()).close()
    other = PackCache(cache.path, PackPlan("other", PLAN.sections))
    again = Conversion()
    check(other.open(again))
    assert again.done == ALL


def test_a_touched_pack_is_checked_and_kept(cache: PackCache) -> None:
    cache.open(Conversion()).close()
    os.utime(cache.path, ns=(1, 1))
    reports: list[str] = []
    checking = PackCache(cache.path, PLAN, 2, lambda what, done, total: reports.append(what))
    nothing = Conversion()
    for expected in (True, False):
        reports.clear()
        check(checking.open(nothing))
        assert ("checking the pack" in reports) == expected and not nothing.done
    check(checking.open(nothing, trust=False))
    assert "checking the pack" in reports


def test_a_stamp_that_is_garbage(cache: PackCache) -> None:
    cache.open(Conversion()).close()
    stamp = cache.path.with_name(cache.path.name + ".verified")
    for text in (b"", b"[" * 10_000, b"\xff", b'{"size": 1}'):
        stamp.write_bytes(text)
        nothing = Conversion()
        check(cache.open(nothing))
        assert not nothing.done


def test_a_full_disk_is_seen_before(cache: PackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    conversion = Conversion()
    with pytest.raises(PackError, match=rf"{cache.path.parent} is full: .* need \d+.* KB there, and 1\.0 KB are free"):
        cache.open(conversion)
    assert not conversion.done


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("after", range(8))
def test_a_disk_that_fills_up(cache: PackCache, monkeypatch: pytest.MonkeyPatch, call: str, after: int) -> None:
    """Wherever it happens: an error that says what to do, and the next load goes on."""
    calls, real = [0], getattr(os, call)

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    first = Conversion()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            cache.open(first).close()
        except PackError as error:
            message = str(error)
        else:  # so many calls there are not
            assert after >= 7 and first.done == ALL
            return
    assert re.search(r"is full: .*need .* are free\. Make room and load again, .*--pack-dir", message)
    assert not cache.is_there()
    rest = Conversion()
    check(cache.open(rest))
    # a line of the journal may be there although its fsync failed; what it speaks of was safe before
    assert rest.done in (ALL[len(first.done) :], ALL[len(first.done) + 1 :])


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PackError, match=r"cannot be kept in .*file/packs: .*pack_dir, --pack-dir"):
        PackCache(tmp_path / "file" / "packs" / "x.pack", PLAN).open(Conversion())
    monkeypatch.setattr(os, "open", _read_only(os.open))
    with pytest.raises(PackError, match=r"Read-only file system; give a folder that can be written to"):
        PackCache(tmp_path / "x.pack", PLAN).open(Conversion())


def _read_only(real: Callable[..., int]) -> Callable[..., int]:
    def opened(path: Any, flags: int, *rest: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest)

    return opened


def test_a_pack_on_read_only_media_is_used(cache: PackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.open(Conversion()).close()
    cache.path.with_name(cache.path.name + ".verified").unlink()
    monkeypatch.setattr(os, "open", _read_only(os.open))
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    nothing = Conversion()
    check(cache.open(nothing))
    assert not nothing.done


def test_memory_that_fails_is_not_an_endless_loop(cache: PackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertPack, "find_damage", lambda *_: "layers.0, expert 0")
    with pytest.raises(PackError, match="does not read back as it was written"):
        cache.open(Conversion())


def test_the_second_waits_for_the_first(cache: PackCache, caplog: pytest.LogCaptureFixture) -> None:
    """Locks belong to open files, so threads stand for processes."""
    started, may_go_on = threading.Event(), threading.Event()
    seen: list[tuple[str, int, int]] = []

    class Slow(Conversion):
        def __call__(self, writer: PackWriter, report: Report) -> None:
            started.set()
            assert may_go_on.wait(30)
            super().__call__(writer, report)

    def waiting(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))
        may_go_on.set()

    first = threading.Thread(target=lambda: cache.open(Slow()).close())
    first.start()
    assert started.wait(30)
    second = Conversion()
    check(PackCache(cache.path, PLAN, 1, waiting).open(second))
    first.join(30)
    assert not second.done
    assert "another process is converting" in caplog.text
    assert seen[0][0].startswith("waiting") and seen[0][2] == PLAN.size


def test_file_systems_without_locks(
    cache: PackCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.INFO):
        check(cache.open(Conversion()))
    assert "has no locks" in caplog.text


numbers = st.integers(-2, 600) | st.sampled_from([2**31, 2**63, 2**64, 10**400, -(2**63)]) | st.floats()
anything = st.recursive(
    numbers | st.booleans() | st.none() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.pack"
    PackCache(path, PLAN).open(Conversion()).close()
    return path


@st.composite
def other_headers(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of the header: some bytes of it, or one of its values."""
    kind = draw(st.sampled_from(["bytes", "value", "section", "text"]))
    places = draw(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
    value, which, key = draw(anything), draw(st.integers(0, 2)), draw(st.integers(0, 12))

    def change(original: bytes) -> bytes:
        if kind == "bytes":
            changed = bytearray(original)
            for at, byte in places:
                changed[at] = byte
            return bytes(changed)
        length = int.from_bytes(original[16:24], "little")
        header = json.loads(original[24 : 24 + length])
        if kind == "value":
            header[["key", "sections"][which % 2]] = value
        elif kind == "section":
            section = header["sections"][which]
            section[sorted(section)[key % len(section)]] = value
        else:
            header = value
        text = json.dumps(header).encode()
        start = original[:16] + len(text).to_bytes(8, "little") + text
        return start.ljust(PLAN.data_start, b"\0") + original[PLAN.data_start :]

    return change


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(change=other_headers())
def test_no_header_leads_anywhere_but_to_the_plan(whole: Path, change: Callable[[bytes], bytes]) -> None:
    original = whole.read_bytes()
    path = whole.with_name("mutated.pack")
    path.unlink(missing_ok=True)
    path.write_bytes(change(original))
    try:
        pack = ExpertPack(path, PLAN)
    except UnusablePackError as error:
        assert len(str(error)) < 200
        assert path.read_bytes() != original
    else:
        damaged = pack.find_damage(1)  # a checksum may be another one
        check(pack)
        assert damaged is None or damaged.split(",")[0] in ALL


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(change=other_headers())
def test_any_header_ends_in_a_whole_pack(whole: Path, change: Callable[[bytes], bytes]) -> None:
    path = whole.with_name("again.pack")
    path.unlink(missing_ok=True)
    path.write_bytes(change(whole.read_bytes()))
    check(PackCache(path, PLAN).open(Conversion()))


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300), header=anything)
def test_files_that_are_no_packs(whole: Path, data: bytes, header: Any) -> None:
    path = whole.with_name("none.pack")
    text = json.dumps(header).encode()
    prefix = pack_layout.MAGIC + (1).to_bytes(8, "little")
    for each in (data, prefix + data, prefix + len(text).to_bytes(8, "little") + text):
        path.unlink(missing_ok=True)
        path.write_bytes(each)
        with pytest.raises(UnusablePackError):
            PLAN.read_checksums(path)
