import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.scheduling.guard import BUCKETS, Guard, Mode, Verdict

Times = Callable[[int, Mode], float]
SEEDS = st.integers(0, 2**32 - 1)
# What is promised holds for noise as it usually comes: the same draws in every run, or a rare one fails some day.
NOISY = settings(deadline=None, max_examples=40, derandomize=True)


def run(times: Times, seed: int, steps: int = 2000, noise: float = 0.1, tokens: int = 1) -> tuple[float, Guard]:
    """How much more time a guarded run takes than one that knows the faster mode of every step; and the guard."""
    guard = Guard()
    factors = np.random.default_rng(seed).lognormal(0, noise, steps).tolist()
    taken = least = 0.0
    for step, factor in enumerate(factors):
        mode = guard.mode(tokens)
        seconds = times(step, mode) * factor
        guard.record(tokens, mode, seconds)
        taken += seconds
        least += factor * min(times(step, "dynamic"), times(step, "static"))
    return taken / least - 1, guard


def ratio(dynamic: float) -> Times:
    return lambda _step, mode: dynamic if mode == "dynamic" else 1.0


@given(st.floats(math.log(0.4), math.log(2.5)), SEEDS)
@NOISY
def test_never_slower_than_the_better_mode(log_ratio: float, seed: int) -> None:
    slower, _ = run(ratio(math.exp(log_ratio)), seed)
    assert slower < 0.03


@given(st.floats(1.0, 1.15), st.floats(1.0, 1.15), st.booleans(), SEEDS)
@NOISY
def test_also_when_the_better_mode_changes_half_way(before: float, after: float, swap: bool, seed: int) -> None:
    """One mode is `before` times faster than the other; then it is `after` times slower, which only trials can show."""

    def times(step: int, mode: Mode) -> float:
        first = (mode == "dynamic") is not swap
        return 1.0 if first else before if step < 1000 else 1 / after

    slower, _ = run(times, seed)
    assert slower < 0.045  # 0.036 was met once in some thousand draws


@given(st.floats(1.2, 4.0), st.floats(1.2, 4.0), st.booleans(), SEEDS)
@NOISY
def test_a_mode_that_becomes_slower_in_use_is_left_at_once(before: float, after: float, swap: bool, seed: int) -> None:
    def times(step: int, mode: Mode) -> float:
        first = (mode == "dynamic") is not swap
        return before if not first else 1.0 if step < 1000 else before * after

    slower, _ = run(times, seed)
    assert slower < 0.05


@pytest.mark.parametrize("dynamic", [0.5, 0.8, 0.95, 1.0, 1.1, 1.5, 3.0])
def test_trials_cost_less_than_two_percent_in_the_long_run(dynamic: float) -> None:
    slower, guard = run(ratio(dynamic), 3, 10_000)
    assert slower < 0.02
    (verdict,) = guard.verdicts()
    assert verdict.verdict == ("dynamic" if dynamic <= 1.0 else "static")


def test_hiccups_neither_turn_the_verdict_nor_stop_the_trials() -> None:
    hiccups = np.random.default_rng(5).random(20_000) < 0.02

    def times(step: int, mode: Mode) -> float:
        usual = (0.9 if step < 3000 else 1.2) if mode == "dynamic" else 1.0
        return usual + (100.0 if hiccups[step] else 0.0)

    guard = Guard()
    in_use: list[Mode] = []
    for step in range(6000):
        in_use.append(guard.mode(1))
        guard.record(1, in_use[-1], times(step, in_use[-1]))
    assert in_use[500:3000].count("dynamic") > 0.9 * 2500
    assert in_use[4000:].count("static") > 0.9 * 2000


def test_it_begins_dynamic_and_undecided_and_tries_static_soon() -> None:
    guard = Guard()
    assert guard.verdicts() == ()
    modes = []
    for _ in range(30):
        modes.append(guard.mode(1))
        guard.record(1, modes[-1], 1.0)
        if "static" not in modes:
            assert guard.verdicts() == () or guard.verdicts()[0].verdict == "undecided"
    assert modes[:5] == ["dynamic"] * 5
    assert "static" in modes


