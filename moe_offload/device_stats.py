"""What running on two devices came to: `model.offload.stats()`, and the table of `--stats`."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from moe_offload.memory import format_bytes
from moe_offload.predictor_stats import PredictorStats
from moe_offload.scheduling.guard import Verdict

if TYPE_CHECKING:
    from moe_offload.device_side import DeviceSide


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One MoE layer. Experts are counted once per call and place; `fetched` are those that were copied on demand.

    resident: experts in slots now. hit_rate: of the experts wanted, the share that was in a slot or on its way. whole:
    calls that left the host alone, since all of the layer's experts are on the device (not in `calls`); rows_on_device
    has their rows, on_device not their experts.
    """

    layer: int
    calls: int
    resident: int
    hit_rate: float
    on_cpu: int
    on_device: int
    fetched: int
    rows_on_cpu: int
    rows_on_device: int
    copied_bytes: int
    prefetches: int
    wasted_prefetches: int
    evictions: int
    whole: int


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """Totals since the model was loaded. Times are seconds on the accelerator's clock, modelled where `simulated`.

    overlap: share of the copies' time during which nobody waited for them; None where nothing was copied. seconds: of
    the host, by what it did; "model" is what the model's own modules took, and all else. kv_on_host: layers whose KV
    cache is in host memory; None before the first forward with a cache. predictor: None where there is none.
    """

    device: str
    simulated: bool
    policy: str
    memory_budget: int
    memory_used: int
    memory_peak: int
    slots: int
    slot_bytes: int
    steps: int
    layers: tuple[LayerStats, ...]
    copied_on_demand: int
    prefetched: int
    link_gb_per_s: float | None
    copy_seconds: float
    overlap: float | None
    seconds: dict[str, float]
    kv_on_host: int | None
    attention_on_host: int
    attention_on_device: int
    crossover: str
    guard: tuple[Verdict, ...]
    predictor: PredictorStats | None

    @property
    def hit_rate(self) -> float:
        """Over all layers, each wanted expert counting once, a call of a whole layer like one."""
        calls = [(layer.on_cpu + layer.on_device + layer.fetched, layer.hit_rate) for layer in self.layers]
        calls += [(layer.whole, 1.0) for layer in self.layers]
        total = sum(count for count, _ in calls)
        return sum(count * rate for count, rate in calls) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "hit_rate": self.hit_rate}


def device_stats(side: "DeviceSide") -> DeviceStats:
    """What was counted so far."""
    dispatcher, queue, accelerator = side.dispatcher, side.queue, side.accelerator
    counts, copies, rate = dispatcher.counts, queue.counts(), queue.bandwidth
    nbytes = copies.on_demand + copies.prefetched
    copy_seconds = nbytes / (rate * 1e9) if queue.measured else 0.0
    seconds = {**counts.seconds, "wait": side.wait_seconds, "whole layers": side.whole.seconds}
    share = side.placement.share if side.placement is not None else None
    return DeviceStats(
        device=accelerator.name,
        simulated=accelerator.simulated,
        policy=side.policy.name,
        memory_budget=accelerator.budget,
        memory_used=accelerator.used,
        memory_peak=accelerator.peak,
        slots=len(side.slots),
        slot_bytes=side.slots.slot_bytes,
        steps=max(counts.steps, int(side.whole.calls.max())),
        layers=tuple(_layer(side, layer) for layer in range(counts.layers)),
        copied_on_demand=copies.on_demand,
        prefetched=copies.prefetched,
        link_gb_per_s=rate if queue.measured else None,
        copy_seconds=copy_seconds,
        overlap=min(max(1 - counts.exposed_seconds / copy_seconds, 0.0), 1.0) if copy_seconds else None,
        seconds={**seconds, "model": max(counts.step_seconds - sum(seconds.values()), 0.0)},
        kv_on_host=None if share is None else sum(not here for here in share.kv_on_device),
        attention_on_host=side.attention.host_calls,
        attention_on_device=side.attention.device_calls,
        crossover=side.costs.describe(),
        guard=() if side.guard is None else side.guard.verdicts(),
        predictor=None if side.learned is None else side.learned.stats(),
    )


