"""Stages of a decode step: chains, heads, routing against NumPy, for every team, the same bits for all of them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.cpu_kernels import OpenMPTeam, Team, ThreadTeam, group_tokens
from moe_offload.cpu_kernels import experts_block as experts_word
from moe_offload.cpu_kernels.hand_over import HandOver
from moe_offload.cpu_kernels.heads import COUNTERS as HEADS_COUNTERS
from moe_offload.cpu_kernels.heads import HeadsShape, HeadsStage, heads_job
from moe_offload.cpu_kernels.layout import WeightType
from moe_offload.cpu_kernels.matrices import Matrix, MatrixKernel, Norm
from moe_offload.cpu_kernels.matrix_block import COUNTERS as MATRIX_COUNTERS
from moe_offload.cpu_kernels.openmp_team import find_openmp_runtime
from moe_offload.cpu_kernels.route import COUNTERS as ROUTE_COUNTERS
from moe_offload.cpu_kernels.route import CutsTable, RouteStage, route_job
from moe_offload.cpu_kernels.stages import Chain, Stage
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import aligned_bytes
from tests.cpu_kernels.expert_cases import decode, encode
from tests.cpu_kernels.stage_cases import choose, random, rms_norm, rotate, rounded

TYPES = ["f32", "bf16", *(["f16"] if current_target().half else [])]
STEP = {"f32": 2.0**-22, "bf16": 2.0**-8, "f16": 2.0**-10}  # two roundings of a value near 1, relative


@pytest.fixture(params=[1, 2, 4, "openmp"], scope="module")
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    if request.param == "openmp":
        runtime = find_openmp_runtime()
        if runtime is None:
            pytest.skip("this torch has no OpenMP runtime")
        with OpenMPTeam(2, runtime) as borrowed:
            yield borrowed
    else:
        with ThreadTeam(request.param) as own:
            yield own


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class Heads(NamedTuple):
    """T tokens' projections, and a cache [T, Hkv, L, D] of stored elements for keys and for values."""

    shape: HeadsShape
    tokens: int
    dtype: WeightType
    norms: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def data(self) -> list[NDArray[np.float32]]:
        s, t = self.shape, self.tokens
        return [
            rounded(3 * random(t, n, s.head_size, seed=n + t), self.dtype) for n in (s.q_heads, s.kv_heads, s.kv_heads)
        ]

    def angles(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        angle = np.arange(self.tokens * self.shape.half, dtype=np.float32).reshape(self.tokens, -1)
        return rounded(np.cos(angle), self.dtype), rounded(np.sin(angle), self.dtype)

    def run(self, team: Team, position: int = 2, length: int = 4) -> list[NDArray[Any]]:
        """The queries, and the keys and values at `position` of the caches; everything else must stay zero."""
        s, (queries, keys, values), (cos, sin) = self.shape, self.data(), self.angles()
        shape = s
        if self.norms is not None:
            shape = s._replace(q_norm=address(self.norms[0]), k_norm=address(self.norms[1]))
        stage = HeadsStage(
            shape,
            self.tokens,
            address(queries),
            address(keys),
            address(values),
            self.dtype,
            self.dtype,
        )
        caches = [
            encode(np.zeros((self.tokens, s.kv_heads, length, s.head_size), np.float32), self.dtype) for _ in "kv"
        ]
        stage.point(address(cos), address(sin), cos.strides[0])
        batch, head, place = caches[0].strides[:3]
        stage.place(address(caches[0]), address(caches[1]), (batch, head, place), position)
        chain = Chain([Stage(heads_job().address, stage.block, HEADS_COUNTERS)])
        chain.run(team)
        for cache in caches:
            rest = np.delete(decode(cache), position, axis=2)
            assert not rest.any()
        return [queries, *(decode(cache)[:, :, position].astype(np.float32) for cache in caches)]

    def reference(self) -> list[NDArray[np.float32]]:
        s, data, (cos, sin) = self.shape, self.data(), self.angles()
        found = []
        for which, x in enumerate(data):
            if self.norms is not None and which < 2:
                weight = self.norms[which]
                flat = x.reshape(self.tokens, 1, -1) if s.whole else x
                x = rms_norm(flat, weight, s.epsilon, self.dtype).reshape(x.shape)
            if s.clip:
                x = rounded(np.clip(x, -s.clip, s.clip), self.dtype)
            if which < 2 and s.half:
                x = rotate(x, cos[:, None], sin[:, None], self.dtype)
            found.append(x)
        return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        (HeadsShape(4, 2, 16, 8), False),
        (HeadsShape(4, 2, 16, 8), True),
        (HeadsShape(6, 3, 24, 5), True),  # the first 10 of 24 elements are turned
        (HeadsShape(2, 1, 67, 33, epsilon=0.5), True),
        (HeadsShape(4, 4, 16, 8, whole=True, clip=0.7), True),
        (HeadsShape(2, 1, 8, 0, clip=1.7), False),  # in bf16 the limit is rounded up
        (HeadsShape(1, 1, 1, 0), False),
    ],
)
def test_heads(shape: HeadsShape, norm: bool, dtype: str, team: Team) -> None:
    for tokens in (1, 3):
        widths = [n * shape.head_size if shape.whole else shape.head_size for n in (shape.q_heads, shape.kv_heads)]
        norms = tuple(1 + random(width, seed=width) / 4 for width in widths) if norm else None
        heads = Heads(shape, tokens, dtype, norms)  # type: ignore[arg-type]
        found, expected = heads.run(team), heads.reference()
        with ThreadTeam(1) as alone:
            assert all(np.array_equal(a, b) for a, b in zip(found, heads.run(alone), strict=True))
        assert np.array_equal(found[2], expected[2])
        for a, b in zip(found, expected, strict=True):
            assert np.abs(a - b).max() <= 2 * STEP[dtype] * np.abs(b).max()


