"""Kernels against float64, and the promises about bits.

The product of types, layouts and activations would compile for minutes; the activations have
their own test, so here each type meets each layout and the activations take turns.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moe_offload.cpu_kernels import (
    Activation,
    ExpertKernel,
    ExpertLayout,
    ThreadTeam,
    group_tokens,
)
from tests.cpu_kernels.expert_cases import make_experts, route, run, tolerance

SILU = Activation("silu")
H, I = 67, 37  # noqa: E741  # no multiples of any vector width


def layouts(dtype: Any) -> dict[str, tuple[ExpertLayout, Activation]]:
    oai = Activation("swiglu_oai", limit=1.0)
    return {
        "rows": (ExpertLayout(H, I, dtype), SILU),
        "rows fused": (ExpertLayout(H, I, dtype, gate_up_stride=H), SILU),
        "rows alternating": (ExpertLayout(H, I, dtype, gate_up_stride=2 * H), SILU),
        "rows bias": (ExpertLayout(H, I, dtype, bias=True), SILU),
        "rows plain": (
            ExpertLayout(H, I, dtype, gated=False, bias=True, bias_dtype="f32"),
            Activation("relu2"),
        ),
        "columns": (ExpertLayout(H, I, dtype, transposed=True), Activation("gelu_tanh")),
        "columns fused": (
            ExpertLayout(H, I, dtype, transposed=True, gate_up_stride=2 * I),
            Activation("gelu_tanh"),
        ),
        "columns interleaved": (
            ExpertLayout(
                H, I, dtype, transposed=True, gate_up_stride=2 * I, gate_up_step=2,
                bias=True, bias_step=2,
            ),
            oai,
        ),
    }  # fmt: skip


NAMES = list(layouts("f32"))


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    with ThreadTeam(2) as team:
        yield team


# f16 differs from bf16 in how an element is loaded, and each kernel compiles for seconds
@pytest.mark.parametrize(
    ("dtype", "name"),
    [(dtype, name) for dtype in ("bf16", "f32") for name in NAMES]
    + [("f16", name) for name in ("rows", "rows bias", "columns interleaved")],
)
def test_against_float64(name: str, dtype: str, team: ThreadTeam) -> None:
    layout, activation = layouts(dtype)[name]
    experts = make_experts(layout, activation)
    kernel = ExpertKernel(layout, activation)
    for tokens in (0, 1, 2, 3, 5, 17, 70):
        index, weight = route(tokens, 3, len(experts.table))
        hidden = np.random.default_rng(2).standard_normal((tokens, H)).astype(np.float32)
        out = run(kernel, experts, group_tokens(index, weight, 6), hidden, team)
        wanted = experts.reference(index, weight, hidden)
        np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance(wanted))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (128, 64), (5, 300)])
def test_any_size(size: tuple[int, int], transposed: bool, team: ThreadTeam) -> None:
    activation = Activation("gelu_tanh") if transposed else SILU
    layout = ExpertLayout(*size, "bf16", transposed=transposed)
    experts = make_experts(layout, activation)
    index, weight = route(9, 2, 6)
    hidden = np.random.default_rng(3).standard_normal((9, size[0])).astype(np.float32)
    kernel = ExpertKernel(layout, activation)
    out = run(kernel, experts, group_tokens(index, weight, 6), hidden, team)
    wanted = experts.reference(index, weight, hidden)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance(wanted))


@pytest.mark.parametrize("name", ["rows bias", "columns interleaved"])
@pytest.mark.parametrize("shift", [1, 2, 31])
def test_any_address(name: str, shift: int, team: ThreadTeam) -> None:
    layout, activation = layouts("bf16")[name]
    experts = make_experts(layout, activation, shift=shift)
    index, weight = route(4, 2, 6)
    hidden = np.random.default_rng(3).standard_normal((4, H)).astype(np.float32)
    kernel = ExpertKernel(layout, activation)
    out = run(kernel, experts, group_tokens(index, weight, 6), hidden, team)
    wanted = experts.reference(index, weight, hidden)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance(wanted))


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_thread_count_and_batch(name: str) -> None:
    layout, activation = layouts("bf16")[name]
    experts = make_experts(layout, activation)
    kernel = ExpertKernel(layout, activation)
    index, weight = route(23, 3, 6)
    hidden = np.random.default_rng(4).standard_normal((23, H)).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        with ThreadTeam(threads) as team:
            groups = group_tokens(index, weight, 6)
            results += [run(kernel, experts, groups, hidden, team) for _ in range(3)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    # a token's numbers do not depend on the tokens it is computed with
    with ThreadTeam(2) as team:
        for t in range(0, 23, 4):
            groups = group_tokens(index[t : t + 1], weight[t : t + 1], 6)
            alone = run(kernel, experts, groups, hidden[t : t + 1], team)
            np.testing.assert_array_equal(alone[0], results[0][t])


def test_subset_and_rest_add_up(team: ThreadTeam) -> None:
    layout, activation = layouts("bf16")["rows"]
    experts = make_experts(layout, activation)
    kernel = ExpertKernel(layout, activation)
    index, weight = route(11, 3, 6)
    hidden = np.random.default_rng(5).standard_normal((11, H)).astype(np.float32)
    groups = group_tokens(index, weight, 6)
    mask = np.arange(len(groups.experts)) % 2 == 0
    out = np.zeros_like(hidden)
    kernel(experts.table, groups.select(mask), hidden, out, team)
    wanted = experts.reference(np.where(mask[index], index, 6), weight, hidden)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance(wanted))
    kernel(experts.table, groups.select(~mask), hidden, out, team)
    wanted = experts.reference(index, weight, hidden)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance(wanted))


def test_a_token_may_name_an_expert_twice(team: ThreadTeam) -> None:
    layout, activation = layouts("bf16")["rows"]
    experts = make_experts(layout, activation)
    index, weight = np.array([[2, 2, 1]]), np.array([[0.5, 0.25, 1.0]], np.float32)
    hidden = np.ones((1, H), np.float32)
    kernel = ExpertKernel(layout, activation)
    out = run(kernel, experts, group_tokens(index, weight, 6), hidden, team)
    wanted = experts.reference(index, weight, hidden)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance(wanted))


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_nan_and_infinity_reach_their_token_only(name: str, team: ThreadTeam) -> None:
    layout, activation = layouts("bf16")[name]
    experts = make_experts(layout, activation)
    index, weight = route(5, 2, 6)
    hidden = np.random.default_rng(6).standard_normal((5, H)).astype(np.float32)
    hidden[1, 3], hidden[3, 5] = np.nan, np.inf
    kernel = ExpertKernel(layout, activation)
    out = run(kernel, experts, group_tokens(index, weight, 6), hidden, team)
    assert np.isnan(out[1]).all()
    assert not np.isfinite(out[3]).any()
    assert np.isfinite(out[[0, 2, 4]]).all()


def test_output_is_added_to(team: ThreadTeam) -> None:
    layout, activation = layouts("f32")["rows"]
    experts = make_experts(layout, activation)
    index, weight = route(3, 2, 6)
    hidden = np.random.default_rng(7).standard_normal((3, H)).astype(np.float32)
    kernel = ExpertKernel(layout, activation)
    out = np.full_like(hidden, 3.0)
    kernel(experts.table, group_tokens(index, weight, 6), hidden, out, team)
    wanted = 3.0 + experts.reference(index, weight, hidden)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance(wanted))


def test_mistakes_are_named(team: ThreadTeam) -> None:
    layout, activation = layouts("f32")["rows"]
    experts = make_experts(layout, activation)
    kernel = ExpertKernel(layout, activation)
    hidden = np.ones((2, H), np.float32)
    groups = group_tokens(np.array([[0], [5]]), np.ones((2, 1), np.float32), 6)
    with pytest.raises(ValueError, match=rf"must be \[T, {H}\]"):
        kernel(experts.table, groups, hidden[:, :-1].copy(), hidden[:, :-1].copy(), team)
    with pytest.raises(ValueError, match="no row for"):
        kernel(experts.table[:5].copy(), groups, hidden, hidden.copy(), team)
    with pytest.raises(ValueError, match="no row for"):
        kernel(experts.table, groups, hidden[:1].copy(), hidden[:1].copy(), team)
    table = experts.table.copy()
    table[5, 2] = 0
    with pytest.raises(ValueError, match="no address"):
        kernel(table, groups, hidden, hidden.copy(), team)
    with pytest.raises(ValueError, match="takes a gate"):
        ExpertKernel(ExpertLayout(H, I, "f32", gated=False), Activation("swiglu_oai"))
    with pytest.raises(ValueError, match="gate_up_stride"):
        ExpertLayout(H, I, "f32", gate_up_stride=H - 1)
