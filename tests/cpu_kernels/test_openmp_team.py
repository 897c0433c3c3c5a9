"""The team on torch's threads: the same bits as our own team, from several Python threads, closed and refused."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_offload.cpu_kernels import Activation, ExpertKernel, ExpertLayout, OpenMPTeam, Team, ThreadTeam
from moe_offload.cpu_kernels.atomics import fetch_add
from moe_offload.cpu_kernels.grouping import group_tokens
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.openmp_team import find_openmp_runtime

H, INNER, E, T = 96, 64, 8, 5


def _count(thread: int, args: int) -> None:
    """Word 0 counts calls, word 1 the thread numbers."""
    fetch_add(args, 1)
    fetch_add(args + 8, thread)


torch.ones(1 << 16).sum()  # whatever torch loads on first use is loaded now
RUNTIME = find_openmp_runtime()
needs_runtime = pytest.mark.skipif(RUNTIME is None, reason="this torch has no OpenMP runtime")


def run(team: Team) -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    weights = [random.standard_normal((E, *shape)).astype(np.float32) for shape in ((INNER, H), (INNER, H), (H, INNER))]
    table = np.zeros((E, 6), np.int64)
    for column, matrix in enumerate(weights):
        table[:, column] = [matrix[e].ctypes.data for e in range(E)]
    index = random.integers(0, E, (T, 2))
    groups = group_tokens(index, np.ones((T, 2), np.float32), E)
    out = np.zeros((T, H), np.float32)
    kernel = ExpertKernel(ExpertLayout(H, INNER, "f32"), Activation("silu"))
    kernel(table, groups, random.standard_normal((T, H)).astype(np.float32), out, team)
    return out


@needs_runtime
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_same_bits_as_our_own_team(threads: int) -> None:
    assert RUNTIME is not None
    with ThreadTeam(2) as own, OpenMPTeam(threads, RUNTIME) as borrowed:
        assert np.array_equal(run(own), run(borrowed))


@needs_runtime
def test_between_torch_operations_and_from_several_threads() -> None:
    assert RUNTIME is not None
    with OpenMPTeam(2, RUNTIME) as team:
        expected = run(team)
        wrong: list[int] = []

        def work() -> None:
            for n in range(20):
                torch.ones(1 << 16).sum()
                if not np.array_equal(run(team), expected):
                    wrong.append(n)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@needs_runtime
@pytest.mark.parametrize("halves", [True, False])
def test_meanwhile(halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a runtime without the two halves, what is to be done meanwhile is done before."""
    assert RUNTIME is not None
    words, seen = np.zeros(3, np.int64), []
    job = compile_job(_count, "void(int64,int64)", "test_openmp_team")

    def meanwhile() -> None:
        until = time.monotonic() + 10
        while halves and words[0] < 1 and time.monotonic() < until:
            time.sleep(0)
        seen.append(int(words[0]))

    def fail() -> None:
        raise KeyboardInterrupt

    with OpenMPTeam(2, RUNTIME) as team:
        if not halves:
            monkeypatch.setattr(team, "_halves", None)
        for _ in range(20):
            words[:] = 0
            team.launch(job.address, words.ctypes.data, meanwhile)
            assert words.tolist() == [2, 1, 0]
        with pytest.raises(KeyboardInterrupt):
            team.launch(job.address, words.ctypes.data, fail)
        team.launch(job.address, words.ctypes.data)
        assert words[0] == (6 if halves else 4)
        torch.ones(1 << 16).sum()
    assert seen == 20 * [int(halves)]


@needs_runtime
def test_closed_team_refuses() -> None:
    assert RUNTIME is not None
    team = OpenMPTeam(2, RUNTIME)
    team.close()
    team.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(team)


def test_a_team_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        OpenMPTeam(0, "unused")


def test_runtime_is_found_by_name(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    row = "7f00-7f01 r-xp 00000000 fe:00 1 {}\n"
    maps.write_text(
        row.format("/usr/lib/libgomp.so.1") + row.format("/x/torch/lib/libgomp.so.1") + row.format("/x/libc.so")
    )
    assert find_openmp_runtime(maps) == "/x/torch/lib/libgomp.so.1"
    maps.write_text(row.format("/usr/lib/libc.so.6"))
    assert find_openmp_runtime(maps) is None
    assert find_openmp_runtime(tmp_path / "absent") is None


def test_a_region_within_fewer_threads_still_finishes() -> None:
    """OMP_THREAD_LIMIT=1 gives every region one thread, whatever it asks for."""
    code = (
        "from tests.cpu_kernels.test_openmp_team import *\n"
        "if RUNTIME:\n"
        "    assert np.array_equal(run(OpenMPTeam(4, RUNTIME)), run(ThreadTeam(1)))\n"
        "print('done')"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"OMP_THREAD_LIMIT": "1", "PATH": "/usr/bin", "HOME": str(Path.home())},
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "done", done.stderr
