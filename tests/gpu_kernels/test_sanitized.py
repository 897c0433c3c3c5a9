"""Every kernel on the CPU once more, with every load and store looked at."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_kernels.host_kernels import SANITIZE, needs_compiler, preloaded_sanitizer

pytestmark = needs_compiler
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Every kernel with every set of macros, and shapes that are odd: what else the tests of this folder do touches the same
# memory in the same way, and compiling for it once more would take minutes.
CHOSEN = (
    "test_kernels_gpu.py::test_on_the_host",
    "test_fused_kernels.py::test_any_shape",
    "test_fused_kernels.py::test_a_table_of_slots_is_read_when_the_kernel_runs",
    "test_attention_kernels.py::test_whatever_is_asked_for",
)

PLANTED = '''
import numpy as np, torch
from tests.gpu_kernels.host_kernels import HostKernels

TEXT = """extern "C" __global__ void copy(const int* x, int* y, int n) {
    if (threadIdx.x <= n) y[threadIdx.x] = x[threadIdx.x];
}"""


def test_copy():
    """One element too many is read and written: the comparison does not see it."""
    x, y = torch.arange(20, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
    HostKernels.of_text(TEXT).get("copy.cu", "copy")((1,), (32,), (x, y, np.int32(20)))
    assert torch.equal(x, y)
'''


def sanitized(*arguments: str, checks: str = "address,alignment,bounds") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(preloaded_sanitizer() if checks else {}), SANITIZE: checks}
    # capture=sys: what the sanitizer says before the process dies is not lost with pytest's own file for it
    options = ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_kernels_touch_no_bytes_but_their_own() -> None:
    """In one process: loading torch and transformers takes the longest."""
    done = sanitized("-m", "not slow and not gpu", *(str(HERE / name) for name in CHOSEN))
    said = done.stdout[-4000:] + done.stderr[-8000:]
    assert done.returncode == 0, said
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 90, said


def test_a_planted_fault_fails_it(tmp_path: Path) -> None:
    test = tmp_path / "test_planted.py"
    test.write_text(PLANTED)
    found = sanitized("--noconftest", str(test))
    assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr and "kernel.cu:2" in found.stderr
    unseen = sanitized("--noconftest", str(test), checks="")
    assert unseen.returncode == 0, "the fault has to be one that only a sanitizer sees"