def test_one_angle_for_all_tokens() -> None:
    heads = Heads(HeadsShape(2, 1, 8, 4), 3, "f32")
    queries, keys, values = heads.data()
    cos, sin = (part[1].copy() for part in heads.angles())
    expected = rotate(queries, cos, sin, "f32")
    stage = HeadsStage(heads.shape, 3, address(queries), address(keys), address(values), "f32", "f32")
    caches = [np.zeros((3, 1, 1, 8), np.float32) for _ in "kv"]
    stage.point(address(cos), address(sin), 0)
    batch, head, place, _ = caches[0].strides
    stage.place(address(caches[0]), address(caches[1]), (batch, head, place), 0)
    with ThreadTeam(2) as team:
        Chain([Stage(heads_job().address, stage.block, HEADS_COUNTERS)]).run(team)
    assert np.allclose(queries, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_hand_over(norm: str, dtype: Any, team: Team) -> None:
    for tokens, width in ((1, 1), (1, 67), (5, 64)):
        source, target = random(tokens, width), np.full((tokens, width), np.nan, np.float32)
        weight, bias = 1 + random(width, seed=1) / 4, random(width, seed=2)
        wanted = Norm(address(weight), 1e-5, address(bias) if norm == "layer" else 0) if norm != "none" else None
        Chain([HandOver(source, target, dtype, wanted).stage]).run(team)
        expected = rounded(source, dtype)
        if norm == "rms":
            expected = rms_norm(expected, weight, 1e-5, dtype)
        if norm == "layer":
            centred = expected - expected.mean(-1, keepdims=True)
            expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
        assert np.abs(target - expected).max() <= 2 * STEP[dtype] * max(1, np.abs(expected).max())
        if norm == "none":
            assert np.array_equal(target, expected)


class Routed(NamedTuple):
    """What the route stage left in the experts' block."""

    experts: NDArray[np.int32]
    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    inputs: NDArray[np.int64]
    jobs: int
    cuts: NDArray[np.int64]
    out: NDArray[np.float32]


def route(logits: NDArray[np.float32], choices: int, routing: Any, team: Team, rounding: Any = "f32") -> Routed:
    tokens, count = logits.shape
    rows, hidden, row_bytes, base = tokens * choices, 5, 96, 1 << 20
    block = aligned_bytes(experts_word.END)
    words = block.view(np.int64)
    listed, taken = np.full(rows, -1, np.int32), np.full(rows, -1, np.int32)
    offsets, inputs = np.full(rows + 1, -1, np.int64), np.full(rows, -1, np.int64)
    weights = np.full(rows, np.nan, np.float32)
    for place, value in (
        (experts_word.EXPERTS, address(listed)), (experts_word.OFFSETS, address(offsets)),
        (experts_word.TOKENS, address(taken)), (experts_word.WEIGHTS, address(weights)),
        (experts_word.INPUTS, address(inputs)), (experts_word.INPUT_BASE, base), (experts_word.INPUT_BYTES, row_bytes),
    ):  # fmt: skip
        words[place // 8] = value
    kept, residual = logits.copy(), random(tokens, hidden)
    out = np.full((tokens, hidden), np.nan, np.float32)
    cuts = CutsTable(3, 1, min(count, rows), team.threads)
    stage = RouteStage(
        tokens, count, choices, routing, rounding, address(kept), address(residual), address(out), hidden,
        address(block), cuts,
    )  # fmt: skip
    Chain([Stage(route_job().address, stage.block, ROUTE_COUNTERS)]).run(team)
    assert np.array_equal(out, residual)
    active = int(words[experts_word.ACTIVE // 8])
    jobs, at = int(words[experts_word.FIRST_JOBS // 8]), int(words[experts_word.FIRST_CUTS // 8])
    row = int(cuts._table[active, 1])
    assert (jobs, at) == (int(cuts._table[active, 0]), row)
    first = (at - address(cuts._cuts)) // 8
    total = int(offsets[active])
    assert np.array_equal(inputs[:total], base + row_bytes * taken[:total])
    return Routed(
        listed[:active], offsets[: active + 1], taken[:total], weights[:total], inputs[:total], jobs,
        cuts._cuts[first : first + jobs + 1].copy(), out,
    )  # fmt: skip


ROUTINGS = ("softmax", "softmax_normed", "softmax_of_chosen")


def check_route(logits: NDArray[np.float32], choices: int, routing: str, team: Team) -> None:
    index, weight = choose(logits, choices, routing)
    expected = group_tokens(index, weight.astype(np.float32), logits.shape[1])
    found = route(logits, choices, routing, team)
    for name in ("experts", "offsets", "tokens"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert np.allclose(found.weights, expected.weights, rtol=1e-5, atol=1e-30)
    assert found.cuts[0] == 0 and found.cuts[-1] == 3 * len(found.experts) and (np.diff(found.cuts) > 0).all()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 1, 1), (1, 8, 2), (3, 5, 5), (7, 33, 4), (64, 128, 8)])
def test_routing(tokens: int, experts: int, choices: int, routing: str, team: Team) -> None:
    check_route(3 * random(tokens, experts), choices, routing, team)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 20), st.integers(1, 6), st.sampled_from(ROUTINGS), st.integers(0, 2**32 - 1),
    st.floats(0, 80),
)  # fmt: skip
def test_routing_of_any_shape(tokens: int, experts: int, choices: int, routing: str, seed: int, spread: float) -> None:
    logits = random(tokens, experts, seed=seed) * np.float32(spread)
    with ThreadTeam(2) as team:
        check_route(logits, min(choices, experts), routing, team)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_of_equal_logits_the_lower_expert_comes_first(routing: str, team: Team) -> None:
    logits = np.array([[1, 2, 2, 0, 2, 1], [0, 0, 0, 0, 0, 0], [5, 4, 4, 4, 5, 0]], np.float32)
    for choices in (1, 2, 3, 4, 6):
        check_route(logits, choices, routing, team)


def test_an_expert_that_weighs_nothing_is_not_run(team: Team) -> None:
    """As group_tokens leaves such rows out; exp(-200) is no f32."""
    logits = np.array([[0, -200, 0, -200], [-200, 3, -200, -200]], np.float32)
    found = route(logits, 3, "softmax", team)
    assert found.experts.tolist() == [0, 1, 2] and found.tokens.tolist() == [0, 1, 0]
    assert np.allclose(found.weights, [0.5, 1, 0.5])


def test_minus_infinity_is_a_masked_expert(team: Team) -> None:
    logits = np.full((2, 6), -np.inf, np.float32)
    logits[0, 4], logits[1, [1, 3]] = 2.0, (1.0, 1.0)
    found = route(logits, 4, "softmax_normed", team)
    assert found.experts.tolist() == [1, 3, 4] and np.allclose(found.weights, [0.5, 0.5, 1])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_nan_reaches_the_weights_of_its_token_only(routing: str, team: Team) -> None:
    logits = random(3, 8)
    logits[1, 3] = np.nan
    found = route(logits, 2, routing, team)
    bad = np.isnan(found.weights)
    assert bad.sum() == 2 and (found.tokens[bad] == 1).all() and (np.bincount(found.tokens) == 2).all()
    logits[1] = np.nan
    found = route(logits, 2, routing, team)
    assert np.isnan(found.weights).sum() == 2 and ((0 <= found.experts) & (found.experts < 8)).all()


@pytest.mark.parametrize("rounding", TYPES)
def test_weights_are_rounded(rounding: str, team: Team) -> None:
    logits = random(4, 8)
    found, exact = (route(logits, 3, "softmax", team, each).weights for each in (rounding, "f32"))
    assert np.array_equal(found, rounded(exact, rounding))


def layers(x: NDArray[np.float32], weights: list[NDArray[Any]], threads: int) -> tuple[list[Stage], Any]:
    """Each layer's outputs are the next one's inputs: a stage that began early would read what is not there.

    Returns the stages, and (values, memory, ...), to be kept.
    """
    keep: list[Any] = []
    stages, values = [], [x]
    kernel = MatrixKernel(x.shape[1], "f32")
    for weight in weights:
        out = np.full((len(x), len(weight)), np.nan, np.float32)
        memory = aligned_bytes(kernel.block_bytes(1, len(x), threads))
        matrix = Matrix(address(weight), len(weight))
        places = [(address(out), out.strides[0])]
        keep.append(kernel.fill(address(memory), [matrix], len(x), address(values[-1]), x.strides[0], places, threads))
        stages.append(Stage(kernel.job, address(memory), MATRIX_COUNTERS // 64))
        values.append(out)
        keep.append(memory)
    return stages, (values, keep, kernel)


@pytest.mark.parametrize(("length", "tokens", "width"), [(1, 1, 8), (40, 1, 32), (200, 3, 96), (40, 9, 70)])
def test_long_chains(length: int, tokens: int, width: int, team: Team) -> None:
    """Also with fewer jobs than threads, and run again and again."""
    x = random(tokens, width)
    weights = [random(width, width, seed=n) / np.float32(np.sqrt(width)) for n in range(length)]
    stages, (values, *kept) = layers(x, weights, team.threads)
    chain = Chain(stages)
    expected = x.astype(np.float64)
    for weight in weights:
        expected = expected @ weight.T.astype(np.float64)
    results = []
    for _ in range(5):
        for value in values[1:]:
            value[:] = np.nan
        chain.run(team)
        results.append(values[-1].copy())
    assert np.abs(results[0] - expected).max() <= 1e-6 * length**0.5 * max(1, np.abs(expected).max()) * 10
    assert all(np.array_equal(results[0], each) for each in results)
    with ThreadTeam(3) as other:
        others, (found, *also_kept) = layers(x, weights, 3)
        Chain(others).run(other)
    assert np.array_equal(found[-1], results[0])


def test_a_chain_made_for_more_threads_than_come() -> None:
    """A thread that never comes is not waited for."""
    x = random(2, 64)
    weights = [random(64, 64, seed=n) / 8 for n in range(20)]
    stages, (values, *kept) = layers(x, weights, 4)
    with ThreadTeam(1) as one, ThreadTeam(4) as four:
        Chain(stages).run(one)
        first = values[-1].copy()
        Chain(stages).run(four)
    assert np.array_equal(first, values[-1])


def test_an_empty_chain() -> None:
    with ThreadTeam(2) as team:
        Chain([]).run(team)
