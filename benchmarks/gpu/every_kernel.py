"""Every kernel on small shapes: what compute-sanitizer looks at.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.every_kernel
"""

import torch

from moe_offload.gpu_kernels.launch import Kernels
from tests.gpu_kernels.kernel_cases import CASES


def run(kernels: Kernels, device: torch.device) -> int:
    """All cases; how many. AssertionError where one's numbers are off."""
    for case in CASES:
        case.check(kernels, device)
    return len(CASES)


def main() -> None:
    from moe_offload.gpu_kernels.cupy_kernels import CupyKernels

    run(CupyKernels(0), torch.device("cuda", 0))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
