"""Looks ahead: gives idle time of the link to experts that later layers will probably want.

After each layer: what every expert of it is expected to save per step goes into the cache's scores, experts of the next
layers that can arrive in time are queued, best first, and those of this layer that the CPU had to run although they are
worth more than the least valuable slot come behind them. Copies that wait can be called off; only as much as the link
carries until the next decision is handed to the device (`CopyQueue.feed`), so an on-demand fetch waits for little.
Every copy costs the host time that the CPU's experts wait for. It is measured: what saves less stays where it is.

Where the next layers' calls are predicted (`Forecast.fresh`) it goes by the newest word: what waits is called off when
it is not believed in any more; no more is queued than keeps the link busy until the next layer, by when more is known,
the nearest layer first; and what a slot's expert saves counts less the further away its layer is. Whether predictions
pay at all is measured: steps that use them, and the host's time for them, against steps that ask for none and copy
nothing ahead.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.guard import Guard
from moe_offload.scheduling.policies import Policy
from moe_offload.scheduling.prefetch import Yield, choose, savings
from moe_offload.transfer.eviction import Score
from moe_offload.transfer.expert_cache import READY

if TYPE_CHECKING:
    from moe_offload.dispatch_parts import Parts

HORIZON = 3  # layers
READ_AHEAD = 8  # experts of a layer at once, from disk
PACE = 0.3  # how much the newest interval between layers counts
DISTINCTLY = 0.5  # of the worth of what is evicted: by how much one to stay is to be worth more, with a single token
MOST_HELD = 0.25  # of the slots: by what is prefetched and waits, for the link or for its layer
LEAST_SHARE = 0.02  # of a copy's seconds: what it has to save at least for the expert to be read from disk
STAY = 8.0  # steps that an expert which is to stay is expected to
NEWEST = 0.1  # how much the newest measurement of the host's time counts

LAST = -1e30  # the priority of what may come whenever the link has nothing else
FRESH_SCORES = 256  # steps after which all scores are set anew, so that none gets too small

Prefetch = Callable[[int, int, float, float | None], int | None]
CallOff = Callable[[tuple[int, int]], None]


class Prefetcher:
    """One model's look-ahead. `Prefetch` takes layer, expert, priority and the worth of the slot that may be taken."""

    def __init__(self, parts: "Parts", policy: Policy) -> None:
        self._parts = parts
        self.horizon = HORIZON  # layers ahead; 0: nothing is copied but what is to stay
        self._layers = len(parts.kinds)
        eviction = parts.cache.eviction
        self._scores = eviction if isinstance(eviction, Score) else None
        self._saved: list[NDArray[np.float64] | None] = [None] * self._layers
        self._kept: list[NDArray[np.float64]] = [np.empty(0)] * self._layers
        self._saved_for = [0] * self._layers  # tokens
        self._early: dict[int, dict[int, tuple[int, float]]] = {}  # by layer: experts prefetched for its next run
        self._yield = Yield()
        self._pace = 0.0
        self._last = 0.0
        self._tokens = 0
        self._floor = 0.0  # worth of what was evicted last
        self._host = 0.0  # seconds of the host for one prefetch, and for looking ahead without any
        self._idle = 0.0
        self._asked = 0.0  # seconds for predictions, in this layer
        self._trials = Guard()  # "dynamic" stands for steps without predictions, "static" for steps with them
        self._predicted = False  # this step uses predictions
        self._offered = False  # there are any
        self._told = 0  # layers until scores go without predictions again
        self._turn = self._now = 0  # layers since all scores were set, and the one that ran last

    def begin_step(self, tokens: int) -> None:
        """A step begins: are predictions used in it?"""
        self._predicted = self._offered and self._trials.mode(tokens) == "static"

    def end_step(self, tokens: int, seconds: float) -> None:
        """It took so long, with a cache that adapts."""
        if self._offered:
            self._trials.record(tokens, "static" if self._predicted else "dynamic", seconds)

    def protected(self, layer: int | None) -> set[int]:
        """Slots that wait for their layer to run. `layer` runs now: its own are its planner's from here on."""
        if layer is not None:
            self._early.pop(layer, None)
        return {slot for early in self._early.values() for slot, _ in early.values()}

    def settle(self, layer: int, experts: NDArray[np.int32]) -> None:
        """The layer runs with these experts: which of those prefetched for it are there and wanted?"""
        cache = self._parts.cache
        for expert, (slot, presence) in self._early.get(layer, {}).items():
            there = cache.owner(slot) == (layer, expert) and cache.state_of(slot) == READY
            self._yield.observe(presence, there and expert in experts)
        self._yield.tick()

    def forget(self) -> None:
        """Slots were given up or renumbered: nothing waits for its layer any more."""
        self._early.clear()

    def look_ahead(self, layer: int, tokens: int, plan_seconds: float, prefetch: Prefetch, call_off: CallOff) -> None:
        """Layer `layer` of `tokens` tokens is dispatched, its CPU share about to run."""
        now = self._parts.accelerator.now()
        if tokens != self._tokens:
            self._tokens, self._pace = tokens, 0.0
            for each in range(self._layers):  # what is worth most to keep depends on the batch
                self._expect(each, tokens, anew=True)
        elif now > self._last:
            interval = now - self._last
            self._pace += PACE * (min(interval, 4 * self._pace) - self._pace) if self._pace else interval
        self._last, self._asked = now, 0.0
        ahead = self._ahead(layer)
        fresh = self._predicted and any(map(self._parts.forecast.fresh, ahead))
        self._pass(layer, tokens, told=fresh)
        self._expect(layer, tokens, anew=True)
        if fresh:
            self._reconsider(tokens, call_off)
        pace = self._pace or plan_seconds
        queue = self._parts.queue
        copy = self._parts.costs.layer_costs(self._parts.kinds[layer]).copy
        free = pace - queue.backlog() - copy * len(queue.waiting)
        # What waits holds its slot, and on-demand fetches need some too.
        held = max(len(queue.waiting), sum(map(len, self._early.values())))
        room = copy * max(int(self._parts.cache.slots * MOST_HELD) - held, 0)
        for distance, each in enumerate(ahead, 1):
            most = min(free, room)
            if self._told:  # no more than keeps the link busy until the next layer, and what arrives in time
                most = min(room, free + copy, free + (distance - 1) * pace)
            used = most - self._stream(each, tokens, most, prefetch)
            free, room = free - used + (0.0 if self._told else pace), room - used
        self._keep(layer, tokens, min(free, room), prefetch)
        fed = queue.feed(pace) / self._parts.record_bytes[layer]
        spent = self._parts.accelerator.now() - now - self._asked  # predicting is no part of what copies cost
        if fed:
            one = max(spent - self._idle, 0.0) / fed
            self._host += NEWEST * (one - self._host) if self._host else one
        else:
            self._idle += NEWEST * (spent - self._idle) if self._idle else spent
        self._read_ahead((layer + 1) % self._layers, tokens, copy)

    def _expect(self, layer: int, tokens: int, *, anew: bool = False) -> NDArray[np.float64]:
        saved = self._saved[layer]
        if saved is None or anew or self._saved_for[layer] != tokens:
            parts, began = self._parts, self._parts.accelerator.now()
            presence, usual = parts.forecast.presence(layer, tokens), parts.forecast.usual_presence(layer, tokens)
            rows, costs = parts.forecast.expected_rows(layer, tokens), parts.costs.layer_costs(parts.kinds[layer])
            self._asked += parts.accelerator.now() - began if self._told else 0.0
            saved = savings(presence, rows, costs)
            self._saved[layer], self._saved_for[layer] = saved, tokens
            later = savings(usual, rows / np.maximum(presence, 1e-9) * usual, costs)
            self._kept[layer] = kept = saved / STAY + later * (1 - 1 / STAY)
            if self._scores is not None:
                self._scores.set_scores(layer, kept * self._nearness(layer))
        return saved

    def _ahead(self, layer: int) -> list[int]:
        """The next layers, nearest first; none in steps that do without the predictions that there are."""
        parts, count = self._parts, min(self.horizon, self._layers - 1)
        ahead = [(layer + distance) % self._layers for distance in range(1, count + 1)]
        self._offered = self._offered or any(map(parts.forecast.fresh, ahead))
        return ahead if self._predicted or not self._offered else []

    def _pass(self, layer: int, tokens: int, *, told: bool) -> None:
        """A layer has run: all others are one nearer. told: the next ones are predicted."""
        self._now, self._turn = layer, self._turn + 1
        was, self._told = self._told, self._layers if told else max(self._told - 1, 0)
        if bool(was) != bool(self._told) or (self._told and self._turn > FRESH_SCORES * self._layers):
            self._turn = 0
            for each in range(self._layers):
                self._expect(each, tokens, anew=True)

    def _distance(self, layer: int) -> int:
        """Layers until it runs, at least 1."""
        return (layer - self._now - 1) % self._layers + 1

    def _nearness(self, layer: int) -> float:
        """What a saving at the layer's next run counts: a share 1 / STAY less for a whole step later.

        From a fixed point in time, so that as time passes all scores keep their proportion.
        """
        if not self._told:
            return 1.0
        return float((1 - 1 / STAY) ** ((self._turn + self._distance(layer)) / self._layers))

    def _reconsider(self, tokens: int, call_off: CallOff) -> None:
        """What waits for the link was believed in some layers ago; what is said now?"""
        forecast, least = self._parts.forecast, self._host / self._yield.share
        for key in self._parts.queue.waiting:
            layer, expert = key
            if expert in self._early.get(layer, {}) and forecast.fresh(layer):
                saved = self._expect(layer, tokens, anew=True)[expert]
                if saved > least:
                    self._parts.queue.set_priority(key, self._priority(layer, float(saved)))
                else:
                    call_off(key)
                    del self._early[layer][expert]

    def _priority(self, layer: int, saves: float) -> float:
        """The nearest layer first, where layers are predicted; else what saves most."""
        return saves - self._turn - self._distance(layer) if self._told else saves

    def _stream(self, layer: int, tokens: int, free: float, prefetch: Prefetch) -> float:
        """Queue copies for the next run of `layer`; returns what is left of `free` seconds of the link."""
        copy = self._parts.costs.layer_costs(self._parts.kinds[layer]).copy
        if free < copy:
            return free
        saved = self._expect(layer, tokens, anew=self._predicted and self._parts.forecast.fresh(layer))
        absent = self._absent(layer)
        # A slot that streams is used again every few layers, so it may displace what is worth more per step.
        turns = self._nearness(layer) * (1.0 if self._told else self._layers / (HORIZON + 1))
        presence, least = self._parts.forecast.presence(layer, tokens), self._host / self._yield.share
        for candidate in choose(layer, saved, saved, absent, free, copy, least):
            priority = self._priority(layer, candidate.saves)
            slot = prefetch(layer, candidate.expert, priority, candidate.saves * turns)
            if slot is None:
                break
            self._early.setdefault(layer, {})[candidate.expert] = slot, float(presence[candidate.expert])
            free -= copy
        return free

    def _keep(self, layer: int, tokens: int, free: float, prefetch: Prefetch) -> None:
        """Queue experts of the layer that just ran which are worth more than what the cache holds."""
        copy = self._parts.costs.layer_costs(self._parts.kinds[layer]).copy
        if free < copy:
            return
        self._expect(layer, tokens)
        # popularity is known as well as tokens are many, and the best of many absent experts often only seems to be
        more = 1 + DISTINCTLY / math.sqrt(tokens)
        kept, least = self._kept[layer], self._floor * more + self._host / STAY
        for candidate in choose(layer, kept, kept, self._absent(layer), free, copy, least):
            worth = candidate.keep / more * self._nearness(layer)
            if prefetch(layer, candidate.expert, LAST if self._told else 0.0, worth) is None:
                self._floor = max(self._floor, candidate.keep / more)
                return
        self._floor *= 0.9

    def _read_ahead(self, layer: int, tokens: int, copy: float) -> None:
        """Have experts of a layer read from disk that would be worth a copy, were they in host memory."""
        records = self._parts.records
        here = records.is_here(layer)
        if not here.all():
            wanted = ~here & (self._parts.cache.slot_of(layer) < 0)
            best = choose(layer, saved := self._expect(layer, tokens), saved, wanted, READ_AHEAD, 1, LEAST_SHARE * copy)
            records.read_ahead([(layer, candidate.expert) for candidate in best])

    def _absent(self, layer: int) -> NDArray[np.bool_]:
        return np.asarray((self._parts.cache.slot_of(layer) < 0) & self._parts.records.is_here(layer))