def test_the_cache_may_adapt_before_dynamic_steps_count() -> None:
    """Static in use, and dynamic becomes better, but is slow for the first steps after every switch."""
    guard, run_of_dynamic = Guard(), 0
    for step in range(6000):
        mode = guard.mode(1)
        run_of_dynamic = run_of_dynamic + 1 if mode == "dynamic" else 0
        dynamic = 2.0 if step < 1000 else 3.0 if run_of_dynamic <= 3 else 0.8
        guard.record(1, mode, dynamic if mode == "dynamic" else 1.0)
        if step == 990:
            assert guard.verdicts()[0].verdict == "static"
    assert guard.verdicts()[0].verdict == "dynamic"


def test_verdicts_tell_medians_and_counts() -> None:
    guard = Guard()
    for _ in range(200):
        mode = guard.mode(3)
        guard.record(3, mode, 0.2 if mode == "dynamic" else 0.1)
    (verdict,) = guard.verdicts()
    assert (verdict.tokens, verdict.verdict) == ((2, 4), "static")
    assert verdict.dynamic_seconds == pytest.approx(0.2)
    assert verdict.static_seconds == pytest.approx(0.1)
    assert 0 < verdict.dynamic_steps < 20
    assert verdict.static_steps > 150
    assert isinstance(verdict, Verdict)


def test_every_bucket_has_a_verdict_of_its_own() -> None:
    guard = Guard()
    sizes = [1, 4, 16, 64, 512, 600]
    for step in range(3000):
        tokens = sizes[step % len(sizes)]
        mode = guard.mode(tokens)
        # static is right below 17 tokens, dynamic above
        guard.record(tokens, mode, 1.0 if (mode == "static") == (tokens < 17) else 1.3)
    assert [v.tokens for v in guard.verdicts()] == [(1, 1), (2, 4), (5, 16), (17, 64), (65, 512), (513, 0)]
    assert [v.verdict for v in guard.verdicts()] == ["static"] * 3 + ["dynamic"] * 3
    assert len(BUCKETS) == 6


def test_prompts_of_any_length_are_compared_by_the_token() -> None:
    lengths = np.random.default_rng(2).integers(600, 10_000, 400).tolist()
    guard = Guard()
    for tokens in lengths:
        mode = guard.mode(tokens)
        guard.record(tokens, mode, tokens * (1e-3 if mode == "static" else 1.2e-3))
    assert guard.verdicts()[0].verdict == "static"
    assert guard.verdicts()[0].static_seconds == pytest.approx(1e-3)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_senseless_times_and_modes_that_were_not_asked_for_are_left_out(seconds: float) -> None:
    guard = Guard()
    for _ in range(50):
        guard.record(1, guard.mode(1), seconds)
        guard.record(1, "static", 1.0)
    assert guard.verdicts() == ()
    assert guard.mode(1) == "dynamic"


def test_the_same_times_give_the_same_run() -> None:
    def modes() -> list[Any]:
        guard, found = Guard(), []
        for seconds in np.random.default_rng(9).lognormal(0, 0.3, 500).tolist():
            found.append(guard.mode(1))
            guard.record(1, found[-1], seconds)
        return [*found, guard.verdicts()]

    assert modes() == modes()


@pytest.mark.parametrize("dynamic", [0.9, 0.95, 1.1])
def test_times_that_scatter_by_a_third_do_not_mislead_it(dynamic: float) -> None:
    losses = [run(ratio(dynamic), seed, noise=0.3)[0] for seed in range(12)]
    assert sum(losses) / len(losses) < 0.02


def test_a_hiccup_does_not_end_a_trial() -> None:
    guard, tried = Guard(), 0
    for _ in range(40):
        mode = guard.mode(1)
        tried += mode == "static"
        guard.record(1, mode, 1.0 if mode == "dynamic" else 50.0 if tried == 4 else 0.8)
    assert guard.mode(1) == "static"
