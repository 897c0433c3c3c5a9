"""One MoE layer of one token batch on two devices: plan, dispatch, look ahead, learn.

The host enqueues everything for the device first (copies on the copy stream, launches on the compute stream, events
between them), then runs the CPU's experts itself, then enqueues the addition of their output. It waits for the device
once a layer: when the next router's answer is read. So the device's share, the link's and the CPU's run side by side.

Who may write a slot, and when:

- a slot that an active expert of this layer lies in is *protected* until its launch is on the compute stream;
- after that it may be given to another expert: the copy waits for the slot's last reader (`DeviceSlots.last_read`);
- a prefetched expert's slot is protected until its layer has run;
- a slot that is being filled (COMING) is nobody's to take; its readers wait for the copy's event.

Nothing here knows tensors: `LayerWork` does what is decided. The same code runs models and simulates servers.
"""

import itertools
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.copies import Copies
from moe_offload.device_counts import DeviceCounts, LayerTimes
from moe_offload.dispatch_parts import LayerWork, Parts
from moe_offload.prefetcher import Prefetcher
from moe_offload.scheduling.arrangement import arrange
from moe_offload.scheduling.guard import Guard
from moe_offload.scheduling.host_time import HostTime
from moe_offload.scheduling.layer_plan import COMING, CPU, FETCH, HOST, SLOT, LayerPlan, LayerState
from moe_offload.scheduling.policies import Policy, plan_static
from moe_offload.scheduling.prefetch import savings
from moe_offload.transfer.accelerator import Event
from moe_offload.transfer.expert_cache import COMING as ON_ITS_WAY

NOT_FETCHABLE = -1e9  # seconds: the value of fetching what is on disk only, for planners that weigh


class _Pending(NamedTuple):
    """A job of the device whose time is not known yet."""

    kind: str
    rows: NDArray[np.int64]
    start: Event
    end: Event


