import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_offload.cpu_kernels.atomics import fetch_add
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.memory import load_i64, store_i64
from moe_offload.cpu_kernels.processors import _cgroup_cpus, cores_of_threads, default_threads
from moe_offload.cpu_kernels.team import ThreadTeam

ROOT = Path(__file__).parents[2]


def _count(thread: int, args: int) -> None:
    """Word 0 counts calls, word 1 the thread numbers; word 2 is a plain, racy counter."""
    fetch_add(args, 1)
    fetch_add(args + 8, thread)
    if thread == 0:
        store_i64(load_i64(args + 16) + 1, args + 16)


@pytest.fixture(scope="module")
def job() -> Iterator[int]:
    compiled = compile_job(_count, "void(int64,int64)", "test_team")
    yield int(compiled.address)  # the machine code lives as long as `compiled`


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_every_thread_runs_every_job_once(job: int, threads: int) -> None:
    words = np.zeros(3, np.int64)
    with ThreadTeam(threads) as team:
        for _ in range(300):
            team.launch(job, words.ctypes.data)
    assert words.tolist() == [300 * threads, 300 * sum(range(threads)), 300]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_others_begin_meanwhile(job: int, threads: int) -> None:
    words, seen = np.zeros(3, np.int64), []

    def meanwhile() -> None:
        until = time.monotonic() + 10
        while words[0] < threads - 1 and time.monotonic() < until:  # all but this thread
            time.sleep(0)
        seen.append(int(words[0]))

    def fail() -> None:
        raise KeyboardInterrupt

    with ThreadTeam(threads) as team:
        for _ in range(50):
            words[:] = 0
            team.launch(job, words.ctypes.data, meanwhile)
            assert words.tolist() == [threads, sum(range(threads)), 1]
        with pytest.raises(KeyboardInterrupt):
            team.launch(job, words.ctypes.data, fail)
        assert words[0] == 2 * threads
        team.launch(job, words.ctypes.data)
        assert words[0] == 3 * threads
    assert seen == 50 * [threads - 1]


def test_wakes_from_sleep(job: int) -> None:
    words = np.zeros(3, np.int64)
    with ThreadTeam(3) as team:
        for _ in range(20):
            team.launch(job, words.ctypes.data)
            time.sleep(0.002)  # far beyond the spin: all workers are in the futex
    assert words[0] == 60


def test_launches_from_several_python_threads(job: int) -> None:
    words = np.zeros(3, np.int64)
    with ThreadTeam(2) as team:

        def launch() -> None:
            for _ in range(500):
                team.launch(job, words.ctypes.data)

        callers = [threading.Thread(target=launch) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    # the plain counter has lost nothing: launches took turns
    assert words.tolist() == [4000, 2000, 2000]


def test_close_joins_and_stays(job: int) -> None:
    team = ThreadTeam(3)
    words = np.zeros(3, np.int64)
    team.launch(job, words.ctypes.data)
    workers = list(team._workers)
    team.close()
    team.close()
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(RuntimeError, match="closed"):
        team.launch(job, words.ctypes.data)


def test_a_dropped_team_leaves_no_thread(job: int) -> None:
    team = ThreadTeam(2)
    team.launch(job, np.zeros(3, np.int64).ctypes.data)
    (worker,) = team._workers
    del team
    worker.join(timeout=10)
    assert not worker.is_alive()


def test_scratch_is_aligned_and_grows() -> None:
    team = ThreadTeam(1)
    small = team.scratch(100)
    assert small % 64 == 0 and team.scratch(50) == small
    assert team.scratch(1 << 20) % 64 == 0


def test_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ThreadTeam(0)


SCRIPT = """
import os, signal, sys, threading, time
import numpy as np
from tests.cpu_kernels.test_team import _count
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.team import ThreadTeam
kept = compile_job(_count, "void(int64,int64)", "test_team")
words = np.zeros(3, np.int64)
team = ThreadTeam(3)
team.launch(kept.address, words.ctypes.data)
"""


def _python(rest: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    script = SCRIPT + textwrap.dedent(rest)
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=timeout, capture_output=True, text=True)


def test_forked_child_starts_workers_anew() -> None:
    done = _python("""
        child = os.fork()
        before = int(words[0])
        team.launch(kept.address, words.ctypes.data)
        assert words[0] == before + 3
        if child == 0:
            team.close()
            os._exit(7)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        team.launch(kept.address, words.ctypes.data)
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "ending",
    [
        "",  # nobody closes it
        "time.sleep(0.01)",
        "raise SystemExit(0)",
        "keep = threading.Thread(target=lambda: [team.launch(kept.address, words.ctypes.data)"
        " for _ in range(10**9)], daemon=True); keep.start(); time.sleep(0.05)",
    ],
)
def test_interpreter_ends(ending: str) -> None:
    assert _python(ending).returncode == 0


def test_interrupt_ends_the_program() -> None:
    done = _python("""
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        while True:
            team.launch(kept.address, words.ctypes.data)
    """)
    assert "KeyboardInterrupt" in done.stderr


def test_default_threads_obeys_the_quota(tmp_path: Path) -> None:
    assert default_threads() >= 1
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (folder / "cpu.max").write_text("max 100000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert _cgroup_cpus(membership, tmp_path) == 1.5
    membership.write_text("4:cpu,cpuacct:/c\n")
    (tmp_path / "cpu" / "c").mkdir(parents=True)
    (tmp_path / "cpu" / "c" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    assert _cgroup_cpus(membership, tmp_path) == 2.0
    assert _cgroup_cpus(tmp_path / "absent", tmp_path) is None


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU leaves nothing to choose")
def test_workers_keep_to_a_core_each(job: int) -> None:
    """Two threads that the system puts on one core halve every figure; seen without pinning."""
    words = np.zeros(3, np.int64)
    cores = cores_of_threads(2)
    with ThreadTeam(2) as team:
        team.launch(job, words.ctypes.data)
        (worker,) = team._workers
        assert worker.native_id is not None
        if cores:
            assert os.sched_getaffinity(worker.native_id) == {cores[1]}
    assert len(os.sched_getaffinity(0)) >= 2, "the caller's own thread is not ours to pin"


def test_more_threads_than_cores_are_left_to_the_system() -> None:
    assert cores_of_threads(10_000) == []
    assert len(set(cores_of_threads(1))) == 1
