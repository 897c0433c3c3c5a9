"""Experts of a layer for few tokens: the CUDA sources on the CPU, against float64."""

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.cpu_kernels import Activation
from moe_offload.cpu_kernels.layout import GATED_ONLY
from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.gpu_kernels.activation import KINDS
from moe_offload.gpu_kernels.fused_experts import MAX_PAIRS, FusedExperts, export_layer
from moe_offload.gpu_kernels.launch import KernelError
from moe_offload.gpu_kernels.sources import read_source
from moe_offload.gpu_kernels.torch_experts import DeviceActivation, DeviceRecord
from tests.gpu_kernels.fused_cases import EXPERTS, FusedCase, expected, fused, fused_case, run_fused, slots_of
from tests.gpu_kernels.host_kernels import ORDERS, HostKernels, needs_compiler, numbers_only
from tests.gpu_kernels.test_torch_experts import FORMATS, activation_of, sized
from tests.gpu_kernels.test_torch_experts import KINDS as ACTIVATIONS

pytestmark = needs_compiler
SILU = Activation("silu")
# As a share of the largest output. Quantised weights: activations of both products are rounded to 16 bits, half a
# step of 1 / 32512 of the largest of 32; errors of a sum's terms are independent. Stored ones: f32 sums.
TOLERANCE = {True: 6e-5, False: 2e-6}
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the output's own type


def check(case: FusedCase, out: torch.Tensor) -> None:
    wanted = expected(case)
    room = (TOLERANCE[case.record.packed] + ROUNDED[out.dtype]) * np.abs(wanted).max()
    np.testing.assert_allclose(out.to(torch.float64).numpy(), wanted, rtol=0, atol=room)


@pytest.mark.parametrize(("dtype", "group"), FORMATS)
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_every_format(dtype: str, group: int, tokens: int, bias: bool) -> None:
    case = fused_case(sized(dtype, group, True, bias, 136, 72), SILU, tokens, 3)  # type: ignore[arg-type]
    run = run_fused(case, HostKernels())
    check(case, run.out)
    assert torch.equal(run.host.hidden, case.hidden)
    assert torch.equal(run.host.index, case.choices) and torch.equal(run.host.weights, case.weights)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["int4", "bf16"])
def test_every_activation(kind: str, gated: bool, dtype: str) -> None:
    if kind in GATED_ONLY and not gated:
        pytest.skip("needs a gate")
    case = fused_case(sized(dtype, 32, gated, True), activation_of(kind), 2, 2)  # type: ignore[arg-type]
    check(case, run_fused(case, HostKernels()).out)


def test_kinds_are_numbered_alike() -> None:
    assert set(KINDS) == set(ACTIVATIONS)


