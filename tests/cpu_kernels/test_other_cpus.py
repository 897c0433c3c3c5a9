"""The code paths of other CPUs, run here: AVX-512 without VNNI, AVX2, and x86-64's baseline without FMA and F16C."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_offload.cpu_kernels.target import current_target

ROOT = Path(__file__).parents[2]
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")
SCRIPT = """
import json
import sys
import numpy as np
from moe_offload.cpu_kernels import Activation, ExpertKernel, ExpertLayout, ThreadTeam
from moe_offload.cpu_kernels import group_tokens
from moe_offload.cpu_kernels.target import current_target
from tests.cpu_kernels.expert_cases import make_experts, route, run, tolerance

H, I = 67, 37
cases = [
    (ExpertLayout(H, I, "bf16", bias=True), Activation("silu")),
    (ExpertLayout(H, I, "f16", transposed=True, gate_up_stride=2 * I, gate_up_step=2),
     Activation("swiglu_oai", limit=1.0)),
]
if len(sys.argv) > 1:
    cases = cases[1:]
with ThreadTeam(2) as team:
    for layout, activation in cases:
        experts = make_experts(layout, activation)
        kernel = ExpertKernel(layout, activation)
        for tokens in (1, 3, 17):
            index, weight = route(tokens, 3, 6)
            hidden = np.random.default_rng(2).standard_normal((tokens, H)).astype(np.float32)
            out = run(kernel, experts, group_tokens(index, weight, 6), hidden, team)
            wanted = experts.reference(index, weight, hidden)
            np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance(wanted))
target = current_target()
print(json.dumps([target.lanes, target.fma, target.half]))
"""


# Prints what the target has, a hash of the outputs of each packed kernel, and which of some instructions are in the
# machine code of the inner loops. The argument: names of formats.
PACKED_SCRIPT = """
import hashlib
import json
import re
import sys
import numba
import numpy as np
from moe_offload.cpu_kernels import Activation, ThreadTeam, group_tokens
from moe_offload.cpu_kernels.activation_rows import arithmetic_for, make_quantise
from moe_offload.cpu_kernels.packed_experts import PackedExpertKernel
from moe_offload.cpu_kernels.packed_layout import ZERO_POINT, ExpertRecord
from moe_offload.cpu_kernels.panel import make_panel
from moe_offload.cpu_kernels.target import current_target
from tests.cpu_kernels.expert_cases import route
from tests.cpu_kernels.packed_cases import make_packed, run

target = current_target()
hashes, found = {}, set()
with ThreadTeam(2) as team:
    for dtype in sys.argv[1].split():
        record = ExpertRecord(96, 160, dtype)
        experts = make_packed(record, Activation("silu"))
        kernel = PackedExpertKernel(record, Activation("silu"), "int16")
        digest = hashlib.sha256()
        for tokens in (1, 3, 17):
            index, weight = route(tokens, 3, 6)
            hidden = np.random.default_rng(2).standard_normal((tokens, 96)).astype(np.float32)
            out = run(kernel, experts, group_tokens(index, weight, 6), hidden, team)
            wanted, room = experts.reference(index, weight, hidden, "int16")
            assert np.all(np.abs(out - wanted) <= room)
            digest.update(out.tobytes())
        hashes[dtype] = digest.hexdigest()
        layout = record.up_matrix
        arithmetic = arithmetic_for(dtype, False, target)
        panel = make_panel(layout, arithmetic, 2, 1, target)
        quantise = make_quantise(arithmetic, 32, ZERO_POINT[dtype], target)

        @numba.cfunc("void(int64,int64)", nopython=True)
        def inner(a, b):
            quantise(a, b, a, b, b, b)
            panel(a, b, a, b, a, b)

        code = inner.inspect_llvm() and inner._library.get_asm_str()
        found.update(re.findall(r"zmm|ymm|vpdpbusd|vpmaddubsw|pmaddwd|pshufb|vfmadd|vcvtph2ps", code))
print(json.dumps([target.lanes, target.int_lanes, target.fma, target.byte_dot, target.byte_shuffle, hashes,
                  sorted(found)]))
"""


@needs_x86
@pytest.mark.parametrize(
    ("cpu", "features", "expected"),
    [
        ("haswell", "", [8, True, True]),
        ("x86-64", "", [4, False, False]),
        ("x86-64", "+avx", [8, False, False]),  # Sandy Bridge: wide, but neither FMA nor F16C
    ],
)
def test_kernels_held_to_another_cpu(cpu: str, features: str, expected: list[object]) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(["f16 only"] if features else [])],
        cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def packed_on(cpu: str | None, features: str, formats: str) -> tuple[list[Any], dict[str, str], set[str]]:
    """What PACKED_SCRIPT prints when it is held to a CPU (None: this one)."""
    environment = dict(os.environ)
    if cpu is not None:
        environment |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", PACKED_SCRIPT, formats],
        cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *traits, hashes, found = json.loads(done.stdout)
    return traits, hashes, set(found)


AVX2_ONLY = {"ymm", "pmaddwd", "vfmadd", "vcvtph2ps"}


@needs_x86
def test_packed_experts_have_the_same_bits_wherever_there_is_fma() -> None:
    """Sums of integers are exact, and what is added in f32 is added in one order with one rounding."""
    host = current_target()
    formats = "int4 int8 mxfp4"
    traits, haswell, code = packed_on("haswell", "", formats)
    assert traits == [8, 8, True, False, True]
    assert code == AVX2_ONLY | {"vpmaddubsw", "pshufb"}
    if host.fma:
        assert packed_on(None, "", formats)[1] == haswell
    if host.int_lanes == 16:  # AVX-512BW: what Skylake needs
        traits, skylake, code = packed_on("skylake-avx512", "", "int4")
        assert traits == [16, 16, True, False, True]
        assert "zmm" in code and "vpdpbusd" not in code
        assert skylake["int4"] == haswell["int4"]


@needs_x86
def test_packed_experts_without_fma() -> None:
    """The baseline, and Sandy Bridge with wide floats and narrow integers: the same bits as each other."""
    # of all formats mxfp4 has the most code, and these compile the slowest
    traits, baseline, code = packed_on("x86-64", "", "mxfp4")
    assert traits == [4, 4, False, False, False]
    assert code == {"pmaddwd"}
    traits, sandy_bridge, code = packed_on("x86-64", "+avx", "mxfp4")
    assert traits == [8, 4, False, False, True]
    assert code <= {"pmaddwd", "pshufb", "ymm"}
    assert sandy_bridge == baseline
