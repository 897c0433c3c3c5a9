"""Looks ahead: gives idle time of the link to experts that later layers will probably want.

After each layer what every expert of it is expected to save goes into the cache's scores (`prefetch_worth.py`). Then
copies are queued. First those *ahead*, of experts of the next layers, nearest layer first, as many as keep the link
busy until the next layer and arrive in time (`Booking`); what waits and is not believed in any more is called off.
Then those to *keep*, of experts of this layer that the CPU had to run although they are worth more than the least
valuable slot. Only as much as the link carries until the next layer is handed to the device (`CopyQueue.feed`), so an
on-demand fetch waits for little. Every copy costs the host time that the CPU's experts wait for. It is measured: what
saves less stays where it is. Whether copies ahead pay at all is measured by whole steps (`prefetch_gate.py`); where
they do not, nothing is copied ahead and no prediction is asked for.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moe_offload.dispatch_parts import Parts
from moe_offload.prefetch_gate import PrefetchGate
from moe_offload.prefetch_worth import STAY, ExpertWorth
from moe_offload.scheduling.prefetch import Booking, CopyEffort, Yield, choose

HORIZON = 3  # layers
READ_AHEAD = 8  # experts of a layer at once, from disk
PACE = 0.3  # how much the newest interval between layers counts
DISTINCTLY = 0.5  # of the worth of what is evicted: by how much one to stay is to be worth more, with a single token
MOST_HELD = 0.25  # of the slots: by what is prefetched and waits, for the link or for its layer
LEAST_SHARE = 0.02  # of a copy's seconds: what it has to save at least for the expert to be read from disk
LAST = -1e30  # the priority of what may come whenever the link has nothing else

Prefetch = Callable[[int, int, float, float | None], int | None]
CallOff = Callable[[tuple[int, int]], None]


class Prefetcher:
    """One model's look-ahead. `Prefetch` takes layer, expert, priority and the worth of the slot that may be taken."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.gate = PrefetchGate()
        self._layers = len(parts.kinds)
        self._worth = ExpertWorth(parts)
        self._early: dict[int, dict[int, tuple[int, float]]] = {}  # by layer: experts prefetched for its next run
        self._yield = Yield()
        self._effort = CopyEffort()
        self._pace = 0.0
        self._last = 0.0
        self._tokens = 0
        self._floor = 0.0  # worth of what was evicted last

    def begin_step(self, tokens: int) -> None:
        """A step begins: is anything copied ahead in it?"""
        self.gate.begin_step(tokens)

    def end_step(self, tokens: int, seconds: float) -> None:
        """It took so long, with a cache that adapts."""
        self.gate.end_step(tokens, seconds)

    def protected(self, layer: int | None) -> set[int]:
        """Slots that wait for their layer to run. `layer` runs now: its own are its planner's from here on."""
        if layer is not None:
            self._early.pop(layer, None)
        return {slot for early in self._early.values() for slot, _ in early.values()}

    def settle(self, layer: int, experts: NDArray[np.int32]) -> None:
        """The layer runs with these experts: which of those prefetched for it are wanted, and there or on their way?"""
        cache, queue = self._parts.cache, self._parts.queue
        for expert, (slot, presence) in self._early.get(layer, {}).items():
            key = layer, expert
            there = cache.owner(slot) == key and (key not in queue or queue.ready(key) is not None)
            self._yield.observe(presence, there and expert in experts)
        self._yield.tick()

    def forget(self) -> None:
        """Slots were given up or renumbered: nothing waits for its layer any more."""
        self._early.clear()

    def look_ahead(self, layer: int, tokens: int, plan_seconds: float, prefetch: Prefetch, call_off: CallOff) -> None:
        """Layer `layer` of `tokens` tokens is dispatched, its CPU share about to run."""
        worth, queue, clock = self._worth, self._parts.queue, self._parts.accelerator.now
        now, asked = clock(), worth.asked
        self._keep_pace(now, tokens)
        worth.passed(layer, tokens)
        worth.saved(layer, tokens, anew=True)
        pace, copy = self._pace or plan_seconds, self._copy(layer)
        if self.gate.open:
            self._reconsider(tokens, call_off)
        # What waits holds its slot, and on-demand fetches need some too.
        held = max(len(queue.waiting), sum(map(len, self._early.values())))
        slots = max(int(self._parts.cache.slots * MOST_HELD) - held, 0)
        booking = Booking(pace, queue.backlog() + copy * len(queue.waiting), slots)
        if self.gate.open:
            for distance in range(1, min(HORIZON, self._layers - 1) + 1):
                self._copy_ahead((layer + distance) % self._layers, distance, tokens, booking, prefetch)
        self._keep(layer, tokens, booking, prefetch)
        fed = queue.feed(pace) / self._parts.record_bytes[layer]
        self._effort.observe(clock() - now - (worth.asked - asked), fed)  # a prediction is no part of what copies cost
        self._read_ahead((layer + 1) % self._layers, tokens, copy)

    def _keep_pace(self, now: float, tokens: int) -> None:
        if tokens != self._tokens:
            self._tokens, self._pace = tokens, 0.0
            self._worth.renew(tokens)
        elif now > self._last:
            interval = now - self._last
            self._pace += PACE * (min(interval, 4 * self._pace) - self._pace) if self._pace else interval
        self._last = now

    def _reconsider(self, tokens: int, call_off: CallOff) -> None:
        """What waits for the link was believed in some layers ago; what is said now?"""
        for key in self._parts.queue.waiting:
            layer, expert = key
            if expert in self._early.get(layer, {}) and self._parts.forecast.fresh(layer):
                saves = float(self._worth.saved(layer, tokens, anew=True)[expert])
                if saves > self._least():
                    self._parts.queue.set_priority(key, self._priority(layer, saves))
                else:
                    call_off(key)
                    del self._early[layer][expert]

    def _copy_ahead(self, layer: int, distance: int, tokens: int, booking: Booking, prefetch: Prefetch) -> None:
        """Queue copies for the next run of `layer`, which is so many layers ahead."""
        copy, forecast = self._copy(layer), self._parts.forecast
        seconds = booking.seconds(distance, copy)
        if seconds < copy:
            return
        saved = self._worth.saved(layer, tokens, anew=forecast.fresh(layer))
        presence, near = forecast.presence(layer, tokens), self._worth.nearness(layer)
        for candidate in choose(layer, saved, saved, self._absent(layer), seconds, copy, self._least()):
            slot = prefetch(layer, candidate.expert, self._priority(layer, candidate.saves), candidate.saves * near)
            if slot is None:
                break
            self._early.setdefault(layer, {})[candidate.expert] = slot, float(presence[candidate.expert])
            booking.take(copy)

    def _keep(self, layer: int, tokens: int, booking: Booking, prefetch: Prefetch) -> None:
        """Queue experts of the layer that just ran which are worth more than what the cache holds."""
        copy = self._copy(layer)
        seconds = booking.seconds(1, copy)
        if seconds < copy:
            return
        # popularity is known as well as tokens are many, and the best of many absent experts often only seems to be
        more = 1 + DISTINCTLY / math.sqrt(tokens)
        kept, near = self._worth.kept(layer, tokens), self._worth.nearness(layer)
        least = self._floor * more + self._effort.seconds / STAY
        for candidate in choose(layer, kept, kept, self._absent(layer), seconds, copy, least):
            worth = candidate.keep / more
            if prefetch(layer, candidate.expert, LAST, worth * near) is None:
                self._floor = max(self._floor, worth)
                return
        self._floor *= 0.9

    def _read_ahead(self, layer: int, tokens: int, copy: float) -> None:
        """Have experts of a layer read from disk that would be worth a copy, were they in host memory."""
        records = self._parts.records
        here = records.is_here(layer)
        if not here.all():
            wanted = ~here & (self._parts.cache.slot_of(layer) < 0)
            saved = self._worth.saved(layer, tokens)
            best = choose(layer, saved, saved, wanted, READ_AHEAD, 1, LEAST_SHARE * copy)
            records.read_ahead([(layer, candidate.expert) for candidate in best])

    def _priority(self, layer: int, saves: float) -> float:
        """The nearest layer first, and within it what saves most: a run's seconds are far below 1."""
        return saves - self._worth.place(layer)

    def _least(self) -> float:
        """What a copy ahead has to save at least, as forecasts say, to be worth the host's time."""
        return self._effort.seconds / self._yield.share

    def _copy(self, layer: int) -> float:
        return self._parts.costs.layer_costs(self._parts.kinds[layer]).copy

    def _absent(self, layer: int) -> NDArray[np.bool_]:
        return np.asarray((self._parts.cache.slot_of(layer) < 0) & self._parts.records.is_here(layer))
