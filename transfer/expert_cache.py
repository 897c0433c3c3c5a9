"""Which expert lies in which slot of the device: bookkeeping only, no bytes and no device.

A slot is EMPTY, COMING (its expert is being copied, or waits to be) or READY. `place` gives an expert a slot, from
another expert where none is empty; then the caller copies, and says `arrived`, or `abandon` when the copy is called
off. What the device may still read is the caller's knowledge: it names such slots as protected, or orders the copy
behind the last reader.
"""

import heapq
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.transfer.cache_counters import CacheCounters, LayerTally
from moe_offload.transfer.eviction import Eviction, ExpertIds

EMPTY, COMING, READY = 0, 1, 2

Slots = Collection[int] | NDArray[np.integer]


class Placement(NamedTuple):
    """A slot that was given, and the (layer, expert) that had it."""

    slot: int
    evicted: tuple[int, int] | None


class ExpertCache:
    """`slots` slots for the experts of `layers` layers, of which layer l has experts[l].

    layer_budget: the most slots each layer may hold. record_bytes: of an expert of each layer, for the counters.
    One thread at a time.
    """

    def __init__(
        self,
        layers: int,
        experts: Sequence[int],
        slots: int,
        eviction: Eviction,
        layer_budget: Sequence[int] | None = None,
        record_bytes: Sequence[int] | None = None,
    ) -> None:
        for what, values in (("experts", experts), ("layer_budget", layer_budget), ("record_bytes", record_bytes)):
            if values is not None and (len(values) != layers or min(values, default=0) < 0):
                raise ValueError(f"{what} must be {layers} numbers, one a layer and none below 0: {list(values)}")
        if layers < 1 or slots < 0:
            raise ValueError(f"{layers} layers and {slots} slots; at least 1 and 0 are needed")
        self.layers, self.slots, self.eviction = layers, slots, eviction
        self._ids = ExpertIds.of(tuple(experts))
        self._record_bytes = tuple((0,) * layers if record_bytes is None else record_bytes)
        self._budget = np.array(experts if layer_budget is None else layer_budget, np.int64)
        self._slot = np.full(len(self._ids), -1, np.int32)  # [ids]
        self._rows = [self._slot[a:b] for a, b in zip(self._ids.first, self._ids.first[1:], strict=False)]
        self._shown = [row.view() for row in self._rows]
        for row in self._shown:
            row.flags.writeable = False
        self._state = np.zeros(slots, np.int8)  # [slots], like the next
        self._expert = np.full(slots, -1, np.int64)  # ids
        self._pinned = np.zeros(slots, np.bool_)
        self._unused = np.zeros(slots, np.bool_)  # prefetched, and not wanted since
        self._evictable = np.zeros(slots, np.bool_)  # READY, and neither it nor its layer is pinned
        self._empty = list(range(slots))  # a heap: the lowest first, so that shrinking costs little
        self._held = np.zeros(layers, np.int64)  # slots of each layer
        self._pinned_layers = np.zeros(layers, np.bool_)
        self._turn = -1
        self._tally = [LayerTally() for _ in range(layers)]
        eviction.start(self._ids)

    def slot_of(self, layer: int) -> NDArray[np.int32]:
        """The slots of the layer's experts, [E]; -1: none. Read-only, and follows what happens."""
        return self._shown[layer]

    def state_of(self, slot: int) -> int:
        """EMPTY, COMING or READY."""
        return int(self._state[self._checked(slot)])

    def owner(self, slot: int) -> tuple[int, int] | None:
        """(layer, expert) of a slot; None when it is empty."""
        expert = int(self._expert[self._checked(slot)])
        return None if expert < 0 else self._name(expert)

    def held(self, layer: int) -> int:
        """How many slots the layer has now."""
        return int(self._held[layer])

    def lookup(self, layer: int, experts: NDArray[np.int32], step: int) -> NDArray[np.int32]:
        """The slots of experts (no one twice) that have tokens now, -1 where there is none: counted, and noted as use.

        Steps and, within a step, layers do not go back.
        """
        turn = step * self.layers + layer
        if turn < self._turn:
            raise ValueError(f"step {step} of layer {layer} comes after {divmod(self._turn, self.layers)}")
        self._turn = turn
        self.eviction.wanted(experts + np.int64(self._ids.first[layer]), turn)
        slots = self._rows[layer].take(experts)
        found = slots[slots >= 0]
        ready = int(np.count_nonzero(self._state.take(found) == READY))
        self._unused[found] = False
        tally = self._tally[layer]
        tally.hits += ready
        tally.coming_hits += len(found) - ready
        tally.misses += len(slots) - len(found)
        return slots

    def next_victim(self, layer: int, protected: Slots = ()) -> int | None:
        """The slot that `place` would take from another expert now, were no slot empty; None: nothing may go."""
        slots = self._free_to_go(protected).nonzero()[0]
        experts = self._expert.take(slots)
        if self._held[layer] >= self._budget[layer]:
            own = self._ids.layer_of.take(experts) == layer
            slots, experts = slots[own], experts[own]
        return int(slots[self.eviction.victim(experts, self._turn)]) if len(slots) else None

    def room(self, layer: int, protected: Slots = ()) -> int:
        """How many experts of the layer `place` would find slots for now, one after the other."""
        free = self._free_to_go(protected)
        own = int(np.count_nonzero(self._ids.layer_of[self._expert[free]] == layer))
        others = int(np.count_nonzero(free)) - own + len(self._empty)
        return own + min(others, max(int(self._budget[layer] - self._held[layer]), 0))

    def _free_to_go(self, protected: Slots) -> NDArray[np.bool_]:
        free = self._evictable.copy()
        if len(protected):
            free[protected if isinstance(protected, np.ndarray) else list(protected)] = False
        return free

    def place(
        self,
        layer: int,
        expert: int,
        *,
        prefetch: bool = False,
        protected: Slots = (),
        better_than: float | None = None,
    ) -> Placement | None:
        """Give an expert that has none a slot, COMING from now on.

        `protected`: slots that may not be taken. better_than: take a slot only from an expert that the eviction scores
        lower than this. None: no slot may be taken.
        """
        if self._rows[layer][expert] >= 0:
            raise ValueError(f"expert {expert} of layer {layer} has slot {self._rows[layer][expert]} already")
        evicted = None
        if self._empty and self._held[layer] < self._budget[layer]:
            slot = heapq.heappop(self._empty)
        else:
            victim = self.next_victim(layer, protected)
            if victim is None:
                return None
            slot = victim
            if better_than is not None and not self.score(slot) < better_than:
                return None
            evicted = self._name(int(self._expert[slot]))
            self._take_away(slot)
        unique = self._ids.first[layer] + expert
        self._slot[unique], self._expert[slot], self._state[slot] = slot, unique, COMING
        self._unused[slot] = prefetch
        self._held[layer] += 1
        tally = self._tally[layer]
        if prefetch:
            tally.prefetches += 1
        else:
            tally.fetches += 1
        self.eviction.filled(unique, self._turn)
        return Placement(slot, evicted)

    def score(self, slot: int) -> float:
        """What the eviction thinks of the expert in a slot: see `better_than`."""
        if self.owner(slot) is None:
            raise ValueError(f"slot {slot} is empty")
        return float(self.eviction.score(int(self._expert[slot]), self._turn))

    def arrived(self, slot: int) -> None:
        """The expert's bytes are there, or whoever reads them is ordered behind the copy."""
        self._expect(slot, COMING)
        layer = int(self._ids.layer_of[self._expert[slot]])
        self._state[slot] = READY
        self._evictable[slot] = not (self._pinned[slot] or self._pinned_layers[layer])
        self._tally[layer].nbytes += self._record_bytes[layer]

    def abandon(self, slot: int) -> None:
        """The copy into a COMING slot was called off: it is empty again."""
        self._expect(slot, COMING)
        self._take_away(slot)
        heapq.heappush(self._empty, slot)

    def evict(self, slot: int) -> None:
        """Empty a READY slot."""
        self._expect(slot, READY)
        if not self._evictable[slot]:
            raise ValueError(f"slot {slot} is pinned; unpin it, or its layer, first")
        self._take_away(slot)
        heapq.heappush(self._empty, slot)

    def shrink(self, slots: int) -> list[int]:
        """Go on with the first `slots` slots. Returns the others, whose experts are gone, pinned ones too.

        The caller has seen to it that nothing in flight uses them.
        """
        if not 0 <= slots <= self.slots:
            raise ValueError(f"cannot shrink {self.slots} slots to {slots}")
        gone = list(range(slots, self.slots))
        for slot in gone:
            if self._state[slot] != EMPTY:
                self._take_away(slot)
        self._empty = sorted(slot for slot in self._empty if slot < slots)
        self._resize(slots)
        return gone

    def grow(self, slots: int) -> None:
        """Go on with `slots` slots, the new ones empty."""
        if slots < self.slots:
            raise ValueError(f"cannot grow {self.slots} slots to {slots}")
        for slot in range(self.slots, slots):
            heapq.heappush(self._empty, slot)
        self._resize(slots)

    def _resize(self, slots: int) -> None:
        more = max(slots - self.slots, 0)
        for name, value in (("_state", EMPTY), ("_expert", -1), ("_pinned", 0), ("_unused", 0), ("_evictable", 0)):
            setattr(self, name, np.pad(getattr(self, name)[:slots], (0, more), constant_values=value))
        self.slots = slots

    def pin(self, slot: int, on: bool = True) -> None:
        """Whether the expert in a slot may be evicted: a pin ends with `on=False`, or when the slot is emptied."""
        if self.owner(slot) is None:
            raise ValueError(f"slot {slot} is empty: there is nothing to pin")
        self._pinned[slot] = on
        self._judge(np.array([slot]))

    def pin_layer(self, layer: int, on: bool = True) -> None:
        """Whether the layer's experts, now and later, may be evicted."""
        self._pinned_layers[layer] = on
        row = self._rows[layer]
        self._judge(row[row >= 0])

    def _judge(self, slots: NDArray[np.integer]) -> None:
        layers = self._ids.layer_of.take(self._expert[slots])
        self._evictable[slots] = (self._state[slots] == READY) & ~self._pinned[slots] & ~self._pinned_layers[layers]

    def counters(self, layer: int) -> CacheCounters:
        """What was counted so far."""
        return self._tally[layer].snapshot()

    def total(self) -> CacheCounters:
        """Over all layers."""
        return sum((tally.snapshot() for tally in self._tally), CacheCounters())

    def check_integrity(self) -> None:
        """AssertionError naming the first thing that does not agree with the rest."""
        assert len(self._state) == len(self._expert) == len(self._pinned) == len(self._unused) == self.slots, "sizes"
        for slot, (state, expert) in enumerate(zip(self._state.tolist(), self._expert.tolist(), strict=True)):
            assert (state == EMPTY) == (expert < 0), f"slot {slot} is in state {state} with expert {expert}"
            if state == EMPTY:
                assert not self._pinned[slot] and not self._unused[slot], f"empty slot {slot} is pinned or prefetched"
            else:
                assert self._slot[expert] == slot, f"slot {slot} has {self._name(expert)}, who has {self._slot[expert]}"
            may_go = state == READY and not self._pinned[slot]
            may_go = may_go and not self._pinned_layers[self._ids.layer_of[expert]]
            assert self._evictable[slot] == may_go, f"slot {slot}: evictable is {self._evictable[slot]}"
        empty = np.flatnonzero(self._state == EMPTY).tolist()
        assert sorted(self._empty) == empty, f"the list of empty slots is {sorted(self._empty)}, the slots are {empty}"
        for expert in np.flatnonzero(self._slot >= 0).tolist():
            slot = int(self._slot[expert])
            assert slot < self.slots and self._expert[slot] == expert, f"{self._name(expert)} is not in slot {slot}"
        for layer, row in enumerate(self._rows):
            held = int(np.count_nonzero(row >= 0))
            assert self._held[layer] == held, f"layer {layer} holds {held} slots, not {self._held[layer]}"
            assert held <= self._budget[layer], f"layer {layer} holds {held} slots of {self._budget[layer]} allowed"

    def _take_away(self, slot: int) -> None:
        """The expert of the slot has it no longer; the slot is EMPTY, but not yet in the list of empty ones."""
        expert = int(self._expert[slot])
        layer = int(self._ids.layer_of[expert])
        tally = self._tally[layer]
        tally.evictions += int(self._state[slot] == READY)
        tally.wasted += int(self._unused[slot])
        self._slot[expert], self._expert[slot], self._state[slot] = -1, -1, EMPTY
        self._pinned[slot] = self._unused[slot] = self._evictable[slot] = False
        self._held[layer] -= 1

    def _name(self, expert: int) -> tuple[int, int]:
        layer = int(self._ids.layer_of[expert])
        return layer, expert - self._ids.first[layer]

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of {self.slots}")
        return slot

    def _expect(self, slot: int, state: int) -> None:
        found = self.state_of(slot)
        if found != state:
            names = ("empty", "coming", "ready")
            raise ValueError(f"slot {slot} is {names[found]}, not {names[state]}")
