"""The device's side of the engine: what is needed to run a model's experts on two devices, put together and kept.

    store     records of experts in host memory, read from the pack or the checkpoint (transfer/expert_store.py)
    slots     device memory for some of them, and the cache that says which (device_slots.py, expert_cache.py)
    queue     copies between the two (copy_queue.py)
    costs     what all of it takes, calibrated at first use (scheduling/calibration.py)
    dispatcher  decides and does it, layer by layer (dispatcher.py)

A device that runs out of memory gives up slots and goes on. One that is lost raises DeviceLostError: see `recovery.py`.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from moe_offload import device_attention
from moe_offload.attention_layers import attention_layers
from moe_offload.cpu_kernels.layout import Activation
from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.cpu_kernels.team import Team
from moe_offload.cpu_layer import CpuLayer, PackedLayer
from moe_offload.device_costs import measure_costs
from moe_offload.device_decode_attention import DeviceDecode
from moe_offload.device_experts import device_experts
from moe_offload.device_kv import AttentionWork, SlotBook
from moe_offload.device_modules import DeviceModules, device_bytes
from moe_offload.device_stats import DeviceStats, device_stats
from moe_offload.dispatch_parts import Parts
from moe_offload.dispatcher import Dispatcher
from moe_offload.kv_placement import KvPlacement
from moe_offload.layer_tensors import LayerParts, LayerTensors
from moe_offload.learned_forecast import LearnedForecast, step_of
from moe_offload.memory import format_bytes
from moe_offload.models.errors import NotEnoughMemoryError
from moe_offload.models.skeleton import Skeleton
from moe_offload.options import Options, Progress
from moe_offload.predictor.fast_network import FastNetwork
from moe_offload.scheduling import arrangement, planner
from moe_offload.scheduling.guard import Guard
from moe_offload.scheduling.policies import find_policy
from moe_offload.scheduling.predicted import PredictedUse
from moe_offload.scheduling.recent_use import RecentUse
from moe_offload.stored_records import StoredSource, stored_record
from moe_offload.transfer.accelerator import Accelerator, OutOfDeviceMemoryError, Work
from moe_offload.transfer.copy_queue import CopyQueue
from moe_offload.transfer.device_slots import SLAB_BYTES, DeviceSlots
from moe_offload.transfer.eviction import EVICTIONS
from moe_offload.transfer.expert_cache import ExpertCache
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.transfer.expert_store import ExpertStore
from moe_offload.transfer.record_source import PackSource, RecordSource
from moe_offload.whole_layers import WholeLayers

logger = logging.getLogger(__name__)

SPARE_SHARE = 16  # of the room for slots, one part is left for activations and the KV cache
SLABS = 32  # at least, so that memory can be given up in small parts
LEAST_RECORDS = 8  # in host memory: what is on its way to the device is held there
LEAST_SLOTS = 2  # one is read while the other is filled
STREAM_SLOTS = 8  # of a static placement, that fetched experts take turns in
GIVE_UP = 4  # of the slots, one part is given up when the device runs out of memory
TRIES = 4


class DeviceLayer(NamedTuple):
    """What the device needs to know of one MoE layer."""

    cpu: CpuLayer | PackedLayer
    record: ExpertRecord
    activation: Activation


def device_layers(
    skeleton: Skeleton, layers: Mapping[str, CpuLayer | PackedLayer], pack: ExpertPack | None
) -> list[DeviceLayer] | str:
    """The model's layers in order, or why its experts cannot run on a device."""
    found = []
    for spec in skeleton.spec.layers:
        weights = skeleton.weights[spec.path]
        if pack is not None:
            content = pack.plan.section(spec.path).content
            record = content if isinstance(content, ExpertRecord) else None
        else:
            record = stored_record(weights)
        if record is None:
            return f"experts in {weights.format} are decoded on the CPU"
        if spec.activation is None:
            return f"{spec.path} has an activation that only its module knows"
        found.append(DeviceLayer(layers[spec.path], record, spec.activation))
    if len({layer.cpu.num_experts for layer in found}) > 1:
        return "its layers have different numbers of experts"
    return found


