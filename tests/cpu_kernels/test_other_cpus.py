"""The code paths of other CPUs, run here: AVX2, and x86-64's baseline without FMA and F16C."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")
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
