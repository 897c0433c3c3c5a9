"""Packed experts against float64, and the promises about bits, about extreme numbers and about memory.

Each kernel compiles for seconds, so every format and group meets one activation, and all ten activations take turns.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.cpu_kernels import Activation, OpenMPTeam, Team, ThreadTeam, find_openmp_runtime, group_tokens
from moe_offload.cpu_kernels.packed_experts import Activations, PackedExpertKernel, both_planes
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, StoredType
from tests.cpu_kernels.expert_cases import route
from tests.cpu_kernels.packed_cases import Guarded, PackedExperts, counted, make_packed, run

ROOT = Path(__file__).parents[2]


class Case(NamedTuple):
    """A kernel, and the precisions of activations that it is tried with."""

    dtype: StoredType
    group: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    modes: tuple[Activations, ...] = ("auto", "int16", "int8")

    def __str__(self) -> str:
        return f"{self.dtype}-{self.group}-{self.activation.kind}-{'exact' if self.modes == EXACT else 'integers'}"

    def record(self, hidden: int = 67, inner: int = 37) -> ExpertRecord:
        if self.dtype == "mxfp4":  # comes in whole groups
            hidden, inner = (-(-size // 32) * 32 for size in (hidden, inner))
        return ExpertRecord(hidden, inner, self.dtype, self.gated, self.bias, self.group)

    def experts(self, hidden: int = 67, inner: int = 37, seed: int = 0) -> PackedExperts:
        return make_packed(self.record(hidden, inner), self.activation, seed=seed)

    def kernel(self, record: ExpertRecord, mode: Activations) -> PackedExpertKernel:
        return PackedExpertKernel(record, self.activation, mode)


EXACT: tuple[Activations, ...] = ("f32",)
SILU, RELU = Activation("silu"), Activation("relu")
INT4 = Case("int4", 32, SILU)
INT4_EXACT = Case("int4", 32, SILU, modes=EXACT)
INT8 = Case("int8", 32, RELU, gated=False)
MXFP4 = Case("mxfp4", 32, Activation("swiglu_oai", limit=2.0), bias=True)
CASES = [
    INT4,
    Case("int4", 64, Activation("gelu"), gated=False, bias=True),
    Case("int4", 128, Activation("silu_softcap", alpha=4.0, limit=3.0)),
    INT8,
    Case("int8", 64, Activation("gelu_tanh"), bias=True),
    Case("int8", 128, Activation("silu_clamp", limit=1.0)),
    MXFP4,
    INT4_EXACT,
    Case("int8", 64, Activation("relu2"), gated=False, modes=EXACT),
    Case("int8", 128, Activation("gelu_quick"), bias=True, modes=EXACT),
    Case("mxfp4", 32, Activation("silu_cap", limit=1.0), modes=EXACT),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    with ThreadTeam(2) as team:
        yield team


def draw(tokens: int, width: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, width)).astype(np.float32)


@every_case
@settings(max_examples=10, deadline=None)
@given(data=st.data(), hidden=st.integers(1, 200), inner=st.integers(1, 200), tokens=st.integers(1, 70))
def test_against_float64(case: Case, team: Team, data: st.DataObject, hidden: int, inner: int, tokens: int) -> None:
    mode = data.draw(st.sampled_from(case.modes))
    choices, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 2**32 - 1))
    experts = case.experts(hidden, inner, seed)
    index, weight = route(tokens, choices, 6, seed)
    x = draw(tokens, experts.record.hidden_size, seed)
    out = run(case.kernel(experts.record, mode), experts, group_tokens(index, weight, 6), x, team)
    wanted, room = experts.reference(index, weight, x, mode)
    off = np.abs(out - wanted) / room
    assert off.max() <= 1, f"{off.max():.2f} times what may be, at {np.argwhere(off > 1)[:5].tolist()}"


@every_case
@pytest.mark.parametrize("size", [(1, 1), (128, 128), (129, 127)])
def test_sizes_at_the_edge(case: Case, size: tuple[int, int], team: Team) -> None:
    experts = case.experts(*size)
    index, weight = route(9, 2, 6)
    x = draw(9, experts.record.hidden_size)
    for mode in case.modes:
        out = run(case.kernel(experts.record, mode), experts, group_tokens(index, weight, 6), x, team)
        wanted, room = experts.reference(index, weight, x, mode)
        assert np.all(np.abs(out - wanted) <= room)


@every_case
def test_precision_of_each_mode(case: Case, team: Team) -> None:
    """What the kernel's docstring says of normal activations."""
    experts = case.experts(192, 160)
    index, weight = route(16, 3, 6)
    x = draw(16, 192)
    for mode in case.modes:
        out = run(case.kernel(experts.record, mode), experts, group_tokens(index, weight, 6), x, team)
        wanted, _ = experts.reference(index, weight, x)
        error = np.abs(out - wanted).max() / np.abs(wanted).max()
        assert error < {"f32": 2e-6, "int16": 8e-5, "int8": 3e-2, "auto": 3e-2}[mode]


