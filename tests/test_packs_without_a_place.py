"""Packs in folders that are full, read-only or in use, and on failing hardware: an error says what to do."""

import errno
import fcntl
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from moe_offload.models.errors import PackError
from moe_offload.pack_cache import PackCache
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.transfer.pack_writer import PackWriter
from tests.pack_files import ALL, PLAN, Conversion, Report, check, read_only


@pytest.fixture
def cache(tmp_path: Path) -> PackCache:
    return PackCache(tmp_path / "packs" / "model-int8.pack", PLAN, threads=2)


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
    monkeypatch.setattr(os, "open", read_only(os.open))
    with pytest.raises(PackError, match=r"Read-only file system; give a folder that can be written to"):
        PackCache(tmp_path / "x.pack", PLAN).open(Conversion())


def test_a_pack_on_read_only_media_is_used(cache: PackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.open(Conversion()).close()
    cache.path.with_name(cache.path.name + ".verified").unlink()
    monkeypatch.setattr(os, "open", read_only(os.open))
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
