"""All kernels beside float64: on the CPU through the shim, which keeps the cases right; on a card by `pytest -m gpu`."""

import pytest
import torch

from tests.gpu_kernels.host_kernels import HostKernels, needs_compiler
from tests.gpu_kernels.kernel_cases import CASES, Case


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_host(case: Case) -> None:
    case.check(HostKernels(order=2), torch.device("cpu"))