@every_case
def test_every_number_of_rows(case: Case, team: Team) -> None:
    """Tiles of 1, 2, 4 and 8 rows, chunks of 64, and what is left of them; rows that nobody gets."""
    counts = [0, 1, 65, 2, 3, 4, 5, 64, 8, 9, 7]
    experts = make_packed(case.record(), case.activation, count=len(counts))
    index, weight = counted(counts)
    x = draw(len(index), experts.record.hidden_size)
    groups = group_tokens(index, weight, len(counts))
    assert np.diff(groups.offsets).tolist() == counts[1:]
    for mode in case.modes:
        out = run(case.kernel(experts.record, mode), experts, groups, x, team)
        wanted, room = experts.reference(index, weight, x, mode)
        assert np.all(np.abs(out - wanted) <= room)


@every_case
def test_same_bits_for_any_threads(case: Case) -> None:
    experts = case.experts(200, 172)
    index, weight = route(23, 3, 6)
    x = draw(23, experts.record.hidden_size)
    groups = group_tokens(index, weight, 6)
    runtime = find_openmp_runtime()
    teams: list[Team] = [ThreadTeam(threads) for threads in (1, 2, 3, 4)]
    teams += [OpenMPTeam(threads, runtime) for threads in (1, 2, 3)] if runtime else []
    kernels = [case.kernel(experts.record, mode) for mode in case.modes]
    results = [[run(kernel, experts, groups, x, team) for kernel in kernels] for team in teams]
    for team in teams:
        team.close()
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@every_case
def test_a_token_alone_has_the_bits_it_has_among_others(case: Case, team: Team) -> None:
    """Save in auto, where the number of an expert's rows decides between int16 and int8."""
    experts = case.experts()
    index, weight = route(23, 3, 6)
    x = draw(23, experts.record.hidden_size)
    for mode in case.modes:
        if mode == "auto":
            continue
        kernel = case.kernel(experts.record, mode)
        together = run(kernel, experts, group_tokens(index, weight, 6), x, team)
        for t in range(23):
            groups = group_tokens(index[t : t + 1], weight[t : t + 1], 6)
            np.testing.assert_array_equal(run(kernel, experts, groups, x[t : t + 1], team)[0], together[t])


@pytest.mark.parametrize("case", [INT4, INT8, MXFP4], ids=str)
def test_auto_is_int16_for_few_rows_and_int8_for_many(case: Case, team: Team) -> None:
    experts = case.experts()
    most = both_planes(case.dtype, "auto")
    few, many = counted([most, 1, 0, most, 1, 0]), counted([most + 1, 0, most + 3, 12, 0, 8])
    expected: list[tuple[Any, Activations]] = [(few, "int16"), (many, "int8")]
    for (index, weight), mode in expected:
        x = draw(len(index), experts.record.hidden_size)
        groups = group_tokens(index, weight, 6)
        auto, plain = case.kernel(experts.record, "auto"), case.kernel(experts.record, mode)
        np.testing.assert_array_equal(run(auto, experts, groups, x, team), run(plain, experts, groups, x, team))


@every_case
def test_nan_and_infinity_stay_with_their_token(case: Case, team: Team) -> None:
    experts = case.experts()
    index, weight = route(9, 2, 6)
    x = draw(9, experts.record.hidden_size)
    clean = x.copy()
    x[1, 3], x[3, 5], x[6, 66], x[6, 0] = np.nan, np.inf, -np.inf, np.inf
    others = [0, 2, 4, 5, 7, 8]
    for mode in case.modes:
        kernel = case.kernel(experts.record, mode)
        out = run(kernel, experts, group_tokens(index, weight, 6), x, team)
        if mode == "f32":  # an infinity is one as long as the activation keeps it
            assert np.isnan(out[1]).all()
        else:
            assert np.isnan(out[[1, 3, 6]]).all()
        wanted = run(kernel, experts, group_tokens(index, weight, 6), clean, team)
        np.testing.assert_array_equal(out[others], wanted[others])


@pytest.mark.parametrize("case", [INT4, INT8, INT4_EXACT], ids=str)
def test_zero_and_what_counts_as_zero(case: Case, team: Team) -> None:
    """Without biases nothing comes of nothing, and of what is below 1e-30 (denormal numbers are)."""
    experts = case.experts()
    index, weight = route(5, 2, 6)
    x = draw(5, 67)
    for mode in case.modes:
        for factor in (0.0, 1e-32, 1e-40):
            tiny = x * np.float32(factor)
            out = run(case.kernel(experts.record, mode), experts, group_tokens(index, weight, 6), tiny, team)
            assert not out.any() or (mode == "f32" and factor and np.abs(out).max() < 1e-30)


@pytest.mark.parametrize("factor", [1e-28, 1e-10, 1e10, 1e18])
def test_small_and_large_activations(factor: float, team: Team) -> None:
    """relu and no gate: the outputs are as many times larger as the inputs are."""
    experts = INT8.experts()
    index, weight = route(5, 2, 6)
    x = draw(5, 67) * np.float32(factor)
    for mode in INT8.modes:
        out = run(INT8.kernel(experts.record, mode), experts, group_tokens(index, weight, 6), x, team)
        wanted, _ = experts.reference(index, weight, x)
        assert np.abs(out - wanted).max() < (8e-5 if mode == "int16" else 3e-2) * np.abs(wanted).max()


