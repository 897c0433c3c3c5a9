"""Packs as files: whatever was done to them, or to the one who writes them, there is a whole one afterwards."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_offload.pack_cache import PackCache
from moe_offload.transfer.pack_layout import PackPlan
from moe_offload.transfer.pack_writer import journal_path, partial_path
from tests.pack_cases import files
from tests.pack_files import ALL, PLAN, Conversion, check


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
