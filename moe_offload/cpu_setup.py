"""What the CPU brings to a model: the threads, the kernels, the layers, and where torch's matrix product takes over."""

import logging
from collections.abc import Iterable

import torch

from moe_offload.cpu_kernels.experts import ExpertKernel, warm_up
from moe_offload.cpu_kernels.layout import Activation, ExpertLayout
from moe_offload.cpu_kernels.openmp_team import OpenMPTeam, find_openmp_runtime
from moe_offload.cpu_kernels.packed_experts import COMPILED as PACKED
from moe_offload.cpu_kernels.packed_experts import PackedExpertKernel
from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import Team, ThreadTeam
from moe_offload.cpu_layer import NEVER, CpuLayer, PackedLayer, kernel_layout
from moe_offload.models.expert_weights import WeightFormat
from moe_offload.models.skeleton import Skeleton
from moe_offload.options import Options, Progress
from moe_offload.transfer.expert_pack import ExpertPack

logger = logging.getLogger(__name__)

# Tokens per expert where torch's bf16 GEMM overtakes the kernels on a CPU with bf16 instructions (1.4 times as slow at
# 16, 1.4 times as fast at 32: benchmarks/results/cpu_experts.json). Without such instructions, and for f16 and f32, the
# kernels stay ahead.
GEMM_ROWS = 24
BF16_FEATURES = ("+avx512bf16", "+amx-bf16")


def make_team(threads: int) -> Team:
    """torch's own threads where they are as many, else a team of ours."""
    runtime = find_openmp_runtime()
    if runtime is not None and 1 < threads == torch.get_num_threads():
        try:
            return OpenMPTeam(threads, runtime)
        except (OSError, AttributeError) as error:
            logger.info("torch's threads cannot be borrowed (%s): the experts get their own", error)
    return ThreadTeam(threads)


def gemm_crossover(weights: WeightFormat) -> int:
    """Tokens per expert from which on torch's matrix product is the faster way on this CPU."""
    features = current_target().features
    return GEMM_ROWS if weights == "bf16" and any(name in features for name in BF16_FEATURES) else NEVER


def make_layers(
    skeleton: Skeleton, options: Options, team: Team, progress: Progress | None
) -> dict[str, CpuLayer | PackedLayer]:
    """By path: layers that read their experts where they lie in the checkpoint."""
    kernels = make_kernels(skeleton, progress)
    return {
        layer.path: CpuLayer(
            layer,
            skeleton.weights[layer.path],
            skeleton.checkpoint,
            kernels[layer.path],
            team,
            options.gemm_rows or gemm_crossover(skeleton.weights[layer.path].format),
        )
        for layer in skeleton.spec.layers
    }


def make_packed_layers(
    skeleton: Skeleton, pack: ExpertPack, options: Options, team: Team, progress: Progress | None
) -> dict[str, CpuLayer | PackedLayer]:
    """By path: layers that read their experts from a pack."""
    kernels: dict[tuple[ExpertRecord, Activation], PackedExpertKernel] = {}
    layers: dict[str, CpuLayer | PackedLayer] = {}
    for layer in skeleton.spec.layers:
        record = pack.plan.section(layer.path).content
        assert isinstance(record, ExpertRecord) and layer.activation is not None
        key = (record, layer.activation)
        if key not in kernels:
            kernels[key] = PackedExpertKernel(record, layer.activation, options.activations)
        layers[layer.path] = PackedLayer(kernels[key], pack.table(layer.path), team)
    _warm_up((), kernels.values(), progress)
    return layers


def _warm_up(kernels: Iterable[ExpertKernel], packed: Iterable[PackedExpertKernel], progress: Progress | None) -> None:
    def compiling(name: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"compiling kernels ({name})", done, total)

    warm_up(kernels, compiling)
    packed = list(packed)
    if packed:
        for part in PACKED:
            part.load()
    for done, kernel in enumerate(packed):
        compiling(f"{kernel.record.dtype} {kernel.activation.kind}", done, len(packed))
        kernel.load()


def make_kernels(skeleton: Skeleton, progress: Progress | None) -> dict[str, ExpertKernel | None]:
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
    _warm_up(kernels.values(), (), progress)
    return by_layer