@pytest.mark.parametrize("case", [INT4, INT8], ids=str)
@pytest.mark.parametrize("scale", [3e-6, 1e-4, 3e3])
def test_weights_with_extreme_scales(case: Case, scale: float, team: Team) -> None:
    """f16 scales among its subnormal numbers, and near its largest."""
    experts = make_packed(case.record(), case.activation, scale=scale)
    index, weight = route(5, 2, 6)
    x = draw(5, 67) * np.float32(1 / scale)
    out = run(case.kernel(experts.record, "int16"), experts, group_tokens(index, weight, 6), x, team)
    wanted, room = experts.reference(index, weight, x, "int16")
    assert np.abs(wanted).max() > 0
    assert np.abs(out - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_the_nan_of_an_mxfp4_scale(team: Team) -> None:
    """255 stands for NaN. In `down` it is that output's alone."""
    experts = MXFP4.experts(96, 64)
    record, layout = experts.record, experts.record.down_matrix
    for place in experts.records:
        down = place[record.offsets[2] :][: layout.nbytes].reshape(layout.blocks, layout.records, layout.record_bytes)
        down[2, 0, layout.scales_at + 32 + 7] = 255  # block 2, second group, output 7
    index, weight = route(6, 2, 6)
    x = draw(6, 96)
    for mode in MXFP4.modes:
        out = run(MXFP4.kernel(record, mode), experts, group_tokens(index, weight, 6), x, team)
        assert np.isnan(out[:, 71]).all()
        assert np.isfinite(np.delete(out, 71, axis=1)).all()


def test_output_is_added_to_and_a_subset_and_its_rest_add_up(team: Team) -> None:
    experts = INT4.experts()
    kernel = INT4.kernel(experts.record, "int16")
    index, weight = route(11, 3, 6)
    x = draw(11, 67)
    groups = group_tokens(index, weight, 6)
    mask = np.arange(len(groups.experts)) % 2 == 0
    out = np.full_like(x, 3.0)
    for chosen in (mask, ~mask):
        kernel(experts.table, groups.select(chosen), x, out, team)
    wanted, room = experts.reference(index, weight, x, "int16")
    assert np.all(np.abs(out - 3.0 - wanted) <= room + 1e-5)
    before = out.copy()
    kernel(experts.table, groups.select(np.zeros_like(mask)), x, out, team)  # nobody is active
    np.testing.assert_array_equal(out, before)


def test_mistakes_are_named(team: Team) -> None:
    experts = INT4.experts()
    kernel = INT4.kernel(experts.record, "auto")
    x = np.ones((2, 67), np.float32)
    groups = group_tokens(np.array([[0], [5]]), np.ones((2, 1), np.float32), 6)
    with pytest.raises(ValueError, match=r"must be \[T, 67\]"):
        kernel(experts.table, groups, x[:, :-1].copy(), x[:, :-1].copy(), team)
    with pytest.raises(ValueError, match="no row for"):
        kernel(experts.table[:5].copy(), groups, x, x.copy(), team)
    with pytest.raises(ValueError, match="no row for"):
        kernel(experts.table, groups, x[:1].copy(), x[:1].copy(), team)
    table = experts.table.copy()
    table[5, 2] = 0
    with pytest.raises(ValueError, match="no address"):
        kernel(table, groups, x, x.copy(), team)
    with pytest.raises(ValueError, match="takes a gate"):
        PackedExpertKernel(INT8.record(), Activation("swiglu_oai"))
    with pytest.raises(ValueError, match="activations='int7'"):
        PackedExpertKernel(INT4.record(), SILU, "int7")  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_nothing_beside_the_memory_given_is_touched() -> None:
    """In a process of its own, because a mistake ends it: see `guarded`."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.cpu_kernels.test_packed_experts import guarded; guarded()"],
        cwd=ROOT, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"the last of these: {done.stdout}\n{done.stderr}"


def guarded() -> None:
    """Records, hidden and out end at (begin behind) pages that may not be touched."""
    with ThreadTeam(2) as team:
        for case in CASES:
            for hidden, inner in ((67, 37), (1, 1), (200, 130)):
                for at_end in (True, False):
                    sys.stdout.write(f"{case} {hidden} {inner} {at_end}\n")
                    sys.stdout.flush()
                    experts = make_packed(case.record(hidden, inner), case.activation, count=3, at_end=at_end)
                    for tokens in (1, 2, 3, 9, 66):
                        index, weight = route(tokens, 2, 3)
                        values = draw(tokens, experts.record.hidden_size)
                        x = Guarded(values.nbytes, at_end).rows(values)
                        out = Guarded(values.nbytes, at_end).rows(np.zeros_like(values))
                        for mode in case.modes:
                            kernel = case.kernel(experts.record, mode)
                            kernel(experts.table, group_tokens(index, weight, 3), x, out, team)
