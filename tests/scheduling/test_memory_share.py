"""The division of device memory: optimal for few layers, never over the budget, calm while the context grows."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.scheduling.memory_share import LayerKv, MemoryShare, ShareDemand, benefit, divide, reshare


def demand(
    layers: Sequence[LayerKv], budget: int, slots: Sequence[float] = (), slot_bytes: int = 100, length: int = 10,
    expected: int | None = None, host: Sequence[float] | float = 1.0, device: float = 0.0,
) -> ShareDemand:  # fmt: skip
    """Seconds a position, of every layer or of each."""
    rates = [host] * len(layers) if isinstance(host, float) else list(host)
    return ShareDemand(
        tuple(layers), length, expected or length, lambda layer, n: rates[layer] * n, lambda _, n: device * n,
        np.array(slots, np.float64), slot_bytes, budget,
    )  # fmt: skip


def spent(share: MemoryShare, asked: ShareDemand) -> int:
    return asked.kv_bytes(share.kv_on_device) + share.slots * asked.slot_bytes


def exhaustive(asked: ShareDemand) -> float:
    """The best benefit of all divisions that fit."""
    best = -np.inf
    for here in product((False, True), repeat=len(asked.layers)):
        if any(not layer.movable and not there for layer, there in zip(asked.layers, here, strict=True)):
            continue
        nbytes = asked.kv_bytes(here)
        if nbytes <= asked.budget:
            most = min((asked.budget - nbytes) // asked.slot_bytes, len(asked.slot_seconds))
            best = max(best, *(benefit(MemoryShare(here, slots), asked) for slots in range(most + 1)))
    return float(best)


LAYERS = st.builds(
    LayerKv, st.integers(1, 60), st.booleans() | st.just(True), st.sampled_from([0, 0, 4])
)  # fmt: skip


@st.composite
def demands(draw: Any, most_layers: int = 6) -> ShareDemand:
    layers = draw(st.lists(LAYERS, max_size=most_layers))
    length = draw(st.integers(0, 50))
    return demand(
        layers,
        draw(st.integers(0, 8000)),
        sorted(draw(st.lists(st.floats(0, 30), max_size=12)), reverse=True),
        draw(st.integers(1, 900)),
        length,
        length + draw(st.integers(1, 50)),
        draw(st.lists(st.floats(0, 3), min_size=len(layers), max_size=len(layers))),
        draw(st.floats(0, 1)),
    )


@settings(max_examples=200, deadline=None)
@given(demands())
def test_it_is_the_optimum(asked: ShareDemand) -> None:
    share = divide(asked)
    best = exhaustive(asked)
    if best == -np.inf:
        assert share == MemoryShare(tuple(not layer.movable for layer in asked.layers), 0)
    else:
        assert benefit(share, asked) == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert spent(share, asked) <= asked.budget
        assert all(here or layer.movable for here, layer in zip(share.kv_on_device, asked.layers, strict=True))


@settings(max_examples=100, deadline=None)
@given(demands(most_layers=30), st.integers(0, 4000))
def test_more_memory_never_saves_less(asked: ShareDemand, more: int) -> None:
    share = divide(asked)
    richer = ShareDemand(
        asked.layers, asked.length, asked.expected, asked.host_seconds, asked.device_seconds, asked.slot_seconds,
        asked.slot_bytes, asked.budget + more,
    )  # fmt: skip
    if spent(share, asked) <= asked.budget:
        assert benefit(divide(richer), richer) >= benefit(share, asked) - 1e-9
        assert spent(divide(richer), richer) <= richer.budget


@settings(max_examples=100, deadline=None)
@given(demands(), demands(), st.floats(0, 0.5))
def test_a_new_division_fits_and_is_as_good_as_the_bound_says(
    before: ShareDemand, asked: ShareDemand, bound: float
) -> None:
    previous = divide(before)
    share = reshare(previous, asked, bound)
    best = exhaustive(asked)
    if best > -np.inf:
        assert spent(share, asked) <= asked.budget
        saved = benefit(share, asked)
        assert best <= saved + bound * abs(saved) + 1e-9
    assert reshare(share, asked, bound) == share


def test_more_sizes_than_can_be_combined_are_taken_by_what_a_byte_saves() -> None:
    rng = np.random.default_rng(0)
    worst = 1.0
    for _ in range(20):
        layers = [LayerKv(int(size)) for size in rng.integers(20, 60, 40)]
        rates = list(rng.uniform(0.5, 1.5, 40))
        asked = demand(layers, 9000, [3.0 * 0.98**n for n in range(100)], 50, host=rates)
        share = divide(asked)
        assert spent(share, asked) <= asked.budget
        # what a fraction of the next layer or slot would add bounds the optimum from above
        left = asked.budget - asked.kv_bytes([False] * 40)
        pieces = [(asked.saved(i) / layer.nbytes(10), layer.nbytes(10)) for i, layer in enumerate(layers)]
        pieces += [(float(gain) / 50, 50) for gain in asked.slot_seconds]
        bound = 0.0
        for density, size in sorted(pieces, reverse=True):
            bound += density * min(size, left)
            left -= min(size, left)
        worst = min(worst, benefit(share, asked) / bound)
    assert worst > 0.99


# What it does with plain cases


def test_who_saves_more_per_byte_has_the_memory() -> None:
    layers, gains = [LayerKv(10)] * 4, [0.5] * 8
    short = divide(demand(layers, 1000, gains, length=10, host=0.2, device=0.01))
    assert all(short.kv_on_device) and short.slots == 5
    # a device that is not much faster: all slots, and a layer in what is left
    slow = divide(demand(layers, 1000, gains, length=10, host=0.2, device=0.19))
    assert sum(slow.kv_on_device) == 1 and slow.slots == 8


def test_attention_that_is_faster_on_the_cpu_stays_there() -> None:
    share = divide(demand([LayerKv(10)] * 4, 100_000, host=0.1, device=0.2))
    assert not any(share.kv_on_device)


def test_layers_that_cannot_move_are_paid_first() -> None:
    layers = [LayerKv(10, movable=False), LayerKv(10), LayerKv(1000, movable=False, window=1)]
    share = divide(demand(layers, 3000, [100.0] * 100, 100))
    assert share == MemoryShare((True, False, True), 9)


def test_room_is_for_the_expected_length() -> None:
    asked = demand([LayerKv(10)] * 3, 3500, length=10, expected=100)
    assert sum(divide(asked).kv_on_device) == 2  # 1000 each, and one more for the layer that grows


def test_a_growing_context_changes_little_and_seldom() -> None:
    layers, gains = [LayerKv(4)] * 24, [1e-3 * 0.995**n for n in range(400)]
    share, changes = None, 0
    for length in range(10, 4000, 10):
        asked = demand(layers, 100_000, gains, 200, length, length + 64, host=2e-5, device=1e-6)
        new = reshare(share, asked)
        assert spent(new, asked) <= asked.budget
        changes += share is not None and new.kv_on_device != share.kv_on_device
        share = new
    assert changes <= 24


def test_noise_in_what_is_measured_changes_nothing() -> None:
    rng, share = np.random.default_rng(0), None
    for _ in range(50):
        rates = list(1.0 + 0.02 * rng.standard_normal(8))
        asked = demand([LayerKv(10)] * 8, 650, [2.0 * 0.9**n for n in range(6)], host=rates, device=0.1)
        new = reshare(share, asked)
        assert share is None or new == share
        share = new


def test_freed_memory_is_used() -> None:
    layers = [LayerKv(10)] * 4
    small = divide(demand(layers, 200, [1.0] * 50))
    large = reshare(small, demand(layers, 2000, [1.0] * 50))
    assert all(large.kv_on_device) and large.slots == 15


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="20 positions cannot be expected to have 10"):
        demand([], 10, length=20, expected=10)
    with pytest.raises(ValueError, match="at least one byte, got 0"):
        demand([], 10, slot_bytes=0)
