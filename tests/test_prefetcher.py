"""The prefetcher on stubs: what it queues, in which order, what it calls off, and when it does nothing ahead."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_offload.dispatch_parts import Parts
from moe_offload.prefetch_gate import PrefetchGate
from moe_offload.prefetch_worth import STAY, ExpertWorth
from moe_offload.prefetcher import LAST, Prefetcher
from moe_offload.scheduling.layer_plan import LayerCosts
from moe_offload.scheduling.predicted import Foreseen, PredictedUse
from moe_offload.scheduling.recent_use import RecentUse
from moe_offload.transfer.eviction import ExpertIds, Score

LAYERS, E, COPY, PACE = 5, 4, 1.0, 3.0
Key = tuple[int, int]


class Queue:
    """Copies that never come by themselves."""

    def __init__(self) -> None:
        self.priorities: dict[Key, float] = {}
        self.submitted: set[Key] = set()
        self.busy = 0.0

    @property
    def waiting(self) -> list[Key]:
        return list(self.priorities)

    def backlog(self) -> float:
        return self.busy

    def set_priority(self, key: Key, priority: float) -> None:
        self.priorities[key] = priority

    def feed(self, seconds: float) -> int:
        return 0

    def ready(self, key: Key) -> object | None:
        return self if key in self.submitted else None

    def __contains__(self, key: Key) -> bool:
        return key in self.priorities or key in self.submitted


class World:
    """Experts cost 0.5 s a row on the CPU, nothing on the device; of each layer expert 0 has a slot."""

    def __init__(self, *, is_open: bool = True, slots: int = 40) -> None:
        self.queue, self.now = Queue(), 0.0
        self.slot_of = np.tile(np.array([0, -1, -1, -1], np.int32), (LAYERS, 1))
        self.owners: dict[int, Key] = {}
        self.asked: list[int] = []
        self.forecast = PredictedUse(RecentUse(LAYERS, E), LAYERS)
        self.costs = LayerCosts(0.5 * np.arange(9.0), np.zeros(9), copy=COPY)
        self.score = Score()
        self.score.start(ExpertIds.of((E,) * LAYERS))
        self.parts = cast(
            Parts,
            SimpleNamespace(
                accelerator=SimpleNamespace(now=lambda: self.now),
                cache=SimpleNamespace(
                    slots=slots, slot_of=lambda layer: self.slot_of[layer], owner=self.owners.get, eviction=self.score
                ),
                queue=self.queue,
                records=SimpleNamespace(is_here=lambda layer: np.ones(E, np.bool_)),
                costs=SimpleNamespace(layer_costs=lambda kind: self.costs),
                kinds=["any"] * LAYERS,
                record_bytes=[8] * LAYERS,
                forecast=self.forecast,
            ),
        )
        self.prefetcher = Prefetcher(self.parts)
        self.prefetcher.gate.open = is_open
        self.queued: list[Key] = []

    def expect(self, wanted: dict[int, list[int]]) -> None:
        """By layer: experts that are said to come, with a row each."""

        def said(layer: int) -> Foreseen:
            self.asked.append(layer)
            presence: NDArray[np.float64] = np.isin(np.arange(E), wanted[layer]).astype(np.float64)
            return Foreseen(presence, presence, 1)

        self.forecast.expect(wanted, said)

    def prefetch(self, layer: int, expert: int, priority: float, worth: float | None) -> int | None:
        slot = 10 + len(self.owners)
        self.owners[slot] = layer, expert
        self.slot_of[layer, expert] = slot
        self.queue.priorities[layer, expert] = priority
        self.queued.append((layer, expert))
        return slot

    def call_off(self, key: Key) -> None:
        del self.queue.priorities[key]
        self.slot_of[key] = -1

    def look_ahead(self, layer: int) -> list[Key]:
        """The copies that it queues."""
        self.queued = []
        self.prefetcher.look_ahead(layer, 1, PACE, self.prefetch, self.call_off)
        return self.queued

    def ahead(self, layer: int) -> list[Key]:
        """Those for other layers."""
        return [key for key in self.look_ahead(layer) if key[0] != layer]


def settled(**how: Any) -> World:
    """The number of tokens is known, all scores are set, nothing is under way."""
    made = World(**how)
    made.queue.busy = 100.0
    assert made.look_ahead(4) == []
    made.queue.busy = 0.0
    return made


ALL = [1, 2, 3]


def test_the_nearest_layer_first_and_no_more_than_until_the_next() -> None:
    made = settled()
    made.expect({1: [2], 2: ALL, 3: ALL})
    found = made.ahead(0)
    # 3 s: one for layer 1, two for layer 2; and one that goes on beyond
    assert [layer for layer, _ in found] == [1, 2, 2, 2] and found[0] == (1, 2)
    priorities = made.queue.priorities
    assert priorities[1, 2] > max(priorities[key] for key in found[1:])
    assert made.ahead(0) == []


def test_what_the_link_is_busy_with_is_not_given_again() -> None:
    made = settled()
    made.queue.busy = 2.5
    made.expect({1: ALL, 2: ALL, 3: ALL})
    assert [layer for layer, _ in made.ahead(0)] == [2]  # nothing arrives in time for layer 1; one may go on behind it
    made = settled()
    made.queue.priorities = {(4, expert): 0.0 for expert in range(3)}
    made.expect({1: ALL, 2: [], 3: []})
    assert made.ahead(0) == []


def test_few_slots_are_held_by_what_waits() -> None:
    made = settled(slots=8)
    made.expect({1: ALL, 2: ALL, 3: ALL})
    assert len(made.ahead(0)) == 2
    made.queue.priorities.clear()  # they have arrived: their slots are held still
    assert made.ahead(0) == []


def test_what_is_not_believed_in_any_more_is_called_off() -> None:
    made = settled()
    made.expect({1: [1], 2: [2], 3: [3]})
    assert made.ahead(0) == [(1, 1), (2, 2), (3, 3)]
    made.forecast.observe(1, np.array([1], np.int32), np.array([1]), 1)
    made.expect({2: [2], 3: [1], 4: []})
    assert (3, 1) in made.look_ahead(1)
    assert (3, 3) not in made.queue.priorities and (2, 2) in made.queue.priorities
    held = made.prefetcher.protected(None)
    assert {made.owners[slot] for slot in held} >= {(2, 2), (3, 1)} and (3, 3) not in {made.owners[s] for s in held}


def test_what_waits_gets_the_priority_of_the_newest_word() -> None:
    made = settled()
    made.expect({1: [], 2: [], 3: [2, 3]})
    made.ahead(0)
    priorities = made.queue.priorities
    assert priorities[3, 2] == priorities[3, 3] > LAST
    presence = np.array([0.0, 0.0, 0.5, 1.0])
    made.forecast.foresee(3, presence, presence, 1)
    made.look_ahead(1)
    assert priorities[3, 3] - priorities[3, 2] == pytest.approx(0.25)


def test_nothing_is_called_off_without_a_newer_word() -> None:
    made = settled()
    made.expect({1: [1], 2: [2], 3: [3]})
    made.ahead(0)
    for layer in (2, 3):
        made.forecast.observe(layer, np.array([0], np.int32), np.array([1]), 1)
    made.prefetcher._effort.seconds = 9.0  # more than anything saves: nothing would be begun
    made.look_ahead(1)
    assert {(2, 2), (3, 3)} <= set(made.queue.priorities)


def test_popularity_is_booked_as_predictions_are() -> None:
    made = settled()
    found = made.ahead(0)
    assert [layer for layer, _ in found] == [1, 1, 1, 2]  # all three, and one that goes on beyond
    assert made.ahead(1) == []


def test_where_it_does_not_pay_only_what_is_to_stay_is_copied_and_nobody_is_asked() -> None:
    made = settled(is_open=False)
    made.expect({1: ALL, 2: ALL, 3: ALL})
    made.asked.clear()
    found = made.look_ahead(0)
    assert found and all(layer == 0 for layer, _ in found) and made.asked == []
    assert all(priority == LAST for priority in made.queue.priorities.values())


def test_late_is_not_wrong_but_what_never_left_the_host_is() -> None:
    shares = []
    for under_way in (True, False):
        made = settled()
        for _ in range(30):
            made.prefetcher._early[1] = {1: (10, 1.0)}
            made.owners[10] = 1, 1
            if under_way:
                made.queue.submitted.add((1, 1))
            else:
                made.queue.priorities[1, 1] = 0.0
            made.prefetcher.settle(1, np.array([1], np.int32))
        shares.append(made.prefetcher._yield.share)
    assert shares[0] > 0.95 and shares[1] < 0.6


def test_what_stays_is_judged_by_its_average_not_by_the_next_call() -> None:
    """An expert that the next call does without loses one step's share of its worth, no more."""
    made = World()
    worth = ExpertWorth(made.parts)
    usual = worth.kept(2, 1).copy()
    made.expect({2: [1]})
    worth.saved(2, 1, anew=True)
    found = worth.kept(2, 1)
    np.testing.assert_allclose(found[[0, 2, 3]], (1 - 1 / STAY) * usual[[0, 2, 3]])
    assert found[1] == pytest.approx((1 - 1 / STAY) * usual[1] + 0.5 / STAY)


