"""What experts, copies and starts cost on this machine: measured at first use, kept for later.

A real device is measured with the model's own experts, run as the engine runs them. Of a virtual one the clock alone is
asked, on a ghost of it, which takes no time worth keeping.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from moe_offload.cpu_kernels.grouping import Groups
from moe_offload.device_experts import FEW_ROWS, launches
from moe_offload.gpu_kernels.fused_experts import fits
from moe_offload.gpu_kernels.sources import sources_key
from moe_offload.layer_tensors import LayerParts
from moe_offload.machine import cpu_name
from moe_offload.options import Progress
from moe_offload.scheduling.calibration import calibrate
from moe_offload.scheduling.cost_cache import cached_costs, machine_key
from moe_offload.scheduling.cost_model import CostModel
from moe_offload.transfer.accelerator import Accelerator, Buffer, Work
from moe_offload.transfer.expert_store import ExpertStore
from moe_offload.transfer.server_profile import ServerProfile
from moe_offload.transfer.virtual import VirtualAccelerator

_DEVICE_EXPERTS = 4  # that lie on the device while it is measured
_MOST_JOBS = 8  # experts that are measured together
_CROSSOVERS = (4, 8, 16, 32, 64)  # rows that are tried
_MOST_ROWS = _CROSSOVERS[-1]
_REPEATS = 5


class Kind(NamedTuple):
    """One kind of expert."""

    name: str
    nbytes: int
    flops_per_row: int


def measure_costs(
    accelerator: Accelerator,
    parts: Sequence[LayerParts],
    kinds: Sequence[str],
    store: ExpertStore,
    threads: int,
    progress: Progress | None,
) -> CostModel:
    """Costs of the model's kinds of experts: kinds [L] names them, parts [L] are what computes them."""
    named = {name: Kind(name, part.record_bytes, part.flops_per_row) for name, part in zip(kinds, parts, strict=True)}
    if isinstance(accelerator, VirtualAccelerator):
        return CostModel.from_dict(_virtual_costs(accelerator.profile, tuple(named.values())))
    layers = {name: kinds.index(name) for name in named}
    sizes = [(kind.name, kind.nbytes) for kind in named.values()]
    with _ModelBench(accelerator, parts, layers, store) as bench:
        bench.find_crossovers()
        key = machine_key(cpu_name(), accelerator.name, threads, sizes, _ways(parts, layers))
        return cached_costs(key, lambda: calibrate(accelerator, bench, progress))


def _ways(parts: Sequence[LayerParts], layers: dict[str, int]) -> str:
    """How the device computes: what costs depend on beside the machine."""
    if all(part.device.kernels is None for part in parts):
        return "torch"
    few = ", ".join(f"{parts[layer].device.few_rows:g}" for layer in layers.values())
    return f"kernels {sources_key()}, few rows: {few}"


