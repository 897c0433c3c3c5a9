"""The engine: one per loaded model, it runs the routed experts of every MoE layer.

A call comes from transformers, layer by layer, possibly from several threads (continuous batching, assisted decoding):

    group    the (token, expert) pairs become one row list per active expert
    run      the experts, on the CPU (later: where a plan says)
    count    rows, bytes and time go into the statistics

`model.offload` is the engine. `detach()` gives the model back as a plain load would have made it, `close()` ends it.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moe_offload import decode_model, latent_attention
from moe_offload.cpu_kernels.grouping import group_tokens
from moe_offload.cpu_kernels.matrices import Matrix, MatrixKernel
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.cpu_kernels.team import Team
from moe_offload.cpu_setup import make_layers, make_packed_layers, make_team
from moe_offload.decode_layer import DecodeLayer
from moe_offload.dense import DenseLinears, pack_dense
from moe_offload.device_choice import SETUP_ERRORS, give_up_device
from moe_offload.device_side import DeviceSide, device_layers
from moe_offload.device_stats import DeviceStats
from moe_offload.guarded_forward import GuardedForward
from moe_offload.layer_call import LayerCall, LayerHandle, NoBackward
from moe_offload.memory import require_memory
from moe_offload.models.errors import OptionError
from moe_offload.models.experts_function import attach_handle, detach_handle
from moe_offload.models.skeleton import Skeleton
from moe_offload.models.spec import MoeSpec
from moe_offload.options import Dense, Options, Progress
from moe_offload.pack_key import content_key
from moe_offload.predictor_choice import choose_predictor, make_network
from moe_offload.statistics import Statistics
from moe_offload.trace_file import write_trace
from moe_offload.transfer.accelerator import Accelerator
from moe_offload.transfer.expert_pack import ExpertPack

logger = logging.getLogger(__name__)


class Engine:
    """Runs the experts of one model. Made by `moe_offload.load`, found at `model.offload`."""

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: Skeleton,
        options: Options,
        dtype: torch.dtype,
        progress: Progress | None = None,
        pack: ExpertPack | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.options = options
        self.statistics = Statistics()
        self._skeleton = skeleton
        self._model = model
        self._dtype = dtype
        self._closed = False
        # Calls in flight: the files they read must stay mapped until the last of them is through.
        self._gate = threading.Condition()
        self._calls = 0
        self._team = make_team(options.threads or default_threads())
        self._pack = pack
        if pack is None:
            self._layers = make_layers(skeleton, options, self._team, progress)
        else:
            self._layers = make_packed_layers(skeleton, pack, options, self._team, progress)
        self._device = self._make_device(accelerator, progress)
        for index, (path, layer) in enumerate(self._layers.items()):
            attach_handle(model.get_submodule(path), LayerHandle(self, layer, index))
        self._dense = self._pack_dense(progress)
        if self._device is not None and not self._attach_device(self._device):
            self._dense = self._dense or self._pack_dense(progress)  # on the CPU they are packed
        latent_attention.attach(model, self._team)
        fused = options.fused_decode and self._device is None
        self._fused = decode_model.attach(self, model, self._layers) if fused else []
        self.lost_devices = 0

    def _make_device(self, accelerator: Accelerator | None, progress: Progress | None) -> DeviceSide | None:
        if accelerator is None:
            return None
        layers = device_layers(self._skeleton, self._layers, self._pack)
        if isinstance(layers, str):
            logger.warning("the model runs on the CPU alone: %s", layers)
            accelerator.close()
            return None
        try:
            return DeviceSide(
                self._model, self._skeleton, layers, self._pack, self.options, accelerator, self._dtype, self.threads,
                progress,
            )  # fmt: skip
        except SETUP_ERRORS as error:
            give_up_device(accelerator, error, self.options)
            return None

    def _attach_device(self, side: DeviceSide) -> bool:
        """Put the model on the device. False where it fails and need not be there."""
        try:
            side.attach(self._model, self._team)
        except SETUP_ERRORS as error:
            self._device = None
            self._end_device(side)
            give_up_device(side.accelerator, error, self.options)
            return False
        self._model.__dict__["forward"] = GuardedForward(self._model, self)
        return True

    def _pack_dense(self, progress: Progress | None) -> DenseLinears | None:
        wanted = self.options.dense_format(self._pack is not None, self._device is not None)
        if wanted == "int8" or wanted == "int4":
            return pack_dense(self._model, self._skeleton, wanted, self.options, self.multiply, progress)
        return None

    def start_predictor(self, progress: Progress | None = None) -> None:
        """Give the device's side the predictor that the options ask for, once `model.offload` is this engine.

        Raises OptionError when that is a file which cannot be used.
        """
        side, options = self._device, self.options
        if side is None or not side.policy.prefetch or side.policy.forecast != "popularity":
            if options.names_predictor:
                raise OptionError(
                    f"predictor={str(options.predictor)!r} has nobody to tell: "
                    + ("there is no device" if side is None else f"policy {options.policy!r} copies nothing ahead")
                )
            return
        checkpoint = self._skeleton.checkpoint
        chosen = choose_predictor(options.predictor, self.spec, lambda: content_key(self.spec, checkpoint))
        if chosen is not None:
            network = make_network(self._model, chosen, self._team, progress)
            if network is not None:
                side.start_predictor(network, chosen.name)

    @property
    def spec(self) -> MoeSpec:
        """What the model is."""
        return self._skeleton.spec

    @property
    def team(self) -> Team:
        """The threads."""
        return self._team

    @property
    def fused_layers(self) -> int:
        """Decoder layers whose decode step runs in one launch; the others run through transformers' modules."""
        return sum(isinstance(each.__dict__.get("forward"), DecodeLayer) for each in self._fused)

    @property
    def threads(self) -> int:
        """CPU threads that run the experts."""
        return self._team.threads

    @property
    def weights(self) -> str:
        """Format of the expert weights as they are read, such as "bf16" or "int4"; several where layers differ."""
        if self._pack is not None:
            records = (section.content for section in self._pack.plan.sections)
            return ", ".join(sorted({record.dtype for record in records}))
        return ", ".join(sorted({each.format for each in self._skeleton.weights.values()}))

    @property
    def dense(self) -> Dense:
        """Format of the linears outside of the experts: "int8", "int4" or "stored"."""
        return "stored" if self._dense is None else self._dense.format

    @property
    def pack(self) -> Path | None:
        """The file that converted experts are read from; None where they are read from the checkpoint."""
        return None if self._pack is None else self._pack.path

    @property
    def closed(self) -> bool:
        """Whether `close()` or `detach()` has been called."""
        return self._closed

    def run(self, call: LayerCall) -> torch.Tensor:
        """The routed experts of one layer: [T, H] in, [T, H] out, in the input's dtype and on its device."""
        with self.in_flight():
            if call.hidden_states.requires_grad and torch.is_grad_enabled():
                result: torch.Tensor = NoBackward.apply(call.hidden_states, self, call)  # type: ignore[no-untyped-call]
                return result
            return self.run_forward(call)

    def multiply(
        self,
        kernel: MatrixKernel,
        matrices: Sequence[Matrix],
        x: NDArray[np.float32],
        outs: Sequence[NDArray[np.float32]],
    ) -> None:
        """Linears outside of the experts, on the engine's threads; see `MatrixKernel`."""
        with self.in_flight():
            kernel(matrices, x, outs, self._team)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """While this is entered, weights stay mapped and threads alive. Raises RuntimeError once closed."""
        with self._gate:
            self._require_open()
            self._calls += 1
        try:
            yield
        finally:
            with self._gate:
                self._calls -= 1
                self._gate.notify_all()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this model's engine was closed; load the model again")

    def run_forward(self, call: LayerCall) -> torch.Tensor:
        """As `run`, without its guards."""
        started = time.perf_counter()
        layer = call.layer
        side = self._device
        if side is not None:
            out, experts = side.run(call.number, call.module, call.hidden_states, call.top_k_index, call.top_k_weights)
            self.count_step(call.top_k_index.numel(), experts, experts * layer.bytes_per_expert)
            return out
        groups = group_tokens(
            call.top_k_index.to("cpu", torch.int64).contiguous().numpy(),
            call.top_k_weights.detach().to("cpu", torch.float32).contiguous().numpy(),
            layer.num_experts,
        )
        hidden = call.hidden_states.detach().to("cpu")
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        by_torch = layer(call.module, groups, hidden, out)
        experts = len(groups.experts)
        self.statistics.add(
            rows=len(groups.tokens),
            experts=experts,
            torch_experts=by_torch,
            bytes_read=experts * layer.bytes_per_expert,
            seconds=time.perf_counter() - started,
        )
        return out.to(call.hidden_states.device, call.hidden_states.dtype)

    def count_step(self, rows: int, experts: int, bytes_read: int, layers: int = 1) -> None:
        """Count layers of a fused decode step; their experts' share of the time is not known."""
        self.statistics.add(
            rows=rows, experts=experts, torch_experts=0, bytes_read=bytes_read, seconds=0.0, calls=layers
        )

    def stats(self) -> DeviceStats | None:
        """What running on two devices came to; None where everything runs on the CPU."""
        side = self._device
        return None if side is None else side.stats()

    def record_timeline(self) -> None:
        """Write down from now on what the device and the host do, for `write_timeline`; nothing without a device."""
        side = self._device
        if side is not None:
            side.accelerator.keep_timeline(True)

    def write_timeline(self, path: str | os.PathLike[str]) -> int:
        """A file for Chrome's about:tracing or Perfetto of what was written down; returns the number of its events.

        Raises OptionError when there is no device, OSError when it cannot be written.
        """
        side = self._device
        if side is None:
            raise OptionError("there is no timeline: everything runs on the CPU, or the device was lost")
        return write_trace(Path(path), side.accelerator.timeline(), side.accelerator.name)

    @property
    def device(self) -> DeviceSide | None:
        """The device's side; None where everything runs on the CPU, and once the device is lost."""
        return self._device

    def lose_device(self) -> None:
        """Go on with the CPU alone."""
        with self._gate:
            side, self._device = self._device, None
            if side is None:
                return
            self.lost_devices += 1
        self._end_device(side)

    def _end_device(self, side: DeviceSide) -> None:
        side.detach(self._model)
        side.close()

    def detach(self) -> PreTrainedModel:
        """Give the model back as a plain load would have made it: expert weights copied into parameters, no trace
        of the engine.

        Raises NotEnoughMemoryError when the expert weights do not fit in memory.
        """
        self._require_open()
        model = self._model
        experts = self.spec.expert_params * self._dtype.itemsize
        dense = 0 if self._dense is None else self._dense.stored_bytes
        require_memory(experts + dense, self.options.memory_limit, "the weights that the detached model needs")
        decode_model.detach(self._fused)
        latent_attention.detach(model)
        if self._dense is not None:
            self._dense.restore(model, self._skeleton)
        self._skeleton.restore(model, self._dtype)
        model.hf_quantizer.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        model.__dict__.pop("is_quantized", None)
        self.close()
        return model

    def close(self) -> None:
        """Stop the threads and unmap checkpoint and pack, once calls in flight are through. Harmless when done twice.

        The model cannot run its experts afterwards. Packed linears stay mapped as long as something holds one of them.
        """
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._gate.wait_for(lambda: self._calls == 0)
        decode_model.detach(self._fused)
        if self._device is not None:
            self._end_device(self._device)
        if isinstance(self._model.__dict__.get("forward"), GuardedForward):
            del self._model.__dict__["forward"]
        for path in self._layers:
            detach_handle(self._model.get_submodule(path))
        self._model.__dict__.pop("offload", None)
        self._layers.clear()
        self._team.close()
        self._skeleton.checkpoint.close()
        if self._pack is not None:
            self._pack.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        """Copies of a model share the engine: weights and threads exist once."""
        return self

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
