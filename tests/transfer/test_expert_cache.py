"""The cache against a naive model that remembers everything, and each eviction's choice on cases made by hand."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_offload.transfer.cache_counters import CacheCounters
from moe_offload.transfer.eviction import EVICTIONS, Lfu, Score, make_eviction
from moe_offload.transfer.expert_cache import COMING, EMPTY, READY, ExpertCache, Placement

Expert = tuple[int, int]  # layer, expert
BITS = st.integers(0, 255)


def chosen(options: range, bits: int) -> list[int]:
    """Cheaper to draw than a set."""
    return [one for one in options if bits >> one & 1]


class Model:
    """What the cache should be, by the definitions: a list of everything that happened, and no index."""

    def __init__(self, name: str, layers: int) -> None:
        self.name, self.layers = name, layers
        self.uses: list[tuple[int, Expert]] = []  # turns
        self.fills: list[tuple[int, Expert]] = []
        self.scores: dict[Expert, float] = {}
        self.turn = -1

    def key(self, expert: Expert) -> tuple[float, ...]:
        """The victim has the least."""
        last = max((turn for turn, other in self.uses + self.fills if other == expert), default=-1)
        distance = (expert[0] - self.turn - 1) % self.layers
        frequency = sum(
            0.5 ** ((self.turn - turn) / (64 * self.layers)) for turn, other in self.uses if other == expert
        )
        keys: dict[str, tuple[float, ...]] = {
            "lru": (last,),
            "lfu": (round(frequency, 9),),
            "least-stale": (-distance, last),
            "score": (self.scores.get(expert, 0.0), -distance, last),
        }
        return keys[self.name]


class CacheMachine(RuleBasedStateMachine):
    """Everything that can be done to a cache, in any order."""

    @initialize(
        name=st.sampled_from(sorted(EVICTIONS)),
        experts=st.lists(st.integers(2, 5), min_size=1, max_size=3),
        slots=st.integers(0, 6),
        fill=st.booleans(),
        data=st.data(),
    )
    def begin(self, name: str, experts: list[int], slots: int, fill: bool, data: st.DataObject) -> None:
        layers = len(experts)
        budget = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=layers, max_size=layers))
        self.experts = experts
        self.budget = experts if budget is None else budget
        self.cache = ExpertCache(
            layers, experts, slots, make_eviction(name), budget, [10 + layer for layer in range(layers)]
        )
        self.model = Model(name, layers)
        self.slots: list[Expert | None] = [None] * slots
        self.ready: set[int] = set()
        self.pinned: set[int] = set()
        self.pinned_layers: set[int] = set()
        self.prefetched: set[int] = set()
        self.counts = [dict.fromkeys((f.name for f in fields(CacheCounters)), 0) for _ in experts]

        if fill:  # otherwise most of a run goes by before an expert has to go
            for layer, expert in self.everybody():
                self.put(layer, expert, False, set(), set, None)
                self.everything_arrives()

    def everybody(self) -> list[Expert]:
        return [(layer, expert) for layer, count in enumerate(self.experts) for expert in range(count)]

    def may_go(self, protected: set[int]) -> set[int]:
        return {
            slot
            for slot in self.ready - protected - self.pinned
            if (owner := self.slots[slot]) is not None and owner[0] not in self.pinned_layers
        }

    def take_away(self, slot: int) -> None:
        owner = self.slots[slot]
        assert owner is not None
        self.counts[owner[0]]["evictions"] += slot in self.ready
        self.counts[owner[0]]["wasted"] += slot in self.prefetched
        self.slots[slot] = None
        for some in (self.ready, self.pinned, self.prefetched):
            some.discard(slot)

    @rule(layer=st.integers(0, 59), wanted=BITS, steps=st.integers(0, 2))
    def lookup(self, layer: int, wanted: int, steps: int) -> None:
        layers = len(self.experts)
        layer %= layers
        turn = (max(self.model.turn, 0) // layers + steps) * layers + layer
        turn += layers if turn < self.model.turn else 0
        experts = chosen(range(self.experts[layer]), wanted)
        found = self.cache.lookup(layer, np.array(experts, np.int32), turn // layers)
        assert found.tolist() == [self.slots.index((layer, e)) if (layer, e) in self.slots else -1 for e in experts]
        self.model.turn = turn
        self.model.uses += [(turn, (layer, expert)) for expert in experts]
        for slot in found.tolist():
            what = "misses" if slot < 0 else "hits" if slot in self.ready else "coming_hits"
            self.counts[layer][what] += 1
            self.prefetched.discard(slot)

    @rule(
        which=st.integers(0, 59),
        prefetch=st.booleans(),
        protected=BITS,
        kind=st.sampled_from([set, list, np.array]),
        better_than=st.sampled_from([None, None, -5.0, -1.0, 0.0, 1.0, 9.0]),
        arrives=st.booleans(),
    )
    def place(
        self, which: int, prefetch: bool, protected: int, kind: type, better_than: float | None, arrives: bool
    ) -> None:
        absent = [one for one in self.everybody() if one not in self.slots]
        if absent:
            layer, expert = absent[which % len(absent)]
            self.put(layer, expert, prefetch, set(chosen(range(len(self.slots)), protected)), kind, better_than)
        if arrives:
            self.everything_arrives()

    def put(
        self, layer: int, expert: int, prefetch: bool, protected: set[int], kind: type, better_than: float | None
    ) -> None:
        full = sum(owner is not None and owner[0] == layer for owner in self.slots) >= self.budget[layer]
        allowed = {s for s in self.may_go(protected) if not full or self.slots[s][0] == layer}  # type: ignore[index]
        keys = {slot: self.model.key(self.slots[slot]) for slot in allowed}  # type: ignore[arg-type]
        before = {slot: self.cache.score(slot) for slot in allowed}
        given = self.cache.place(
            layer,
            expert,
            prefetch=prefetch,
            protected=kind(sorted(protected)) if protected else (),
            better_than=better_than,
        )
        if None in self.slots and not full:
            assert given == Placement(self.slots.index(None), None)
        elif not allowed:
            assert given is None
            return
        else:
            least = min(keys.values())
            if given is None:
                assert better_than is not None
                assert any(before[slot] >= better_than for slot in allowed if keys[slot] == least)
                return
            assert keys[given.slot] == least
            assert given.evicted == self.slots[given.slot]
            assert better_than is None or before[given.slot] < better_than
            self.take_away(given.slot)
        self.slots[given.slot] = layer, expert
        if prefetch:
            self.prefetched.add(given.slot)
        self.model.fills.append((self.model.turn, (layer, expert)))
        self.counts[layer]["prefetches" if prefetch else "fetches"] += 1

    @rule()
    def everything_arrives(self) -> None:
        for slot, owner in enumerate(self.slots):
            if owner is not None and slot not in self.ready:
                self.cache.arrived(slot)
                self.ready.add(slot)
                self.counts[owner[0]]["nbytes"] += 10 + owner[0]

    def pick(self, which: int) -> int:
        taken = [slot for slot, owner in enumerate(self.slots) if owner is not None]
        return taken[which % len(taken)]

    @precondition(lambda self: any(self.slots))
    @rule(which=st.integers(0, 59), keep=st.booleans())
    def end_a_copy(self, which: int, keep: bool) -> None:
        slot = self.pick(which)
        act = self.cache.arrived if keep else self.cache.abandon
        if slot in self.ready:
            with pytest.raises(ValueError, match="is ready, not coming"):
                act(slot)
        elif keep:
            act(slot)
            self.ready.add(slot)
            layer = self.slots[slot][0]  # type: ignore[index]
            self.counts[layer]["nbytes"] += 10 + layer
        else:
            act(slot)
            self.take_away(slot)

    @precondition(lambda self: any(self.slots))
    @rule(which=st.integers(0, 59))
    def evict(self, which: int) -> None:
        slot = self.pick(which)
        if slot not in self.may_go(set()):
            with pytest.raises(ValueError, match="pinned|coming, not ready"):
                self.cache.evict(slot)
            return
        self.cache.evict(slot)
        self.take_away(slot)

    @precondition(lambda self: any(self.slots))
    @rule(which=st.integers(0, 59), on=st.booleans())
    def pin(self, which: int, on: bool) -> None:
        slot = self.pick(which)
        self.cache.pin(slot, on)
        (self.pinned.add if on else self.pinned.discard)(slot)

    @rule(layer=st.integers(0, 59), on=st.booleans())
    def pin_layer(self, layer: int, on: bool) -> None:
        layer %= len(self.experts)
        self.cache.pin_layer(layer, on)
        (self.pinned_layers.add if on else self.pinned_layers.discard)(layer)

    @rule(slots=st.integers(0, 8))
    def resize(self, slots: int) -> None:
        if slots >= len(self.slots):
            self.cache.grow(slots)
            self.slots += [None] * (slots - len(self.slots))
            return
        assert self.cache.shrink(slots) == list(range(slots, len(self.slots)))
        for slot in range(slots, len(self.slots)):
            if self.slots[slot] is not None:
                self.take_away(slot)
        del self.slots[slots:]

    @precondition(lambda self: self.model.name == "score")
    @rule(layer=st.integers(0, 59), scores=st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=5, max_size=5))
    def set_scores(self, layer: int, scores: list[float]) -> None:
        layer %= len(self.experts)
        scores = scores[: self.experts[layer]]
        assert isinstance(self.cache.eviction, Score)
        self.cache.eviction.set_scores(layer, np.array(scores))
        assert self.cache.eviction.scores(layer).tolist() == scores
        self.model.scores.update({(layer, expert): score for expert, score in enumerate(scores)})

    @rule(layer=st.integers(0, 59), bits=BITS)
    def room(self, layer: int, bits: int) -> None:
        layer %= len(self.experts)
        protected = set(chosen(range(len(self.slots)), bits))
        may_go = self.may_go(protected)
        own = sum(self.slots[slot][0] == layer for slot in may_go)  # type: ignore[index]
        others = len(may_go) - own + self.slots.count(None)
        held = sum(owner is not None and owner[0] == layer for owner in self.slots)
        assert self.cache.room(layer, protected) == own + min(others, max(self.budget[layer] - held, 0))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        cache.check_integrity()
        assert cache.slots == len(self.slots)
        assert [cache.owner(slot) for slot in range(cache.slots)] == self.slots
        states = [
            EMPTY if owner is None else READY if slot in self.ready else COMING for slot, owner in enumerate(self.slots)
        ]
        assert [cache.state_of(slot) for slot in range(cache.slots)] == states
        for layer, counts in enumerate(self.counts):
            assert cache.counters(layer) == CacheCounters(**counts)
            assert cache.held(layer) == np.count_nonzero(cache.slot_of(layer) >= 0)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def filled(name: str, wanted: list[Expert], slots: int = 3) -> ExpertCache:
    """Two layers of four experts; the experts come in this order, each in a step of its own."""
    cache = ExpertCache(2, [4, 4], slots, make_eviction(name))
    for step, (layer, expert) in enumerate(wanted):
        if cache.lookup(layer, np.array([expert], np.int32), step)[0] < 0:
            given = cache.place(layer, expert)
            assert given is not None
            cache.arrived(given.slot)
    return cache


def evicted(cache: ExpertCache, layer: int, expert: int, **options: float) -> Expert | None:
    given = cache.place(layer, expert, **options)  # type: ignore[arg-type]
    return None if given is None else given.evicted


def test_lru_takes_the_one_that_was_not_wanted_for_longest() -> None:
    assert evicted(filled("lru", [(0, 0), (0, 1), (1, 2), (0, 0)]), 0, 3) == (0, 1)


@pytest.mark.parametrize("name", ["lru", "least-stale"])
def test_what_was_just_filled_is_recent(name: str) -> None:
    cache = filled(name, [(0, 0), (0, 1)], slots=2)
    cache.lookup(0, np.zeros(0, np.int32), 2)
    cache.evict(0)
    cache.place(0, 2, prefetch=True)
    cache.arrived(0)
    assert evicted(cache, 0, 3) == (0, 1)


def test_lfu_takes_the_one_that_was_wanted_least_often() -> None:
    cache = filled("lfu", [(0, 0), (0, 0), (1, 2), (1, 2), (0, 1)])
    assert evicted(cache, 0, 3) == (0, 1)


def test_lfu_remembers_uses_without_a_slot() -> None:
    cache = filled("lfu", [(0, 0), (0, 1), (0, 1), (1, 2)])
    cache.evict(0)
    assert evicted(cache, 0, 0) is None  # the empty slot
    cache.arrived(0)
    cache.lookup(0, np.array([0], np.int32), 9)
    assert evicted(cache, 0, 3) == (1, 2)


def test_lfu_forgets_with_time() -> None:
    eviction = Lfu(half_life=1.0)
    cache = ExpertCache(1, [3], 2, eviction)
    for step, expert in enumerate([0] * 8 + [1] * 2):
        if cache.lookup(0, np.array([expert], np.int32), step * 2)[0] < 0:
            cache.place(0, expert)
            cache.arrived(expert)
    assert evicted(cache, 0, 2) == (0, 0)
    with pytest.raises(ValueError, match="half_life is 0"):
        Lfu(0)


def test_lfu_counts_on_beyond_the_largest_weight() -> None:
    cache = ExpertCache(1, [3], 2, Lfu(half_life=0.01))
    for step, expert in [(0, 0), (5, 1), (10_000, 0), (10_000, 0), (10_001, 1)]:
        if cache.lookup(0, np.array([expert], np.int32), step)[0] < 0:
            cache.place(0, expert)
            cache.arrived(expert)
    assert [cache.score(slot) for slot in (0, 1)] == [pytest.approx(0.0, abs=1e-20), 1.0]
    assert evicted(cache, 0, 2) == (0, 0)


def test_least_stale_takes_from_the_layer_that_just_ran() -> None:
    cache = filled("least-stale", [(0, 0), (1, 1), (0, 2)])
    assert evicted(cache, 0, 3) == (0, 0)  # layer 0 ran last, and of its experts 2 is fresher
    cache = filled("least-stale", [(0, 0), (1, 1), (0, 2), (1, 1)])
    assert evicted(cache, 0, 3) == (1, 1)


def test_least_stale_scores_by_the_way_to_the_next_turn() -> None:
    cache = filled("least-stale", [(0, 0), (1, 1)])
    assert [cache.score(slot) for slot in (0, 1)] == [0.0, -1.0]
    assert evicted(cache, 0, 3) is None  # the third slot
    assert cache.place(0, 2, better_than=-1.0) is None
    assert evicted(cache, 0, 2, better_than=-0.5) == (1, 1)


def test_a_layer_at_its_budget_takes_from_itself() -> None:
    cache = ExpertCache(2, [4, 4], 4, make_eviction("lru"), [2, 4])
    for slot, (layer, expert) in enumerate([(1, 0), (0, 0), (0, 1)]):
        cache.place(layer, expert)
        cache.arrived(slot)
    assert cache.room(0) == 2 and cache.room(0, [1, 2]) == 0
    assert cache.place(0, 2, protected=[1, 2]) is None
    assert cache.place(0, 2) == Placement(1, (0, 0))
    assert cache.place(1, 1) == Placement(3, None)
    cache.check_integrity()


def test_a_prefetch_that_is_called_off_leaves_nothing() -> None:
    cache = filled("lru", [(0, 0)])
    before = cache.total()
    given = cache.place(1, 2, prefetch=True)
    assert given is not None
    cache.abandon(given.slot)
    cache.check_integrity()
    assert cache.slot_of(1).tolist() == [-1] * 4
    assert cache.total() - before == CacheCounters(prefetches=1, wasted=1)


def test_score_takes_the_least_benefit_and_breaks_ties_by_distance() -> None:
    cache = filled("score", [(0, 0), (1, 1), (0, 2)])
    assert isinstance(cache.eviction, Score)
    cache.eviction.set_scores(0, np.array([3e-4, 0, 1e-4, 0]))
    cache.eviction.set_scores(1, np.array([0, 1e-4, 0, 0]))
    assert evicted(cache, 0, 3, better_than=1e-4) is None
    assert evicted(cache, 0, 3, better_than=2e-4) == (0, 2)  # like (1, 1), but layer 1 is next


def test_scores_are_checked() -> None:
    cache = filled("score", [])
    assert isinstance(cache.eviction, Score)
    with pytest.raises(ValueError, match=r"layer 1 have the shape \(3,\); it has 4 experts"):
        cache.eviction.set_scores(1, np.zeros(3))
    with pytest.raises(ValueError, match="score of expert 2 of layer 0 is not a number"):
        cache.eviction.set_scores(0, np.array([0, 0, np.nan, 0]))


def test_unknown_eviction() -> None:
    with pytest.raises(ValueError, match="'fifo'; there are lru, lfu, least-stale, score"):
        make_eviction("fifo")


def test_what_may_not_be() -> None:
    cache = filled("lru", [(0, 0)])
    with pytest.raises(ValueError, match="expert 0 of layer 0 has slot 0 already"):
        cache.place(0, 0)
    with pytest.raises(ValueError, match="slot 1 is empty"):
        cache.pin(1)
    with pytest.raises(ValueError, match="slot 1 is empty"):
        cache.score(1)
    with pytest.raises(ValueError, match="slot 1 is empty, not coming"):
        cache.arrived(1)
    for slot in (-1, 3):
        with pytest.raises(IndexError, match=f"slot {slot} of 3"):
            cache.state_of(slot)
    cache.lookup(1, np.zeros(1, np.int32), 5)
    with pytest.raises(ValueError, match=r"step 5 of layer 0 comes after \(5, 1\)"):
        cache.lookup(0, np.zeros(1, np.int32), 5)
    with pytest.raises(ValueError, match="shrink 3 slots to 4"):
        cache.shrink(4)
    with pytest.raises(ValueError, match="grow 3 slots to 2"):
        cache.grow(2)
    with pytest.raises(ValueError, match="read-only"):
        cache.slot_of(0)[0] = 2
    for arguments in ((2, [4], 1), (1, [-4], 1), (0, [], 1), (1, [4], -1)):
        with pytest.raises(ValueError):
            ExpertCache(*arguments, make_eviction("lru"))
    with pytest.raises(ValueError, match="layer_budget must be 1 numbers"):
        ExpertCache(1, [4], 1, make_eviction("lru"), [1, 2])


def test_counters_of_a_while() -> None:
    cache = ExpertCache(2, [4, 4], 2, make_eviction("lru"), record_bytes=[7, 9])
    cache.lookup(0, np.array([0, 1], np.int32), 0)
    before = cache.total()
    cache.place(1, 3, prefetch=True)
    cache.lookup(1, np.array([3], np.int32), 0)
    cache.arrived(0)
    cache.lookup(1, np.array([3], np.int32), 1)
    assert cache.total() - before == CacheCounters(hits=1, coming_hits=1, prefetches=1, nbytes=9)
    assert cache.total().hit_rate == 0.5
    assert cache.counters(1).hit_rate == 1.0


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("_slot", 1, 2, "not in slot 2"),
        ("_slot", 0, -1, "slot 0 has"),
        ("_expert", 0, 3, "slot 0 has"),
        ("_state", 0, EMPTY, "slot 0 is in state 0"),
        ("_pinned", 0, True, "evictable"),
        ("_pinned", 2, True, "empty slot 2 is pinned"),
        ("_pinned_layers", 0, True, "evictable"),
        ("_held", 1, 0, "layer 1 holds 1 slots, not 0"),
        ("_budget", 0, 0, "1 slots of 0 allowed"),
        ("_empty", 0, 1, "list of empty slots"),
    ],
)
def test_integrity_names_the_damage(name: str, index: int, value: int, message: str) -> None:
    cache = filled("lru", [(0, 0), (1, 0)])
    cache.check_integrity()
    getattr(cache, name)[index] = value
    with pytest.raises(AssertionError, match=message):
        cache.check_integrity()
