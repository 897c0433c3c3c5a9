import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_offload.cpu_kernels import kernel_cache

ROOT = Path(__file__).parents[2]
SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from moe_offload.cpu_kernels import kernel_cache
if len(sys.argv) > 1:
    kernel_cache.sources_hash = lambda: sys.argv[1]
from moe_offload.cpu_kernels.memory import load_i64, store_i64
import numpy as np

def double(thread, args):
    store_i64(2 * load_i64(args), args)

kernel = kernel_cache.compile_job(double, "void(int64,int64)", "double")
word = np.array([21])
kernel.ctypes(0, word.ctypes.data)
assert word[0] == 42
print("hit" if kernel.cache_hits else "miss")
"""


FACTORY = """
import sys
import numpy as np
from moe_offload.cpu_kernels import kernel_cache
from moe_offload.cpu_kernels.emit import micro_kernel
from moe_offload.cpu_kernels.jit import specialised
from moe_offload.cpu_kernels.memory import load_i64, store_i64

# as a large function would be: kept as a symbol of its own
stay_out = micro_kernel("stay_out", ":v", lambda em: em.b.function.attributes.add("noinline"))

def make(amount):
    @specialised(f"add-{amount}")
    def inner(args):
        stay_out()
        for _ in range(load_i64(args + 8)):
            store_i64(load_i64(args) + amount, args)

    def run(thread, args):
        inner(args)
        inner(args)

    return run

for amount in map(int, sys.argv[1:]):
    kernel = kernel_cache.compile_job(make(amount), "void(int64,int64)", f"add-{amount}")
    word = np.array([0, 3])
    kernel.ctypes(0, word.ctypes.data)
    assert word[0] == 6 * amount, (amount, word)
    print("hit" if kernel.cache_hits else "miss")
"""


def test_kernels_of_one_factory_from_several_processes(tmp_path: Path) -> None:
    """Numba counts functions within a process, so equal names would meet in a third one."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for amounts in (["1"], ["2"], ["1", "2"], ["2", "1"]):
        done = subprocess.run(
            [sys.executable, "-c", FACTORY, *amounts],
            cwd=ROOT, env=environment, timeout=60, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout == "hit\nhit\n"


def _run(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), **more}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT, env=environment, timeout=60, capture_output=True, text=True, check=True,
    )  # fmt: skip


def test_second_process_hits_and_other_sources_miss(tmp_path: Path) -> None:
    assert _run(tmp_path).stdout == "miss\n"
    assert _run(tmp_path).stdout == "hit\n"
    assert _run(tmp_path, "0123456789abcdef").stdout == "miss\n"
    assert _run(tmp_path, "0123456789abcdef").stdout == "hit\n"
    assert _run(tmp_path, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="").stdout == "miss\n"


def test_a_torn_file_costs_a_compilation(tmp_path: Path) -> None:
    _run(tmp_path)
    for data in tmp_path.rglob("*.nbc"):
        data.write_bytes(data.read_bytes()[:100])
    assert _run(tmp_path).stdout == "miss\n"
    assert _run(tmp_path).stdout == "hit\n"


def test_no_place_to_write(tmp_path: Path) -> None:
    # a file where a folder should be: fails for root too, unlike missing permissions
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    done = _run(blocked, TMPDIR=str(tmp_path))
    assert done.stdout == "miss\n"
    assert done.stderr.count("not kept in") == 1
    assert _run(blocked, TMPDIR=str(tmp_path)).stdout == "hit\n"  # the temporary folder served


def test_old_folders_go(tmp_path: Path) -> None:
    for age in range(8):
        folder = tmp_path / f"{age:016x}"
        folder.mkdir()
        os.utime(folder, (1000 - age, 1000 - age))
    (tmp_path / "something else").mkdir()
    keep = tmp_path / f"{7:016x}"
    kernel_cache._prune(tmp_path, keep=keep)
    left = sorted(folder.name for folder in tmp_path.iterdir())
    assert left == [*(f"{age:016x}" for age in (0, 1, 2, 7)), "something else"]


def test_hash_covers_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(kernel_cache, "__file__", str(tmp_path / "kernel_cache.py"))
    first = kernel_cache.sources_hash()
    (tmp_path / "a.py").write_text("a = 2\n")
    assert kernel_cache.sources_hash() != first
