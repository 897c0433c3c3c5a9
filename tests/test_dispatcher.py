"""The dispatcher with experts that are nothing but their number: each runs once, where its bytes are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_offload.copies import Copies
from moe_offload.device_costs import Kind, _virtual_costs
from moe_offload.dispatch_parts import Parts
from moe_offload.dispatcher import Dispatcher
from moe_offload.prefetcher import Prefetcher
from moe_offload.scheduling.cost_model import CostModel
from moe_offload.scheduling.forecast import Popularity
from moe_offload.scheduling.guard import Guard
from moe_offload.scheduling.policies import POLICIES, find_policy
from moe_offload.transfer.accelerator import OutOfDeviceMemoryError, Work
from moe_offload.transfer.copy_queue import CopyQueue
from moe_offload.transfer.device_slots import DeviceSlots
from moe_offload.transfer.eviction import EVICTIONS
from moe_offload.transfer.expert_cache import ExpertCache
from moe_offload.transfer.expert_store import ExpertStore
from moe_offload.transfer.server_profile import PROFILES
from moe_offload.transfer.virtual import RaceError, VirtualAccelerator

SIZES = (768, 512)  # bytes of a record, by layers in turn
FLOPS = 2 * SIZES[0]
# Servers slow enough for such records to take as long as real ones, with a link that is worth waiting for, or not.
_SLOW = replace(PROFILES["gtx1080ti"], memory_gbs=0.01, flops=1e8, host_flops=1e9, expert_tables=())
SERVERS = {
    "usual": replace(_SLOW, name="usual", link_gbs=0.0005, host_read_gbs=0.002),
    "fast link": replace(_SLOW, name="fast link", link_gbs=0.01, host_read_gbs=0.001),
    "slow link": replace(_SLOW, name="slow link", link_gbs=0.0001, host_read_gbs=0.005),
}


class Numbers:
    """A record source whose records hold their layer and expert, again and again."""

    def __init__(self, experts: int) -> None:
        self.num_experts = experts

    def record_bytes(self, layer: int) -> int:
        return SIZES[layer % 2]

    def read_into(self, layer: int, expert: int, out: NDArray[np.uint8]) -> None:
        out[0::2], out[1::2] = layer, expert

    def will_need(self, layer: int, expert: int) -> None: ...


@dataclass
class Naive:
    """A `LayerWork` that writes down who ran, and looks at the bytes that experts on the device have."""

    accelerator: VirtualAccelerator
    slots: DeviceSlots
    layer: int
    experts: NDArray[np.int32]
    rows: NDArray[np.int64]
    fails_at: int = -1  # so many calls from now
    on_gpu: list[int] = field(default_factory=list)
    on_host: list[int] = field(default_factory=list)
    joins: list[bool] = field(default_factory=list)

    def on_device(self, positions: NDArray[np.int64], slots: Sequence[int]) -> None:
        self._count()
        experts = self.experts[positions].tolist()

        def look(*records: torch.Tensor) -> None:
            for expert, record in zip(experts, records, strict=True):
                assert (record[0::2] == self.layer).all() and (record[1::2] == expert).all()

        size = SIZES[self.layer % 2]
        reads = [self.slots.buffer(slot).part(0, size) for slot in slots]
        work = Work(size, FLOPS, self.rows[positions], launches=len(positions))
        self.accelerator.launch(self.accelerator.compute, look, reads, (), work)
        self.on_gpu += experts

    def on_cpu(self, positions: NDArray[np.int64]) -> None:
        self._count()
        work = Work(SIZES[self.layer % 2], FLOPS, self.rows[positions])
        self.accelerator.run_host(lambda: self.on_host.extend(self.experts[positions].tolist()), work)

    def join(self, *, cpu: bool) -> None:
        self._count()
        self.joins.append(cpu)

    def _count(self) -> None:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise KeyboardInterrupt


class Says:
    """A guard that says what it was told to say, step after step."""

    def __init__(self, modes: str) -> None:
        self.modes, self.step = modes, 0
        self.told: list[tuple[int, str]] = []

    def mode(self, tokens: int) -> Literal["dynamic", "static"]:
        self.step += 1
        return "dynamic" if self.modes[self.step % len(self.modes)] == "d" else "static"

    def record(self, tokens: int, mode: str, seconds: float) -> None:
        self.told.append((tokens, mode))


class World:
    """A dispatcher and all that it needs."""

    def __init__(
        self, policy: str, layers: int, experts: int, slots: int, *, server: str = "usual", records: int | None = None,
        guard: str = "", overlap: bool = True,
    ) -> None:  # fmt: skip
        self.layers, self.experts = layers, experts
        self.accelerator = VirtualAccelerator(SERVERS[server], 1 << 20)
        budget = None if records is None else 4096 * records
        self.store = ExpertStore(Numbers(experts), self.accelerator.host_arena, range(layers), budget)
        self.slots = DeviceSlots(self.accelerator, max(SIZES), slots, slab_bytes=2 * max(SIZES))
        sizes = [SIZES[layer % 2] for layer in range(layers)]
        chosen = find_policy(policy)
        self.cache = ExpertCache(layers, [experts] * layers, slots, EVICTIONS[chosen.eviction](), record_bytes=sizes)
        self.queue: CopyQueue[tuple[int, int]] = CopyQueue(self.accelerator, chunk_bytes=256)
        kinds = tuple(Kind(f"{size}", size, FLOPS) for size in SIZES)
        costs = CostModel.from_dict(_virtual_costs(SERVERS[server], kinds))
        parts = Parts(
            self.accelerator, self.slots, self.cache, self.queue, self.store, costs, [f"{size}" for size in sizes],
            sizes, Popularity(layers, experts),
        )  # fmt: skip
        said = Says(guard)
        self.guard = said
        self.dispatcher = Dispatcher(parts, chosen, cast(Guard, said) if guard else None, overlap=overlap)
        if chosen.placement != "empty":
            for at in range(min(slots - (chosen.placement == "static"), layers * experts)):
                self.dispatcher.fill(at % layers, at // layers)
            self.dispatcher.finish_filling(pin=chosen.placement == "static")

    def run(self, layer: int, experts: Sequence[int], tokens: int, fails_at: int = -1) -> Naive:
        """One layer; the host waits for the device behind it, as it does for the next router's answer."""
        active = np.array(sorted(experts), np.int32)
        rows = np.array([1 + (7 * expert + layer) % tokens for expert in active], np.int64)
        work = Naive(self.accelerator, self.slots, layer, active, rows, fails_at)
        self.dispatcher.run(layer, active, rows, tokens, work)
        self.accelerator.compute.synchronize()
        return work

    def check(self) -> None:
        self.cache.check_integrity()
        self.store.check_integrity()
        assert len(self.slots) == self.cache.slots
        assert self.accelerator.peak <= self.accelerator.budget

    def close(self) -> None:
        self.queue.close()
        self.store.close()
        self.accelerator.close()