class DeviceSide:
    """Runs experts on `accelerator` and the CPU. One call at a time.

    Raises NotEnoughMemoryError when the budget has no room for the rest of the model and two experts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: Skeleton,
        layers: Sequence[DeviceLayer],
        pack: ExpertPack | None,
        options: Options,
        accelerator: Accelerator,
        dtype: torch.dtype,
        threads: int,
        progress: Progress | None = None,
    ) -> None:
        self.accelerator, self.options, self._dtype = accelerator, options, dtype
        self.placement: KvPlacement | None = None
        self._modules: DeviceModules | None = None
        self.wait_seconds = 0.0  # of the host, for the router's answer
        self.policy = find_policy(options.policy)
        self.turn = threading.RLock()  # whose forward it is; taken before the next
        self._lock = threading.RLock()  # whose layer, or memory
        self._layers = layers
        spec = skeleton.spec
        self._dense_bytes = device_bytes(model)
        record_bytes = [layer.record.nbytes for layer in layers]
        kinds = [f"{r.dtype} {r.hidden_size}x{r.intermediate_size}" for r in (layer.record for layer in layers)]
        hidden, top_k = spec.layers[0].hidden_size, max(layer.top_k for layer in spec.layers)
        try:
            self.store = ExpertStore(
                self._source(skeleton, pack), accelerator.host_arena, range(len(layers)), options.ram,
                least=min(LEAST_RECORDS, len(layers) * layers[0].cpu.num_experts),
            )  # fmt: skip
        except ValueError as error:
            raise NotEnoughMemoryError(f"ram (--ram) is too little: {error}") from error
        wanted = [(layer.record, layer.activation, layer.cpu.num_experts) for layer in layers]
        self.kernels, experts = device_experts(accelerator, dict.fromkeys(wanted), dtype, progress)
        self._parts = [
            LayerParts(
                layer.cpu, experts[wanted[at]], layer.record.nbytes,
                2 * spec.layers[at].params_per_expert, layer.cpu.num_experts,
            )
            for at, layer in enumerate(layers)
        ]  # fmt: skip
        try:
            accelerator.reserve(self._dense_bytes, "non-expert weights")
            self._tensors = LayerTensors(
                accelerator,
                lambda slot, nbytes: self.slots.part(slot, nbytes),
                self._scratch_bytes,
                self._workspace_bytes,
                hidden,
                top_k,
            )
            self.costs = measure_costs(accelerator, self._parts, kinds, self.store, threads, progress)
            self.slots = self._make_slots(max(record_bytes), len(layers) * layers[0].cpu.num_experts)
        except OutOfDeviceMemoryError as error:
            least = self._dense_bytes + LEAST_SLOTS * max(record_bytes) + LayerTensors.device_bytes(1, hidden)
            raise NotEnoughMemoryError(
                f"the device memory given is {format_bytes(accelerator.budget)}, but the non-expert weights and "
                f"{LEAST_SLOTS} experts need {format_bytes(least)}: raise gpu_memory (--gpu-memory), or take device cpu"
            ) from error
        self.queue: CopyQueue[tuple[int, int]] = CopyQueue(accelerator)
        counts = [layer.cpu.num_experts for layer in layers]
        cache = ExpertCache(
            len(layers), counts, len(self.slots), EVICTIONS[self.policy.eviction](), record_bytes=record_bytes
        )
        self.forecast = PredictedUse(RecentUse(len(layers), max(counts), top_k=top_k), len(layers))
        self.learned: LearnedForecast | None = None
        parts = Parts(
            accelerator, self.slots, cache, self.queue, self.store, self.costs, kinds, record_bytes, self.forecast
        )
        self.guard = Guard() if self.policy.prefetch else None
        self.dispatcher = Dispatcher(parts, self.policy, self.guard, overlap=options.overlap)
        self.whole = WholeLayers(self._parts, self._tensors, self.dispatcher, graphs=options.cuda_graphs)
        compile_planners(progress)
        self._account = _ModelWork(accelerator, self._dense_bytes, len(layers))
        if self.policy.placement != "empty":
            self._fill(self.policy.placement == "static", progress)
        self._read_ahead()

    @property
    def cache(self) -> ExpertCache:
        """Which experts are on the device."""
        return self.dispatcher.parts.cache

    def _scratch_bytes(self, rows: int) -> int:
        """What torch takes on a real device for an expert of so many rows; a virtual one computes in host memory."""
        if self.accelerator.simulated:
            return 0
        return max(part.device.many.scratch_bytes(rows) for part in self._parts)

    def _workspace_bytes(self, tokens: int, top_k: int) -> int:
        return max(part.device.workspace_bytes(tokens, top_k) for part in self._parts)

    def _make_slots(self, record_bytes: int, experts: int) -> DeviceSlots:
        room = self.accelerator.budget - self.accelerator.used
        spare = room // SPARE_SHARE
        wanted = min(experts, (room - spare) // (-(-record_bytes // 256) * 256))
        slab = min(SLAB_BYTES, room // SLABS)
        return DeviceSlots(self.accelerator, record_bytes, max(wanted, 0), least=LEAST_SLOTS, slab_bytes=slab)

    @staticmethod
    def _source(skeleton: Skeleton, pack: ExpertPack | None) -> RecordSource:
        paths = [layer.path for layer in skeleton.spec.layers]
        if pack is not None:
            return PackSource(pack, dict(enumerate(paths)))
        weights = [skeleton.weights[path] for path in paths]
        records = {at: record for at, each in enumerate(weights) if (record := stored_record(each)) is not None}
        return StoredSource(skeleton.checkpoint, weights, records)

    def _fill(self, static: bool, progress: Progress | None) -> None:
        """Copy experts into the empty slots: as many of each layer, since nothing is known about them yet."""
        layers, experts = len(self._layers), self._layers[0].cpu.num_experts
        count = len(self.slots) - (min(STREAM_SLOTS, len(self.slots) // 4) if static else 0)
        keys = [(at % layers, at // layers) for at in range(min(count, layers * experts))]
        sizes = [self._layers[layer].record.nbytes for layer, _ in keys]
        done, total = 0, sum(sizes)
        for key, size in zip(keys, sizes, strict=True):
            self.dispatcher.fill(*key)
            done += size
            if progress is not None:
                progress("copying experts to the device", done, total)
        self.dispatcher.finish_filling(pin=static)

    def _read_ahead(self) -> None:
        """Have the other experts read into host memory, as far as there is room: behind the user's back, but for a
        simulation, whose clock knows no disk.
        """
        layers, experts = len(self._layers), self._layers[0].cpu.num_experts
        keys = [(layer, expert) for expert in range(experts) for layer in range(layers)]
        keys = [(layer, expert) for layer, expert in keys if self.cache.slot_of(layer)[expert] < 0]
        if self.accelerator.simulated:
            for layer, expert in keys[: self.store.capacity]:
                self.store.get(layer, expert)
        else:
            self.store.read_ahead(keys)

    def run(
        self,
        layer: int,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> tuple[torch.Tensor, int]:
        """The experts of one layer: [T, H] in and out; and how many experts were active.

        Raises DeviceLostError when the device is gone, OutOfDeviceMemoryError when it has no memory even for two slots.
        """
        with self._lock:
            for left in range(TRIES, -1, -1):
                try:
                    return self._run(layer, module, hidden_states, top_k_index, top_k_weights)
                except OutOfDeviceMemoryError as error:
                    if left == 0 or not self.give_up_slots():
                        raise
                    logger.warning(
                        "the device is out of memory (%s): %d expert slots are left", str(error), len(self.slots)
                    )
            raise AssertionError

    def _run(
        self,
        layer: int,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> tuple[torch.Tensor, int]:
        self._account(len(hidden_states))
        whole = self.whole.run(layer, hidden_states, top_k_index, top_k_weights)
        if whole is not None:  # how many experts were active is not known for several tokens: so many at most
            return whole, min(top_k_index.numel(), self._layers[layer].cpu.num_experts)
        began = self.accelerator.now()
        groups = self._tensors.begin(self._parts[layer], module, hidden_states, top_k_index, top_k_weights)
        self.wait_seconds += self.accelerator.now() - began
        if not len(groups.experts):  # no tokens, or experts of somebody else
            return torch.zeros_like(hidden_states), 0
        rows = np.diff(groups.offsets)
        if self.learned is not None:
            self.learned.note(layer, *self._tensors.host_inputs())
        self.dispatcher.run(layer, groups.experts, rows, len(hidden_states), self._tensors)
        return self._tensors.result, len(groups.experts)

    def give_up_slots(self, *, for_good: bool = False) -> bool:
        """Free some of the slots; False where too few would be left. for_good: nobody takes what is free then."""
        wanted = len(self.slots) - max(1, len(self.slots) // GIVE_UP)
        if not self.resize(self.slots.after_shrinking(max(wanted, LEAST_SLOTS))):
            return False
        if for_good:
            self.accelerator.budget = min(self.accelerator.budget, self.accelerator.used)
        return True

    def resize(self, slots: int) -> bool:
        """Have so many slots; False where that cannot be."""
        if slots < LEAST_SLOTS or slots == len(self.slots):
            return False
        with self._lock:
            self.whole.forget()
            self.dispatcher.resize(slots)
            return len(self.slots) == slots

    def attach(self, model: PreTrainedModel, team: Team) -> None:
        """Put the model's own modules on the device and take its attention under control."""
        if self.accelerator.torch_device.type != "cpu":
            self._modules = DeviceModules(model, self.accelerator.torch_device)
        layers = attention_layers(model)
        itemsize = self._dtype.itemsize
        self.attention = AttentionWork(self.accelerator, layers, itemsize, team)
        decode = DeviceDecode.on(self.kernels, self.accelerator.torch_device)
        device_attention.attach(model, self.attention, team, decode)
        self.placement = KvPlacement(self.accelerator, layers, self.attention, SlotBook(self, LEAST_SLOTS), itemsize)
        obstacles = sorted({layer.obstacle for layer in layers if layer.obstacle})
        if obstacles:
            logger.info("the KV cache of some layers stays on the device: %s", "; ".join(obstacles))

    def detach(self, model: PreTrainedModel) -> None:
        """Inverse of `attach`; harmless without one."""
        with self.turn:
            if self.placement is not None:
                self.placement.close()
                self.placement = None
                self.attention.end()
            device_attention.detach(model)
            if self._modules is not None:
                self._modules.withdraw()

    def carry_in(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model's forward, where its layers want them."""
        return kwargs if self._modules is None else self._modules.carry_in(kwargs)

    def before_forward(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        """Place the KV cache that a forward is about to use. Raises OutOfDeviceMemoryError."""
        if self.placement is not None:
            self.placement.hook(model, (), kwargs)
        if self.learned is not None:
            self.learned.begin_step(step_of(kwargs))

    def start_predictor(self, predictor: FastNetwork, name: str) -> None:
        """Have it say what the next layers will want."""
        with self._lock:
            self.learned = LearnedForecast(predictor, self.forecast, self.accelerator, name, adapt=self.options.adapt)

    def stats(self) -> DeviceStats:
        """What was counted so far."""
        with self._lock:
            return device_stats(self)

    def end_step(self) -> None:
        """The model's forward pass is through."""
        with self._lock:
            self.dispatcher.end_step()

    def close(self) -> None:
        """Wait for what is in flight, stop the store's threads and give all memory back. Harmless when done twice."""
        with self.turn, self._lock:
            self.queue.close()
            self.store.close()
            self.accelerator.close()
            self.slots.forget()
            self._tensors.forget()


def compile_planners(progress: Progress | None) -> None:
    """Compile the scheduler's code, or load it from the cache, before the first layer asks for it."""
    parts = (*arrangement.COMPILED, *planner.COMPILED)
    for done, part in enumerate(parts):
        if progress is not None:
            progress("compiling kernels (scheduler)", done, len(parts))
        part.load()


class _ModelWork:
    """Tells a virtual accelerator of what the model's own modules do between two layers of experts.

    On a real device they take their time by themselves.
    """

    def __init__(self, accelerator: Accelerator, nbytes: int, layers: int) -> None:
        self._accelerator, self._nbytes = accelerator, nbytes // layers

    def __call__(self, tokens: int) -> None:
        if self._accelerator.simulated:
            work = Work(self._nbytes, self._nbytes, (tokens,), launches=12)  # 2 bytes and 2 operations a parameter
            self._accelerator.launch(self._accelerator.compute, _nothing, (), (), work, "attention and norms")


def _nothing() -> None:
    pass
