"""Seconds of a decode step and of a prompt, from a model's sizes, a placement and a server's rates.

The CPU alone: what is read and multiplied, one after another. With a card every layer of experts is divided so that
card, link and CPU end together, as the planner does it: experts on the card run from their slots, so many of the others
are fetched, and the CPU takes what is left; of all divisions the quickest. Which experts a token wants is taken as
even, so the number of them on the card is hypergeometric, and the time its expectation: more slots never cost time.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import lgamma

import numpy as np
from numpy.typing import NDArray

from moe_offload.plan_placement import Placement
from moe_offload.plan_rates import CARD_COMPUTE, CARD_MEMORY, DISK, HOST, LINK, MEMORY, HostRates, Took
from moe_offload.plan_sizes import ExpertLayers, ModelSizes
from moe_offload.transfer.accelerator import Work
from moe_offload.transfer.server_profile import ServerProfile

DENSE_LAUNCHES = 12  # of a layer's attention, norms and router
EXPERT_LAUNCHES = 3


@dataclass(frozen=True, slots=True)
class Prediction:
    """tokens: that one step yields, or that a prompt has. parts: seconds by resource, the scarce one of every piece."""

    seconds: float
    tokens: int
    parts: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """The resource that most of the time goes to."""
        return max(self.parts, key=self.parts.__getitem__)


@dataclass(frozen=True, slots=True)
class Case:
    """What a step does. tokens: in all; context: positions that each of `sequences` has; prompt: it is one prompt."""

    tokens: int
    context: int
    sequences: int
    prompt: bool = False


def predict(
    sizes: ModelSizes, place: Placement, host: HostRates, disk_gbs: float, card: ServerProfile | None, case: Case
) -> Prediction:
    """One step, with the card where there is one."""
    pieces = list(_on_cpu(sizes, place, host, disk_gbs, case) if card is None else ())
    if card is not None:
        pieces = list(_with_card(sizes, place, host, disk_gbs, card, case))
    parts: defaultdict[str, float] = defaultdict(float)
    for seconds, resource in pieces:
        parts[resource] += seconds
    return Prediction(sum(seconds for seconds, _ in pieces), case.tokens, dict(parts))


def _kv_flops(nbytes: float, case: Case) -> float:
    """A query multiplies with every element it sees, half of them in a prompt: one operation for each byte."""
    return nbytes * case.tokens / 2 if case.prompt else nbytes


def _latent_flops(sizes: ModelSizes, case: Case) -> int:
    """For each position of each sequence, in all layers."""
    return sizes.expand_flops if case.prompt else sizes.step_flops


def _missing(place: Placement) -> float:
    """Which share of the experts that are not on the card has to come from disk."""
    elsewhere = place.ram_experts + place.disk
    return place.disk / elsewhere if elsewhere else 0.0


def _on_cpu(
    sizes: ModelSizes, place: Placement, host: HostRates, disk_gbs: float, case: Case
) -> Iterable[tuple[float, str]]:
    yield host.between(sizes)
    yield host.dense(sizes, case.tokens)
    nbytes = sizes.kv_bytes(case.context, case.sequences)
    latent = _latent_flops(sizes, case) * (case.sequences * case.context)
    yield host.attention(nbytes, _kv_flops(nbytes, case) + latent)
    if not case.prompt:
        yield sizes.copied_bytes / (host.read_gbs * 1e9), MEMORY
    missing = _missing(place)
    for group in sizes.groups:
        active, rows = group.active(case.tokens), group.rows(case.tokens)
        took = host.experts(group, active, rows)
        yield group.layers * took.seconds, took.resource
        yield group.layers * active * missing * group.nbytes / (disk_gbs * 1e9), DISK


def _with_card(
    sizes: ModelSizes, place: Placement, host: HostRates, disk_gbs: float, card: ServerProfile, case: Case
) -> Iterable[tuple[float, str]]:
    layers = sizes.num_layers
    weights = Work(sizes.device_bytes, 2 * sizes.dense_params, (case.tokens,), launches=DENSE_LAUNCHES * layers)
    device = card.device_seconds(weights)
    reads = sizes.device_bytes / (card.memory_gbs * 1e9)
    on_card = Took(device, CARD_MEMORY if reads > device / 2 else CARD_COMPUTE)
    # launches are queued while the card computes: whichever takes longer, and a wait for each router
    program = Took(max(host.between(sizes).seconds, layers * DENSE_LAUNCHES * card.launch_seconds), HOST)
    yield max(on_card, program)
    yield sum(group.layers for group in sizes.groups) * card.wait_seconds, HOST
    yield from _attention(sizes, place, host, card, case)
    moe_layers = sum(group.layers for group in sizes.groups)
    missing = _missing(place)
    for group in sizes.groups:
        resident = min(place.slots / moe_layers, group.experts)
        times = _layer_times(group, case.tokens, host, card)
        yield from ((group.layers * seconds, name) for seconds, name in times.expected(resident))
        absent = times.active * (1 - resident / group.experts)
        yield group.layers * absent * missing * group.nbytes / (disk_gbs * 1e9), DISK


def _attention(
    sizes: ModelSizes, place: Placement, host: HostRates, card: ServerProfile, case: Case
) -> Iterable[tuple[float, str]]:
    left = place.kv_layers
    latent = _latent_flops(sizes, case) * case.sequences * case.context / max(len(sizes.kv), 1)
    for layer in sizes.kv:
        nbytes = case.sequences * layer.nbytes(case.context)
        if not layer.movable or left > 0:
            left -= layer.movable
            flops = _kv_flops(nbytes, case) + latent
            read, multiply = nbytes / (card.memory_gbs * 1e9), flops / card.flops
            yield 2 * card.kernel_seconds + max(read, multiply), CARD_MEMORY if read >= multiply else CARD_COMPUTE
        else:
            took = host.attention(nbytes, _kv_flops(nbytes, case))
            yield card.wait_seconds + 2 * card.launch_seconds + took.seconds, took.resource


def kv_choices(sizes: ModelSizes) -> range:
    """How many movable layers' KV cache may be on the card."""
    return range(sum(layer.movable for layer in sizes.kv) + 1)


