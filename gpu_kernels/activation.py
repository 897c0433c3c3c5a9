"""Activations by number, as the kernels take them: `activation.cuh` has the formulas."""

import numpy as np

from moe_offload.gpu_kernels.torch_experts import GATED_ONLY, SINGLE, DeviceActivation

KINDS = (*SINGLE, *GATED_ONLY)  # in the order of activation.cuh


def activation_arguments(activation: DeviceActivation) -> tuple[np.int32, np.float32, np.float32]:
    """kind, alpha, limit of a launch; an infinite limit stays infinite."""
    return np.int32(KINDS.index(activation.kind)), np.float32(activation.alpha), np.float32(activation.limit)
