"""CUDA kernels for a device's experts, where it has what they need: CuPy, and a compiler that knows the card.

Without them the engine runs experts by torch's operations (`gpu_kernels/torch_experts.py`): the same numbers but for
rounding, more launches, and packed weights are multiplied out first. That is said once a process.
"""

import logging
from functools import cache
from pathlib import Path

import torch

from moe_offload.gpu_kernels.launch import KernelError, Kernels
from moe_offload.transfer.accelerator import Accelerator
from moe_offload.transfer.card_probes import read_driver
from moe_offload.transfer.cupy_check import cupy_problem, detect_cupy

logger = logging.getLogger(__name__)

_ROOT = Path("/")


def expert_kernels(accelerator: Accelerator) -> Kernels | None:
    """What compiles kernels for `accelerator`; None for a simulated one, and where they cannot be, which is said."""
    device = accelerator.torch_device
    if accelerator.simulated or device.type != "cuda":
        return None
    index = device.index or 0
    problem = cupy_problem(detect_cupy(torch.cuda.get_device_capability(index), read_driver(_ROOT).version))
    if problem is None:
        from moe_offload.gpu_kernels.cupy_kernels import CupyKernels

        try:
            return CupyKernels(index)
        except KernelError as error:
            problem = f"{error} (see what moe-offload doctor says)"
    say_without(accelerator.name, problem)
    return None


@cache
def say_without(device: str, problem: str) -> None:
    """Warn, once for each problem, that there are no kernels for the device."""
    logger.warning("experts on %s run by torch's operations instead of our kernels: %s", device, problem)