@numbers_only
@pytest.mark.parametrize("arch", [600, 610])
@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4", "f16"])
def test_any_order_of_threads_gives_the_same_bits(arch: int, dtype: str) -> None:
    case = fused_case(sized(dtype, 32, True, True, 256, 96), SILU, 6, 3)  # type: ignore[arg-type]
    outs = [run_fused(case, HostKernels(order, arch)).out for order in ORDERS]
    check(case, outs[0])
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4"])
def test_both_branches_of_the_byte_product_give_the_same_bits(dtype: str) -> None:
    case = fused_case(sized(dtype, 32, True, False, 160, 64), SILU, 3, 2)  # type: ignore[arg-type]
    assert torch.equal(run_fused(case, HostKernels(arch=600)).out, run_fused(case, HostKernels(arch=610)).out)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    dtype, group = data.draw(st.sampled_from(FORMATS))
    unit = 32 if dtype == "mxfp4" else 1
    hidden, inner = (unit * data.draw(st.integers(1, 200 // unit)) for _ in range(2))
    top_k = data.draw(st.integers(1, EXPERTS))
    tokens = data.draw(st.integers(1, 9))
    record = ExpertRecord(hidden, inner, dtype, data.draw(st.booleans()), data.draw(st.booleans()), group)
    case = fused_case(record, SILU, tokens, top_k)
    check(case, run_fused(case, HostKernels(data.draw(st.integers(0, 5)))).out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["int4", "bf16"])
def test_the_models_type(dtype: torch.dtype, weights: str) -> None:
    case = fused_case(sized(weights, 32, True, False), SILU, 3, 2, dtype)  # type: ignore[arg-type]
    run = run_fused(case, HostKernels())
    check(case, run.out)
    assert torch.equal(run.host.hidden, case.hidden.to(torch.float32))


@pytest.mark.parametrize("dtype", ["int4", "f32"])
def test_a_table_of_slots_is_read_when_the_kernel_runs(dtype: str) -> None:
    case = fused_case(sized(dtype, 32, True, True), SILU, 5, 3)  # type: ignore[arg-type]
    check(case, run_fused(case, HostKernels(), by_table=True).out)


def test_in_one_launch_or_in_many() -> None:
    case = fused_case(sized("int4", 32, True, False), SILU, 4, 3)
    outs = [run_fused(case, HostKernels(), launches=n).out for n in (1, 3)]
    assert torch.equal(*outs)


def test_rows_that_are_not_dense_and_experts_of_others() -> None:
    case = fused_case(sized("int4", 32, True, False), SILU, 3, 2)
    wide = torch.zeros(3, 2 * case.record.hidden_size)
    wide[:, : case.record.hidden_size] = case.hidden
    seen = wide[:, : case.record.hidden_size]
    index = case.choices.clone()
    index[case.choices == EXPERTS - 1] = EXPERTS + 7  # nobody's here, like the last expert
    check(case, run_fused(case._replace(hidden=seen, choices=index), HostKernels(), by_table=True).out)


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4", "bf16"])
def test_nan_and_infinity_stay_in_their_token(dtype: str) -> None:
    case = fused_case(sized(dtype, 32, True, False), SILU, 3, 2)  # type: ignore[arg-type]
    case.choices[:] = torch.tensor([0, 1])
    case.hidden[1, 5] = inf
    case.hidden[2, 0] = torch.nan
    found = run_fused(case, HostKernels()).out
    assert torch.isfinite(found[0]).all() and not torch.isfinite(found[1]).any() and torch.isnan(found[2]).all()


def test_zeros_and_tiny_and_huge_rows() -> None:
    case = fused_case(sized("int4", 32, True, False), SILU, 4, 2)
    case.hidden[0] = 0
    case.hidden[1] *= 1e-35
    case.hidden[2] *= 1e4
    case.hidden[3, 1] = 3e4  # one that dwarfs its group: of the others half of 3e4 / 32512 is not known
    found, wanted = run_fused(case, HostKernels()).out, expected(case)
    for t in range(4):
        np.testing.assert_allclose(found[t].numpy(), wanted[t], rtol=0, atol=5e-4 * np.abs(wanted[t]).max())


def test_what_does_not_fit_is_refused() -> None:
    case = fused_case(sized("int4", 32, True, False), SILU, 2, 2)
    layer = fused(case, HostKernels())
    with pytest.raises(ValueError, match=f"2000 pairs: 1 to {MAX_PAIRS}"):
        layer.workspace(1000, 2)
    space = layer.workspace(2, 2)
    memory = torch.zeros(space.nbytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the workspace needs"):
        layer.begin(space, memory[:-1], case.hidden, case.choices, case.weights)
    with pytest.raises(ValueError, match="holds no record"):
        layer.add(space, memory, [0], [slots_of(case, memory.device)[0][:100]])
    with pytest.raises(ValueError, match="the table is int64 of 5"):
        layer.add_by_table(space, memory, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="dense rows"):
        export_layer(HostKernels(), case.hidden.T, case.choices, case.weights, EXPERTS, (None, None, None))
    record = DeviceRecord(32, 32, "fp8", True, False, 32, (0, 0, 0, 0, 0, 0), 0)
    with pytest.raises(ValueError, match="experts of fp8 have no kernel"):
        FusedExperts(record, DeviceActivation("silu"), HostKernels(), 4)


@numbers_only
@pytest.mark.parametrize(
    ("what", "was", "becomes"),
    [
        ("a barrier", "__syncthreads();\n        const int output", "const int output"),
        ("the pairs' barrier", "*found = count;\n    }\n    __syncthreads();", "*found = count;\n    }"),
        ("a warp's turn", "step += warps", "step += warps + 1"),
        ("the zero point", "0xf8f8f8f8u", "0xf9f9f9f9u"),
        ("a scale", "codes.scales[4 + j]", "codes.scales[j]"),
    ],
)  # fmt: skip
def test_planted_mistakes_are_found(what: str, was: str, becomes: str) -> None:
    text = read_source("packed_experts.cu")
    assert was in text, what
    case = fused_case(sized("int4", 32, True, False, 256, 96), SILU, 5, 2)
    good = HostKernels()

    class Planted:
        def __init__(self, order: int) -> None:
            self.bad = HostKernels.of_text(text.replace(was, becomes), order)

        def get(self, source: str, name: str, macros: tuple[tuple[str, int], ...] = ()):  # type: ignore[no-untyped-def]
            return (self.bad if source == "packed_experts.cu" else good).get(source, name, macros)

    found = []
    for order in ORDERS:
        try:
            check(case, run_fused(case, Planted(order)).out)
        except (AssertionError, KernelError):
            found.append(order)
    assert found, f"{what} was not missed by any order"