class LayerTimes:
    """One layer of experts on card and CPU: the quickest division for every number of them that is on the card.

    active: experts with any token. best [active + 1]: seconds by how many are on the card; limit: what is scarce then.
    """

    def __init__(
        self, experts: int, active: int, cpu_start: float, cpu: float, gpu_start: float, gpu: float, copy: float,
        join: float, cpu_limit: str = MEMORY, gpu_limit: str = CARD_MEMORY,
    ) -> None:  # fmt: skip
        self.experts, self.active = experts, active
        there, runs = np.arange(active + 1)[:, None], np.arange(active + 1)[None, :]
        fetched = np.maximum(runs - there, 0)
        device = np.where(runs > 0, gpu_start + runs * gpu, 0.0)
        link = np.where(fetched > 0, fetched * copy + gpu, 0.0)  # the last one runs behind its copy
        host = np.where(runs < active, cpu_start + (active - runs) * cpu, 0.0)
        sides = np.stack(np.broadcast_arrays(device, link, host))
        total = sides.max(0) + np.where(runs < active, join, 0.0)
        chosen = total.argmin(1)
        rows = np.arange(active + 1)
        self.best: NDArray[np.float64] = total[rows, chosen]
        names = (gpu_limit, LINK, cpu_limit)
        self.limit = [names[int(each)] for each in sides[:, rows, chosen].argmax(0)]

    def expected(self, resident: float) -> list[tuple[float, str]]:
        """Seconds by what is scarce, where so many of a layer's experts are on the card, on average over layers."""
        low = int(resident)
        share = resident - low
        parts: defaultdict[str, float] = defaultdict(float)
        for count, weight in ((low, 1 - share), (low + 1, share)):
            if weight > 0:
                for probability, seconds, name in zip(self._hits(count), self.best, self.limit, strict=True):
                    parts[name] += weight * float(probability) * float(seconds)
        return [(seconds, name) for name, seconds in parts.items()]

    def _hits(self, resident: int) -> NDArray[np.float64]:
        """Probability that 0, 1, ... of the active experts are among the resident ones."""
        found = np.zeros(self.active + 1)
        for hits in range(max(0, self.active + resident - self.experts), min(self.active, resident) + 1):
            found[hits] = np.exp(
                _choose(resident, hits) + _choose(self.experts - resident, self.active - hits)
                - _choose(self.experts, self.active)
            )  # fmt: skip
        return np.asarray(found / found.sum())


def _choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


@cache
def _times(group: ExpertLayers, tokens: int, cpu: Took, one: Took, card: ServerProfile) -> LayerTimes:
    active, rows = _whole_active(group, tokens)
    work = Work(group.nbytes, group.flops_per_row, (1,), launches=0)
    read, multiply = group.nbytes / (card.memory_gbs * 1e9), rows * work.flops_per_row / card.flops
    each = max(cpu.seconds - one.seconds, 1e-9)
    sent = 4 * group.hidden * tokens / (card.link_gbs * 1e9)
    return LayerTimes(
        group.experts, active, max(one.seconds - each, 0.0) + sent, each,
        EXPERT_LAUNCHES * (card.kernel_seconds + card.launch_seconds), max(read, multiply),
        card.copy_seconds(group.nbytes) + card.launch_seconds, card.launch_seconds + card.kernel_seconds + sent,
        cpu.resource, CARD_MEMORY if read >= multiply else CARD_COMPUTE,
    )  # fmt: skip


def _layer_times(group: ExpertLayers, tokens: int, host: HostRates, card: ServerProfile) -> LayerTimes:
    _, rows = _whole_active(group, tokens)
    return _times(group, tokens, host.experts(group, 2, rows), host.experts(group, 1, rows), card)


def _whole_active(group: ExpertLayers, tokens: int) -> tuple[int, float]:
    active = min(max(round(group.active(tokens)), 1), group.experts)
    return active, tokens * min(group.top_k, group.experts) / active
