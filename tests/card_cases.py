"""Cards that are not there: facts are made up, and the virtual accelerator, which computes on the CPU, is opened."""

import logging
from collections.abc import Callable

import pytest

from moe_offload.transfer.accelerator import Accelerator
from moe_offload.transfer.find_device import Card, CudaFacts
from moe_offload.transfer.virtual import VirtualAccelerator
from tests.device_cases import SERVERS

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
NAMES = {
    (5, 2): "NVIDIA GeForce GTX 980",
    (6, 0): "Tesla P100-PCIE-16GB",
    (6, 1): "NVIDIA GeForce GTX 1080 Ti",
    (7, 0): "Tesla V100-PCIE-32GB",
    (7, 5): "Tesla T4",
    (8, 0): "NVIDIA A100-PCIE-40GB",
}
Opening = Callable[[int, int | None], Accelerator]


def card(capability: tuple[int, int], memory_bytes: int = 11 << 30) -> Card:
    """A card of this compute capability."""
    return Card(NAMES.get(capability, "NVIDIA Something"), capability, memory_bytes)


def working(index: int, budget: int | None) -> VirtualAccelerator:
    """In the place of CudaAccelerator."""
    return VirtualAccelerator(SERVERS["tiny-gtx1080ti"], budget)


def put_in(patch: pytest.MonkeyPatch, found: Card, opened: Opening = working) -> None:
    """This machine has the card from now on, and what `opened` makes is opened for it."""
    see(patch, CudaFacts("2.13.0+cu126", "12.6", CU126, (found,)))
    patch.setattr("moe_offload.transfer.cuda.CudaAccelerator", opened)


def see(patch: pytest.MonkeyPatch, facts: CudaFacts) -> None:
    """This is what is seen of CUDA from now on."""
    patch.setattr("moe_offload.transfer.find_device.detect_cuda", lambda: facts)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said so far, as the command line would show it."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