@contextmanager
def world(*args: Any, **kwargs: Any) -> Iterator[World]:
    made = World(*args, **kwargs)
    try:
        yield made
        made.check()
    finally:
        made.close()


@st.composite
def routings(draw: st.DrawFn, layers: int, experts: int) -> list[list[list[int]]]:
    """[steps][layers]: active experts."""
    active = st.lists(st.integers(0, experts - 1), min_size=1, max_size=experts, unique=True)
    usual = draw(st.lists(active, min_size=layers, max_size=layers))
    step = st.one_of(st.just(usual), st.lists(active, min_size=layers, max_size=layers))
    return draw(st.lists(step, min_size=1, max_size=6))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_active_expert_runs_once_on_its_own_bytes(data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 4), "layers"), data.draw(st.integers(1, 10), "experts")
    slots = data.draw(st.integers(2, layers * experts + 2), "slots")
    with world(
        data.draw(st.sampled_from(sorted(POLICIES)), "policy"), layers, experts, slots,
        server=data.draw(st.sampled_from(sorted(SERVERS)), "server"),
        records=data.draw(st.one_of(st.none(), st.integers(2, layers * experts + 1)), "records"),
        guard=data.draw(st.sampled_from(["", "d", "s", "ds", "dds"]), "guard"),
        overlap=data.draw(st.booleans(), "overlap"),
    ) as made:  # fmt: skip
        for step in data.draw(routings(layers, experts), "routing"):
            tokens = data.draw(st.sampled_from([1, 2, 20]), "tokens")
            for layer, active in enumerate(step):
                work = made.run(layer, active, tokens)
                assert sorted(work.on_gpu + work.on_host) == sorted(active)
                assert work.joins == [bool(work.on_host)]
                made.check()
            if data.draw(st.booleans(), "resized"):
                made.dispatcher.resize(data.draw(st.integers(2, layers * experts + 2), "size"))
                made.check()
        made.dispatcher.resize(2)
        assert not made.dispatcher.copies
        assert not any(record.holds for record in made.store._tier.records.values())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.integers(2, 14), st.integers(1, 3), st.integers(0, 3), st.integers(0, 9))