def _layer(side: "DeviceSide", layer: int) -> LayerStats:
    ran, cache, whole = side.dispatcher.counts.layer(layer), side.cache.counters(layer), side.whole
    resident = int((side.cache.slot_of(layer) >= 0).sum())
    return LayerStats(
        layer, ran.calls, resident, cache.hit_rate, ran.cpu_experts, ran.gpu_experts, ran.fetched_experts,
        ran.cpu_rows, ran.gpu_rows + int(whole.rows[layer]), cache.nbytes, cache.prefetches, cache.wasted,
        cache.evictions, int(whole.calls[layer]),
    )  # fmt: skip


def stats_table(stats: DeviceStats) -> tuple[Text, Table]:
    """For people: some lines, and a table with a row for each layer."""
    share = "nothing was copied" if stats.overlap is None else f"{stats.overlap:.0%} of the copies' time hidden"
    link = "" if stats.link_gb_per_s is None else f" at {stats.link_gb_per_s:.1f} GB/s"
    total = sum(stats.seconds.values()) or 1.0
    lines = [
        f"{stats.device}{' (simulated: times are modelled)' if stats.simulated else ''}, policy {stats.policy}",
        f"{stats.steps} forward passes in {total:.3f} s{' on that server' if stats.simulated else ''}",
        f"device memory: {format_bytes(stats.memory_used)} of {format_bytes(stats.memory_budget)} in use, "
        f"peak {format_bytes(stats.memory_peak)}; {stats.slots} expert slots of {format_bytes(stats.slot_bytes)}",
        f"experts found on the device: {stats.hit_rate:.1%}; copied on demand {format_bytes(stats.copied_on_demand)}, "
        f"ahead {format_bytes(stats.prefetched)}{link}; {share}",
        "the host's time: " + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in stats.seconds.items()),
        f"attention: {stats.attention_on_device} times on the device, {stats.attention_on_host} on the CPU"
        + ("" if not stats.kv_on_host else f"; the KV cache of {stats.kv_on_host} layers is in host memory"),
        *stats.crossover.splitlines(),
    ]
    if whole := sum(layer.whole for layer in stats.layers):
        lines.append(f"layers that are whole on the device: run {whole} times without waiting for the router")
    if stats.predictor is not None:
        lines.append(stats.predictor.describe())
    for each in stats.guard:
        lines.append(f"guard, {_tokens(each)}: {_verdict(each)}")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("layer", "slots", "found", "CPU", "device", "fetched", "copied", "ahead", "in vain", "evicted"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in stats.layers:
        table.add_row(
            str(layer.layer), str(layer.resident), f"{layer.hit_rate:.0%}", str(layer.on_cpu), str(layer.on_device),
            str(layer.fetched), format_bytes(layer.copied_bytes), str(layer.prefetches), str(layer.wasted_prefetches),
            str(layer.evictions),
        )  # fmt: skip
    return Text("\n".join(lines)), table


def _tokens(verdict: Verdict) -> str:
    least, most = verdict.tokens
    if most == 0:
        return f"{least} tokens and more"
    return f"{least} token{'' if least == 1 else 's'}" if least == most else f"{least} to {most} tokens"


def _verdict(verdict: Verdict) -> str:
    times = [
        f"{name} {seconds * 1e3:.2f} ms in {steps} steps"
        for name, seconds, steps in (
            ("dynamic", verdict.dynamic_seconds, verdict.dynamic_steps),
            ("static", verdict.static_seconds, verdict.static_steps),
        )
        if seconds is not None
    ]
    return f"{verdict.verdict} ({', '.join(times) or 'not measured yet'})"
