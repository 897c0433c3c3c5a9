"""The code of cards that are hard to find, Pascal's and Volta's, run on a newer one: `pytest -m gpu`.

NVRTC 12 compiles for compute capability 6.0, 6.1 and 7.0 to PTX, which the driver of a newer card translates. That runs
the branches of the sources that only those cards take (no byte dot products on 6.0), not the instructions that their
own compiler would choose, and says nothing about their speed. None of it has run on a card yet.
"""

import pytest
import torch

from moe_offload.gpu_kernels.launch import Kernels
from moe_offload.gpu_kernels.sources import read_source
from moe_offload.gpu_kernels.unpack import PACKED_TYPES
from tests.gpu_kernels.gpu_card import CARD, needs_card
from tests.gpu_kernels.host_kernels import HostKernels, needs_compiler
from tests.gpu_kernels.kernel_cases import CASES, KERNEL_NAME, Case
from tests.gpu_kernels.nvrtc import installed, ptx, variants

ARCHITECTURES = (60, 61, 70)
PACKED = [case for case in CASES if case.kind == "few" and case.name.split("-")[1] in PACKED_TYPES]
needs_nvrtc = pytest.mark.skipif(not installed(12), reason="needs NVRTC 12: pip install nvidia-cuda-nvrtc-cu12")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"compute_{arch}")
def legacy(request: pytest.FixtureRequest) -> Kernels:
    """Kernels of an older card, translated for this one."""
    from moe_offload.gpu_kernels.cupy_kernels import CupyKernels

    arch: int = request.param
    return CupyKernels.of_ptx(lambda source, macros: ptx(source, macros, arch))


@pytest.mark.gpu
@needs_card
@needs_nvrtc
@pytest.mark.parametrize("case", CASES, ids=str)
def test_old_code_on_a_newer_card(case: Case, legacy: Kernels) -> None:
    case.check(legacy, CARD)


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(variants()))
def test_the_code_is_that_of_the_older_card(source: str, arch: int) -> None:
    """Which is what makes running it on a newer one worth anything."""
    for macros in (
        variants()[source][0],
        variants()[source][-1],
    ):  # all of them are compiled where spills are looked for
        text = ptx(source, macros, arch).decode()
        assert f".target sm_{arch}" in text
        assert set(KERNEL_NAME.findall(read_source(source))) >= _entries(text) > set()
        # bytes are multiplied four at once from 6.1 on, where anything is multiplied as bytes
        assert ("dp4a" in text) == (source == "packed_experts.cu" and arch >= 61)


def _entries(text: str) -> set[str]:
    return {line.split(".entry ")[1].partition("(")[0].strip() for line in text.splitlines() if ".entry " in line}


@needs_compiler
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_the_branch_without_byte_products_on_the_host(case: Case) -> None:
    case.check(HostKernels(order=1, arch=600), torch.device("cpu"))