class Dispatcher:
    """Runs layers one after the other, in a cycle; one thread at a time.

    overlap=False is the serial twin: every copy and launch is waited for before the next, and the CPU works alone.
    """

    def __init__(self, parts: Parts, policy: Policy, guard: Guard | None = None, *, overlap: bool = True) -> None:
        self.parts, self.policy, self.guard, self.overlap = parts, policy, guard, overlap
        self.counts = DeviceCounts(len(parts.kinds))
        self.prefetcher = Prefetcher(parts) if policy.prefetch else None
        self.step = -1
        self.dynamic = True  # what the guard says of this step
        self._step_started = 0.0
        self._tokens = 0  # of the step; 0: none is open
        self._last_tokens = 1
        self._layer = -1
        self.copies = Copies(parts)
        self._pending: deque[_Pending] = deque()
        self._unfinished = False  # a layer was begun and did not end
        self._stalls: list[tuple[Event, Event]] = []  # of the device, for copies, in this layer
        self._unknown_stalls: deque[tuple[Event, Event, float]] = deque()  # and when the host had nothing else to do
        self.host_time = HostTime()
        self._last_end: Event | None = None  # of the layer's last launch
        self._host_through = 0.0  # when the CPU had run its share of the layer

    # Steps

    def _begin_step(self, tokens: int) -> None:
        """A forward pass begins."""
        self.end_step()
        self._learn_link()
        self.step += 1
        self._tokens = self._last_tokens = tokens
        self._step_started = self.parts.accelerator.now()
        self.host_time.begin(tokens)
        was = self.dynamic
        self.dynamic = self.guard is None or self.guard.mode(tokens) == "dynamic"
        if was and not self.dynamic:
            self.copies.cancel_all()
        if self.prefetcher is not None:
            self.prefetcher.begin_step(tokens)

    def end_step(self) -> None:
        """The forward pass is through. The next one ends it too; then what lies in between counts as its time."""
        if self._tokens == 0:
            return
        seconds = self.parts.accelerator.now() - self._step_started
        if self.guard is not None:
            self.guard.record(self._tokens, "dynamic" if self.dynamic else "static", seconds)
        if self.prefetcher is not None and self.dynamic:
            self.prefetcher.end_step(self._tokens, seconds)
        self.counts.steps += 1
        self.counts.step_seconds += seconds
        self._tokens = 0

    # The cache as a whole

    def fill(self, layer: int, expert: int) -> None:
        """Copy an expert into an empty slot; `finish_filling` waits for all of them."""
        placement = self.parts.cache.place(layer, expert)
        if placement is None or placement.evicted is not None:
            raise ValueError(f"there is no empty slot for expert {expert} of layer {layer}")
        self.copies.fetch((layer, expert), placement.slot)

    def finish_filling(self, *, pin: bool) -> None:
        """Wait for what `fill` began; `pin`: what is in a slot now stays there for good."""
        self.copies.drain()
        if pin:
            cache = self.parts.cache
            for slot in range(cache.slots):
                if cache.owner(slot) is not None:
                    cache.pin(slot)

    def resize(self, slots: int) -> None:
        """Have at most `slots` slots, or as many more as fit. Waits for the device."""
        if self._unfinished:
            self._mend()
        self.copies.cancel_all()
        self.copies.drain()
        self.parts.accelerator.compute.synchronize()
        self._learn_device()
        if self.prefetcher is not None:
            self.prefetcher.forget()
        if slots < len(self.parts.slots):
            self.parts.cache.shrink(self.parts.slots.after_shrinking(slots))
            self.parts.slots.shrink(slots)
        else:
            self.parts.cache.grow(self.parts.slots.grow(slots))

    def slot_worth(self) -> NDArray[np.float64]:
        """What the first, the second, ... slot is expected to save in a step: of all experts, the most first."""
        parts, tokens = self.parts, max(self._last_tokens, 1)
        saved = [
            savings(
                parts.forecast.presence(layer, tokens), parts.forecast.expected_rows(layer, tokens),
                parts.costs.layer_costs(kind),
            )
            for layer, kind in enumerate(parts.kinds)
        ]  # fmt: skip
        return np.sort(np.concatenate(saved))[::-1]

    def _mend(self) -> None:
        """A layer ended half way, by an error or Ctrl-C."""
        self.copies.mend()
        self._stalls.clear()
        self._unfinished = False

    # A layer

    def run(
        self, layer: int, experts: NDArray[np.int32], rows: NDArray[np.int64], tokens: int, work: LayerWork
    ) -> None:
        """Plan and dispatch one layer: experts [A] ascending, with rows [A] of `tokens` tokens.

        When it returns everything is enqueued and the CPU's share is done.
        """
        if self._unfinished:
            self._mend()
        self._unfinished = True
        parts, clock = self.parts, self.parts.accelerator.now
        began = clock()
        if self._tokens == 0 or layer <= self._layer:
            self._begin_step(tokens)
        elif self._last_end is not None and self._last_end.query():
            self.host_time.observe_turn(began - self._host_through, began - self._last_end.time())
        self._layer = layer
        self.copies.note_arrivals()
        self._learn_device()
        if self.prefetcher is not None:
            self.prefetcher.settle(layer, experts)
        slots = parts.cache.lookup(layer, experts, max(self.step, 0))
        state = self._state(layer, experts, rows, tokens, slots)
        costs = parts.costs.layer_costs(parts.kinds[layer])
        if self.prefetcher is not None and self.dynamic:
            costs = self.host_time.adjust(costs, len(experts))
        plan = (self.policy.planner if self.dynamic else plan_static)(state, costs)
        if self.prefetcher is not None and self.dynamic and self.host_time.explores:
            left = arrange(state, costs, (plan.action != CPU) | (state.where == SLOT))
            plan = left if left.seconds <= self.host_time.bearable * plan.seconds else plan
        planned = clock()
        self._last_end = None
        cpu = self._dispatch(layer, state, plan, slots, work)
        enqueued = clock()
        self.host_time.observe_enqueue(len(plan.gpu_order), len(plan.fetch_order), enqueued - planned)
        parts.forecast.observe(layer, experts, rows, tokens)
        if self.prefetcher is not None and self.dynamic:
            self.prefetcher.look_ahead(layer, tokens, plan.seconds, self._prefetch, self.copies.call_off)
        ahead = clock()
        if len(cpu):
            work.on_cpu(cpu)
        done = self._host_through = clock()
        self._learn_stalls(done)
        if len(cpu):
            parts.costs.observe_cpu(parts.kinds[layer], rows[cpu], done - ahead)
        work.join(cpu=bool(len(cpu)))
        if not self.overlap:
            parts.accelerator.compute.synchronize()
        self.counts.add(
            layer, LayerTimes(began, planned, enqueued, ahead, done, clock()), plan.action, rows, cpu,
            parts.cache.slot_of(layer),
        )  # fmt: skip
        self._unfinished = False

    def _state(
        self, layer: int, experts: NDArray[np.int32], rows: NDArray[np.int64], tokens: int, slots: NDArray[np.int32]
    ) -> LayerState:
        parts = self.parts
        where = np.where(slots >= 0, np.int8(SLOT), np.int8(HOST))
        ready = np.zeros(len(experts))
        for position in np.flatnonzero(slots >= 0):
            if parts.cache.state_of(int(slots[position])) == ON_ITS_WAY:
                key = (layer, int(experts[position]))
                if parts.queue.ready(key) is None:  # it waits: submitting it now takes the link like any other fetch
                    where[position] = HOST
                else:
                    where[position] = COMING
                    ready[position] = parts.queue.ready_in(key)
        value = np.full(len(experts), -self.host_time.fetch)
        value[~parts.records.is_here(layer)[experts]] = NOT_FETCHABLE
        # one slot is enough: later fetches take slots whose experts have run; and those that wait have theirs
        on_host = where == HOST
        waiting = int(np.count_nonzero(on_host & (slots >= 0)))
        enough = waiting == np.count_nonzero(on_host) or parts.cache.room(layer, slots[slots >= 0])
        room = (1 << 30) if enough else waiting
        return LayerState(
            layer, tokens, experts, rows, where, ready, value, link_busy=parts.queue.backlog(), room=room
        )  # fmt: skip

    def _dispatch(
        self, layer: int, state: LayerState, plan: LayerPlan, slots: NDArray[np.int32], work: LayerWork
    ) -> NDArray[np.int64]:
        """Enqueue the device's share. Returns the positions that the CPU is to run."""
        experts = state.experts
        for position in np.flatnonzero((plan.action == CPU) & (state.where != SLOT) & (slots >= 0)):
            self.copies.call_off((layer, int(experts[position])))
        slot_of = dict(enumerate(slots.tolist()))
        protected = self.prefetcher.protected(layer) if self.prefetcher is not None else set()
        protected.update(slot_of[p] for p in plan.gpu_order.tolist() if plan.action[p] != FETCH)
        waiting = deque(plan.fetch_order.tolist())
        self._fetch(layer, experts, waiting, slot_of, protected)
        order = plan.gpu_order.tolist()
        resident = [p for p in order if state.where[p] == SLOT]
        if resident:
            self._launch(layer, state, resident, slot_of, protected, work)
            self._fetch(layer, experts, waiting, slot_of, protected)
        arriving = deque(p for p in order if state.where[p] != SLOT)
        turned_away: list[int] = []
        while arriving:
            there = list(itertools.takewhile(lambda p: p not in waiting, arriving))
            if not there:  # no slot can be had even now that all others have run
                turned_away = list(arriving)
                break
            # Half of what is on its way, then half of the rest: few launches, and little left to do when the last
            # arrives.
            group = there[: (len(there) + 1) // 2]
            before = self.parts.accelerator.compute.record(timed=True)
            for position in group:
                arriving.popleft()
                event = self.copies.event((layer, int(experts[position])))
                if event is not None:
                    self.parts.accelerator.compute.wait(event)
            self._stalls.append((before, self.parts.accelerator.compute.record(timed=True)))
            self._launch(layer, state, group, slot_of, protected, work)
            self._fetch(layer, experts, waiting, slot_of, protected)
        cpu = np.flatnonzero(plan.action == CPU)
        return np.sort(np.concatenate([cpu, np.array(turned_away, np.int64)])) if turned_away else cpu

    def _fetch(
        self,
        layer: int,
        experts: NDArray[np.int32],
        waiting: deque[int],
        slot_of: dict[int, int],
        protected: set[int],
    ) -> None:
        """Start the copies of `waiting` positions as far as there are slots for them."""
        while waiting:
            expert = int(experts[waiting[0]])
            if slot_of[waiting[0]] >= 0:  # prefetched, but not submitted yet
                protected.add(slot_of[waiting.popleft()])
                if (layer, expert) in self.parts.queue:
                    self.parts.queue.promote((layer, expert))
            else:
                placement = self.parts.cache.place(layer, expert, protected=protected)
                if placement is None:
                    return
                slot_of[waiting.popleft()] = placement.slot
                protected.add(placement.slot)
                self.copies.fetch((layer, expert), placement.slot)
            if not self.overlap:
                event = self.copies.event((layer, expert))
                if event is not None:
                    event.synchronize()

    def _launch(
        self,
        layer: int,
        state: LayerState,
        positions: list[int],
        slot_of: dict[int, int],
        protected: set[int],
        work: LayerWork,
    ) -> None:
        parts, compute = self.parts, self.parts.accelerator.compute
        start = compute.record(timed=True) if state.where[positions[0]] == SLOT else None
        slots = [slot_of[p] for p in positions]
        work.on_device(np.array(positions, np.int64), slots)
        end = self._last_end = compute.record(timed=True)
        if start is not None:
            self._pending.append(_Pending(parts.kinds[layer], state.rows[positions], start, end))
        for slot in slots:
            parts.slots.read_until(slot, end)
        protected.difference_update(slots)
        if not self.overlap:
            end.synchronize()

    def _prefetch(self, layer: int, expert: int, priority: float, better_than: float | None) -> int | None:
        """Let an expert be copied when the link has time; its slot, or None where no slot is worth less."""
        assert self.prefetcher is not None
        placement = self.parts.cache.place(
            layer, expert, prefetch=True, protected=self.prefetcher.protected(None), better_than=better_than
        )
        if placement is None:
            return None
        self.copies.prefetch((layer, expert), placement.slot, priority)
        return placement.slot

    # What was measured

    def _learn_link(self) -> None:
        queue, nbytes = self.parts.queue, max(self.parts.record_bytes)
        if queue.measured:
            self.parts.costs.observe_copy(nbytes, nbytes / (queue.bandwidth * 1e9))

    def _learn_stalls(self, host_idle: float) -> None:
        """The CPU's share ended at `host_idle`: from then on a device that waits for copies is waited for."""
        self._unknown_stalls.extend((before, after, host_idle) for before, after in self._stalls)
        self._stalls.clear()

    def _learn_device(self) -> None:
        """The host has synchronised with the compute stream since: jobs of the layer before have passed."""
        while self._unknown_stalls and self._unknown_stalls[0][1].query():
            before, after, host_idle = self._unknown_stalls.popleft()
            self.counts.exposed_seconds += max(after.time() - max(before.time(), host_idle), 0.0)
        while self._pending and self._pending[0].end.query():
            job = self._pending.popleft()
            seconds = job.end.time() - job.start.time()
            self.parts.costs.observe_gpu(job.kind, job.rows, seconds)
            self.counts.device_seconds += seconds
