from typing import get_args

import numpy as np
import pytest

from moe_offload.cpu_kernels.activations import make_activate
from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.layout import GATED_ONLY, Activation, ActivationKind
from moe_offload.cpu_kernels.target import current_target
from tests.cpu_kernels.expert_cases import activate as reference

LIMITS = {"swiglu_oai": 7.0, "silu_clamp": 2.0, "silu_cap": 1.5, "silu_softcap": 3.0}
CASES = [(kind, True) for kind in get_args(ActivationKind)] + [(kind, False) for kind in ("silu", "gelu", "relu2")]


@pytest.mark.parametrize(("kind", "gated"), CASES)
def test_activation(kind: ActivationKind, gated: bool) -> None:
    assert gated or kind not in GATED_ONLY
    activation = Activation(kind, limit=LIMITS.get(kind, np.inf))
    intrinsic = make_activate(kind, gated, 1, current_target().lanes)

    @native
    def run(g: int, u: int, h: int, n: int, alpha: float, limit: float) -> None:
        intrinsic(g, u, h, n, np.float32(alpha), np.float32(limit))

    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 88.6, -88.6, 89.0, -104.0, 1e4, -1e4]
    gate = np.concatenate([rng.standard_normal(190) * 4, special]).astype(np.float32)
    gate = np.concatenate([gate, np.array([np.nan, np.inf, -np.inf], np.float32)])
    up = rng.standard_normal(gate.size).astype(np.float32)
    for n in (0, 1, 15, 16, 17, gate.size):
        out = np.full(gate.size, -7, np.float32)
        run(
            gate.ctypes.data, up.ctypes.data, out.ctypes.data, n, activation.alpha,
            activation.limit,
        )  # fmt: skip
        assert (out[n:] == -7).all()
    wide_gate, wide_up = gate.astype(np.float64), up.astype(np.float64)
    wanted = reference(activation, wide_gate, wide_up) if gated else reference(activation, None, wide_gate)
    finite = np.isfinite(wanted)
    # f32 throughout: relative 1e-6; erf and tanh err absolutely by 2e-7 of their factor
    bound = 1e-6 * np.abs(wanted) + 4e-7 * np.abs(gate) * np.maximum(1, np.abs(up)) + 1e-7
    np.testing.assert_array_less(np.abs(out[finite] - wanted[finite]), bound[finite])
    np.testing.assert_array_equal(out[~finite], wanted[~finite])  # NaN where NaN, inf where inf


def test_activations_name_what_they_know() -> None:
    with pytest.raises(ValueError, match="known are silu"):
        Activation("swish")  # type: ignore[arg-type]