@cache
def _virtual_costs(profile: ServerProfile, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    with VirtualAccelerator(profile, ghost=True) as accelerator:
        return calibrate(accelerator, _GhostBench(accelerator, kinds)).to_dict()


class _GhostBench:
    """An `ExpertBench` of sizes alone."""

    def __init__(self, accelerator: Accelerator, kinds: Sequence[Kind]) -> None:
        self._accelerator, self._kinds = accelerator, {kind.name: kind for kind in kinds}

    def kinds(self) -> list[tuple[str, int]]:
        return [(kind.name, kind.nbytes) for kind in self._kinds.values()]

    def run_cpu(self, kind: str, rows: list[int]) -> None:
        self._accelerator.run_host(_nothing, self._work(kind, rows, 0))

    def run_gpu(self, kind: str, rows: list[int]) -> None:
        few = max(rows) <= FEW_ROWS and fits(max(rows), len(rows))
        work = self._work(kind, rows, launches(len(rows), few=few))
        self._accelerator.launch(self._accelerator.compute, _nothing, (), (), work, "experts")

    def _work(self, kind: str, rows: list[int], launches: int) -> Work:
        return Work(self._kinds[kind].nbytes, self._kinds[kind].flops_per_row, rows, launches=launches)


class _ModelBench:
    """An `ExpertBench` of a model's own experts; `with` gives back the device memory that it takes."""

    def __init__(
        self, accelerator: Accelerator, parts: Sequence[LayerParts], layers: dict[str, int], store: ExpertStore
    ) -> None:
        self._accelerator, self._layers = accelerator, layers
        self._parts = {kind: parts[layer] for kind, layer in layers.items()}
        self._next = itertools.count()
        self._slots: dict[str, list[Buffer]] = {kind: [] for kind in layers}
        stream = accelerator.compute
        for kind, layer in layers.items():
            for expert in range(min(_DEVICE_EXPERTS, self._parts[kind].num_experts)):
                size = self._parts[kind].record_bytes
                slot = accelerator.allocate(size, "experts to measure")
                self._slots[kind].append(slot)
                record = store.hold(layer, expert)
                accelerator.copy_in(slot, record, stream)
                store.release(layer, expert, stream.record())
        stream.synchronize()
        size = max(part.device.workspace_bytes(_MOST_ROWS, _MOST_JOBS) for part in self._parts.values())
        self._work = accelerator.allocate(size, "workspace to measure with") if size else None

    def kinds(self) -> list[tuple[str, int]]:
        return [(kind, parts.record_bytes) for kind, parts in self._parts.items()]

    def run_cpu(self, kind: str, rows: list[int]) -> None:
        parts = self._parts[kind]
        groups = self._groups(rows, parts.num_experts)
        hidden = torch.ones(max(rows), parts.device.record.hidden_size)
        out = torch.zeros_like(hidden)
        work = Work(parts.record_bytes, parts.flops_per_row, rows)
        # the module is asked where torch runs the experts, which these do not
        self._accelerator.run_host(lambda: _ignore(parts.cpu(nn.Module(), groups, hidden, out)), work)

    def run_gpu(self, kind: str, rows: list[int]) -> None:
        parts, slots, device = self._parts[kind], self._slots[kind], self._accelerator.torch_device
        chosen = [slots[next(self._next) % len(slots)] for _ in rows]
        tokens, top_k = max(rows), len(rows)
        few = parts.device.few(tokens, top_k, tokens)
        writes = () if few is None or self._work is None else (self._work,)
        choices = torch.full((tokens, top_k), -1)  # the first tokens of each column: as many rows for that expert
        for expert, count in enumerate(rows):
            choices[:count, expert] = expert
        index = choices.to(device)

        def run(*buffers: torch.Tensor) -> None:
            hidden = torch.ones(tokens, parts.device.record.hidden_size, device=device)
            weights = torch.ones(tokens, top_k, device=device)
            if few is not None:
                *records, memory = buffers
                space = parts.device.space(tokens, top_k)
                few.begin(space, memory, hidden, index, weights)
                few.add(space, memory, range(top_k), records, most_rows=tokens)
                return
            out, all_tokens = torch.zeros_like(hidden), torch.arange(tokens, device=device)
            for record, count in zip(buffers, rows, strict=True):
                parts.device.many.add_rows(out, hidden, all_tokens[:count], weights[:count, 0].contiguous(), record)

        work = Work(parts.record_bytes, parts.flops_per_row, rows, launches=launches(top_k, few=few is not None))
        self._accelerator.launch(self._accelerator.compute, run, chosen, writes, work, "experts")

    def find_crossovers(self) -> None:
        """Set the rows up to which experts of each kind are few: where one expert was not slower that way."""
        for kind, parts in self._parts.items():
            if parts.device.fused is None:
                continue
            found = 1.0
            for rows in _CROSSOVERS:
                seconds = []
                for few_rows in (rows, 0):  # the fused way, and the other
                    parts.device.few_rows = few_rows
                    seconds.append(self._seconds(kind, rows))
                if seconds[0] > seconds[1]:
                    break
                found = rows
            parts.device.few_rows = found

    def _seconds(self, kind: str, rows: int) -> float:
        """The device's median time of one expert with so many rows; the first run is apart."""
        stream, samples = self._accelerator.compute, []
        for _ in range(1 + _REPEATS):
            start = stream.record(timed=True)
            self.run_gpu(kind, [rows])
            end = stream.record(timed=True)
            end.synchronize()
            samples.append(end.time() - start.time())
        return median(samples[1:])

    def _groups(self, rows: list[int], num_experts: int) -> Groups:
        experts = sorted({next(self._next) % num_experts for _ in rows})
        counts = rows[: len(experts)]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        tokens = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        return Groups(np.array(experts, np.int32), offsets, tokens, np.ones(len(tokens), np.float32))

    def __enter__(self) -> "_ModelBench":
        return self

    def __exit__(self, *_: object) -> None:
        self._accelerator.compute.synchronize()
        for slot in itertools.chain(*self._slots.values()):
            self._accelerator.free(slot)
        if self._work is not None:
            self._accelerator.free(self._work)


def _nothing() -> None:
    pass


def _ignore(_: object) -> None:
    pass
