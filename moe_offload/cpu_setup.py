"""What the CPU brings to a model: the threads, the kernels, and where torch's matrix product takes over."""

import logging

import torch

from moe_offload.cpu_kernels.experts import ExpertKernel, warm_up
from moe_offload.cpu_kernels.layout import Activation, ExpertLayout
from moe_offload.cpu_kernels.openmp_team import OpenMPTeam, find_openmp_runtime
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.team import Team, ThreadTeam
from moe_offload.cpu_layer import NEVER, kernel_layout
from moe_offload.models.expert_weights import WeightFormat
from moe_offload.models.skeleton import Skeleton
from moe_offload.options import Progress

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
    warm_up(kernels.values(), progress)
    return by_layer
