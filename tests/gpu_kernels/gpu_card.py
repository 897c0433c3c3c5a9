"""The card that tests marked `gpu` run on, if there is one."""

import pytest
import torch

from moe_offload.transfer.cupy_check import cupy_problem
from moe_offload.transfer.find_device import cuda_problem, detect_cuda

CARD = torch.device("cuda", 0)
PROBLEM = cuda_problem(detect_cuda(), 0) or cupy_problem()
needs_card = pytest.mark.skipif(PROBLEM is not None, reason=f"needs an NVIDIA card: {PROBLEM}")
