"""The engine: one per loaded model, it runs the routed experts of every MoE layer.

A call comes from transformers, layer by layer, possibly from several threads (continuous batching, assisted decoding):

    group    the (token, expert) pairs become one row list per active expert
    run      the experts, on the CPU (later: where a plan says)
    count    rows, bytes and time go into the statistics

`model.offload` is the engine. `detach()` gives the model back as a plain load would have made it, `close()` ends it.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_offload.cpu_kernels.experts import ExpertKernel, warm_up
from moe_offload.cpu_kernels.grouping import group_tokens
from moe_offload.cpu_kernels.layout import Activation, ExpertLayout
from moe_offload.cpu_kernels.openmp_team import OpenMPTeam, find_openmp_runtime
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import Team, ThreadTeam
from moe_offload.cpu_layer import NEVER, CpuLayer, kernel_layout
from moe_offload.memory import require_memory
from moe_offload.models.expert_weights import WeightFormat
from moe_offload.models.experts_function import attach_handle, detach_handle
from moe_offload.models.skeleton import Skeleton
from moe_offload.models.spec import MoeSpec
from moe_offload.options import Options
from moe_offload.statistics import Statistics

logger = logging.getLogger(__name__)

# Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

# Tokens per expert where torch's bf16 GEMM overtakes the kernels on a CPU with bf16 instructions (1.4 times as slow at
# 16, 1.4 times as fast at 32: benchmarks/results/cpu_experts.json). Without such instructions, and for f16 and f32, the
# kernels stay ahead.
GEMM_ROWS = 24
BF16_FEATURES = ("+avx512bf16", "+amx-bf16")


class Engine:
    """Runs the experts of one model. Made by `moe_offload.load`, found at `model.offload`."""

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: Skeleton,
        options: Options,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> None:
        self.options = options
        self.statistics = Statistics()
        self._skeleton = skeleton
        self._model = model
        self._dtype = dtype
        self._closed = False
        self._team = _make_team(options.threads or default_threads())
        kernels = _make_kernels(skeleton, progress)
        self._layers = {
            layer.path: CpuLayer(
                layer,
                skeleton.weights[layer.path],
                skeleton.checkpoint,
                kernels[layer.path],
                self._team,
                options.gemm_rows or _gemm_rows(skeleton.weights[layer.path].format),
            )
            for layer in skeleton.spec.layers
        }
        for path, layer in self._layers.items():
            attach_handle(model.get_submodule(path), _LayerHandle(self, layer))

    @property
    def spec(self) -> MoeSpec:
        """What the model is."""
        return self._skeleton.spec

    @property
    def threads(self) -> int:
        """CPU threads that run the experts."""
        return self._team.threads

    @property
    def weights(self) -> str:
        """Format of the expert weights as they are read, such as "bf16"; several where layers differ."""
        return ", ".join(sorted({each.format for each in self._skeleton.weights.values()}))

    @property
    def closed(self) -> bool:
        """Whether `close()` or `detach()` has been called."""
        return self._closed

    def run(
        self,
        layer: CpuLayer,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The routed experts of one layer: [T, H] in, [T, H] out, in the input's dtype and on its device."""
        if self._closed:
            raise RuntimeError("this model's engine was closed; load the model again")
        if hidden_states.requires_grad and torch.is_grad_enabled():
            result: torch.Tensor = _NoBackward.apply(self, layer, module, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-untyped-call]
            return result
        return self._run(layer, module, hidden_states, top_k_index, top_k_weights)

    def _run(
        self,
        layer: CpuLayer,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        started = time.perf_counter()
        groups = group_tokens(
            top_k_index.to("cpu", torch.int64).contiguous().numpy(),
            top_k_weights.detach().to("cpu", torch.float32).contiguous().numpy(),
            layer.weights.num_experts,
        )
        hidden = hidden_states.detach().to("cpu")
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        by_torch = layer(module, groups, hidden, out)
        experts = len(groups.experts)
        self.statistics.add(
            rows=len(groups.tokens),
            experts=experts,
            torch_experts=by_torch,
            bytes_read=experts * layer.weights.bytes_per_expert,
            seconds=time.perf_counter() - started,
        )
        return out.to(hidden_states.device, hidden_states.dtype)

    def detach(self) -> PreTrainedModel:
        """Give the model back as a plain load would have made it: expert weights copied into parameters, no trace
        of the engine.

        Raises NotEnoughMemoryError when the expert weights do not fit in memory.
        """
        if self._closed:
            raise RuntimeError("this model's engine was closed; load the model again")
        model = self._model
        experts = self.spec.expert_params * self._dtype.itemsize
        require_memory(experts, self.options.memory_limit, "the expert weights of the detached model")
        self._skeleton.restore(model, self._dtype)
        model.hf_quantizer.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        model.__dict__.pop("is_quantized", None)
        self.close()
        return model

    def close(self) -> None:
        """Stop the threads and unmap the checkpoint. The model cannot run its experts afterwards. Harmless when
        done twice.
        """
        if self._closed:
            return
        self._closed = True
        for path in self._layers:
            detach_handle(self._model.get_submodule(path))
        self._model.__dict__.pop("offload", None)
        self._layers.clear()
        self._team.close()
        self._skeleton.checkpoint.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        """Copies of a model share the engine: weights and threads exist once."""
        return self

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _LayerHandle:
    """Ties an experts module to the engine."""

    __slots__ = ("engine", "layer")

    def __init__(self, engine: Engine, layer: CpuLayer) -> None:
        self.engine = engine
        self.layer = layer

    def __call__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return self.engine.run(self.layer, module, hidden_states, top_k_index, top_k_weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LayerHandle":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model loaded by moe_offload cannot be pickled: its experts are mapped files; "
            "load it again in the other process"
        )


class _NoBackward(torch.autograd.Function):
    """The experts inside a graph that records gradients: forward as usual, backward refused instead of silently
    wrong.
    """

    @staticmethod
    def forward(ctx: Any, engine: Engine, *args: Any) -> torch.Tensor:
        return engine._run(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "moe_offload runs inference only: its experts have no gradient; load with transformers to train"
        )


def _make_team(threads: int) -> Team:
    """torch's own threads where they are as many, else a team of ours."""
    runtime = find_openmp_runtime()
    if runtime is not None and 1 < threads == torch.get_num_threads():
        try:
            return OpenMPTeam(threads, runtime)
        except (OSError, AttributeError) as error:
            logger.info("torch's threads cannot be borrowed (%s): the experts get their own", error)
    return ThreadTeam(threads)


def _gemm_rows(weights: WeightFormat) -> int:
    features = current_target().features
    return GEMM_ROWS if weights == "bf16" and any(name in features for name in BF16_FEATURES) else NEVER


def _make_kernels(skeleton: Skeleton, progress: Progress | None) -> dict[str, ExpertKernel | None]:
    """One kernel per distinct layout and activation, compiled or taken from the disk cache; None: the torch path."""
    kernels: dict[tuple[ExpertLayout, Activation], ExpertKernel] = {}
    by_layer: dict[str, ExpertKernel | None] = {}
    reasons = set()
    for spec in skeleton.spec.layers:
        weights = skeleton.weights[spec.path]
        layout = kernel_layout(weights)
        if layout is None or spec.activation is None:
            what = f"{weights.format} weights" if layout is None else "this architecture's activation"
            reasons.add(f"no kernel for {what}: these experts run through torch, slower and as exact")
            by_layer[spec.path] = None
            continue
        key = (layout, spec.activation)
        if key not in kernels:
            kernels[key] = ExpertKernel(layout, spec.activation)
        by_layer[spec.path] = kernels[key]
    for reason in sorted(reasons):
        logger.warning(reason)
    warm_up(kernels.values(), progress)
    return by_layer