def test_of_two_alike_the_one_whose_layer_runs_first_stays() -> None:
    made = World()
    worth = ExpertWorth(made.parts)
    worth.passed(1, 1)
    worth.renew(1)
    scores = [float(made.score.scores(layer)[0]) for layer in range(LAYERS)]
    assert scores[2] > scores[3] > scores[4] > scores[0] > scores[1]
    before = scores[1] / scores[2]
    for layer in (2, 3, 4, 0, 1):
        worth.passed(layer, 1)
        worth.saved(layer, 1, anew=True)
    assert made.score.scores(1)[0] / made.score.scores(2)[0] == pytest.approx(before)


# The gate


def decode(gate: PrefetchGate, shut: float, is_open: float, steps: int, tokens: int = 1) -> tuple[float, int]:
    """Seconds of so many steps, and how many of them were open."""
    rng, total, opened = np.random.default_rng(1), 0.0, 0
    for _ in range(steps):
        gate.begin_step(tokens)
        seconds = (is_open if gate.open else shut) * float(rng.normal(1, 0.005))
        gate.end_step(tokens, seconds)
        total, opened = total + seconds, opened + gate.open
    return total, opened


def test_the_gate_opens_where_it_pays_and_only_there() -> None:
    gate = PrefetchGate()
    decode(gate, 1.0, 0.9, 60)
    assert decode(gate, 1.0, 0.9, 200)[1] > 180
    gate = PrefetchGate()
    assert decode(gate, 1.0, 1.1, 400)[1] < 24


@pytest.mark.parametrize("loss", [0.01, 0.05, 0.3, 2.0])
def test_what_trials_cost_is_bounded(loss: float) -> None:
    gate = PrefetchGate()
    decode(gate, 1.0, 1 + loss, 60)  # the first trial
    seconds, _ = decode(gate, 1.0, 1 + loss, 2000)
    assert seconds < 2000 * 1.015


def test_the_gate_shuts_when_it_does_not_pay_any_more() -> None:
    gate = PrefetchGate()
    decode(gate, 1.0, 0.8, 100)
    assert gate.open
    decode(gate, 1.0, 1.3, 100)
    assert decode(gate, 1.0, 1.3, 100)[1] < 30


def test_every_number_of_tokens_has_its_own_answer() -> None:
    gate = PrefetchGate()
    decode(gate, 1.0, 0.8, 100, tokens=64)
    gate.begin_step(1)
    assert not gate.open
    gate.begin_step(64)
    assert gate.open
    assert [verdict.verdict for verdict in gate.verdicts()] == ["static"]