def test_whatever_ended_half_way_the_next_layer_is_right(
    policy: str, slots: int, fails_at: int, layer: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    with world(policy, 4, 6, slots, server="fast link") as made:
        for step in range(4):
            for at in range(4):
                active = random.choice(6, random.integers(1, 7), replace=False).tolist()
                try:
                    work = made.run(at, active, 3, fails_at if (step, at) == (2, layer) else -1)
                except KeyboardInterrupt:
                    break
                assert sorted(work.on_gpu + work.on_host) == sorted(active)
        made.dispatcher.resize(2)
        assert not made.dispatcher.copies
        assert not any(record.holds for record in made.store._tier.records.values())


def alternating(made: World, steps: int = 40) -> None:
    """Experts that repeat from step to step, in every layer others."""
    for step in range(steps):
        for layer in range(made.layers):
            usual = [(layer + n) % made.experts for n in range(made.experts // 2)]
            made.run(layer, usual if step % 5 else range(made.experts), 2)
            still_there(made, layer)


def still_there(made: World, ran: int) -> None:
    """Whatever was prefetched for a layer is in its slot until the layer runs."""
    prefetcher = made.dispatcher.prefetcher
    assert prefetcher is not None
    for layer, experts in prefetcher._early.items():
        for expert, (slot, _) in experts.items():
            assert layer == ran or made.cache.owner(slot) == (layer, expert), "a prefetched expert was evicted"


@pytest.mark.parametrize("policy", ["ours", "makespan-greedy"])
def test_prefetched_experts_stay_until_their_layer_has_run(policy: str) -> None:
    for server in ("usual", "fast link"):
        with world(policy, 4, 8, 10, server=server) as made:
            alternating(made)
    assert made.cache.total().prefetches > 0


def test_a_guard_that_says_static_stops_fetching() -> None:
    with world("ours", 3, 8, 12, server="fast link", guard="s") as made:
        for _ in range(12):
            for layer in range(3):
                made.run(layer, range(2, 8), 4)
        total = made.cache.total()
        assert total.prefetches == 0 and total.fetches == 12  # those of the beginning
        made.dispatcher.end_step()
        assert made.guard.told == [(4, "static")] * 12


def test_steps_and_rows_are_counted() -> None:
    with world("lru", 2, 6, 4, server="fast link") as made:
        rows = 0
        for _ in range(5):
            for layer in range(2):
                rows += int(made.run(layer, [0, 2, 3], 4).rows.sum())
        made.dispatcher.end_step()
        made.dispatcher.end_step()
        counts = [made.dispatcher.counts.layer(layer) for layer in range(2)]
        assert made.dispatcher.counts.steps == 5
        assert [each.calls for each in counts] == [5, 5]
        assert sum(each.cpu_rows + each.gpu_rows for each in counts) == rows
        assert sum(each.cpu_experts + each.gpu_experts + each.fetched_experts for each in counts) == 30


def test_more_experts_at_once_than_host_memory_holds() -> None:
    """Copies end before others begin, and prefetches are called off."""
    for policy in ("lru", "ours"):
        with world(policy, 3, 12, 30, server="fast link", records=2) as made:
            for _ in range(4):
                for layer in range(3):
                    work = made.run(layer, range(12), 3)
                    assert sorted(work.on_gpu + work.on_host) == list(range(12))


def test_a_device_without_memory_for_more_slots() -> None:
    with world("lru", 2, 8, 4) as made:
        made.run(0, range(8), 2)
        made.accelerator.shrink_budget(made.accelerator.used)
        made.dispatcher.resize(12)
        assert len(made.slots) == 4
        made.run(1, range(8), 2)
        with pytest.raises(OutOfDeviceMemoryError):
            made.accelerator.allocate(1, "more")


# Planted mistakes


def test_a_dispatcher_that_does_not_wait_for_copies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies, "event", lambda self, key: None)
    with pytest.raises(RaceError, match="not ordered after the write"), world("lru", 2, 8, 6) as made:
        made.run(0, range(4), 2)


def test_slots_that_forget_their_readers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceSlots, "last_read", lambda self, slot: None)
    with pytest.raises(RaceError, match="not ordered after the read"), world("lru", 1, 8, 5) as made:
        made.run(0, [0, 1, 2, 3], 2)
        made.run(0, range(8), 2)


def test_prefetches_that_nobody_protects_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prefetcher, "protected", lambda self, layer: set())
    with pytest.raises(AssertionError, match="was evicted"):
        for server in ("usual", "fast link"):
            with world("makespan-greedy", 4, 8, 10, server=server) as made:
                alternating(made)
