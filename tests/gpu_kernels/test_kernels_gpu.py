"""All kernels beside float64: on the CPU through the shim, which keeps the cases right; on a card with `-m gpu`.

No case has run on a card yet.
"""

from contextlib import suppress

import pytest
import torch

from moe_offload.gpu_kernels.launch import Kernel, Kernels, Macros
from moe_offload.gpu_kernels.sources import read_source, source_names
from tests.gpu_kernels.gpu_card import CARD, needs_card
from tests.gpu_kernels.host_kernels import HostKernels, needs_compiler
from tests.gpu_kernels.kernel_cases import CASES, KERNEL_NAME, Case, Started
from tests.gpu_kernels.nvrtc import variants

CPU = torch.device("cpu")


class Nothing:
    """Kernels that do nothing."""

    def get(self, source: str, name: str, macros: Macros = ()) -> Kernel:
        return lambda grid, block, arguments, *, shared_bytes=0: None


class Without:
    """Kernels of the host, one of which does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, source: str, name: str, macros: Macros = ()) -> Kernel:
        return (Nothing() if name == self.name else HostKernels()).get(source, name, macros)


@pytest.fixture(scope="module")
def on_card() -> Kernels:
    """Kernels of this card, compiled by its own NVRTC."""
    from moe_offload.gpu_kernels.cupy_kernels import CupyKernels

    return CupyKernels(0)


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_host(case: Case) -> None:
    case.check(HostKernels(order=2), CPU)


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_card(case: Case, on_card: Kernels) -> None:
    case.check(on_card, CARD)


def test_the_cases_start_every_kernel_in_every_variant() -> None:
    names: set[tuple[str, str, Macros]] = set()
    for case in CASES:
        with suppress(AssertionError):  # nothing runs, so no number is right
            case.check(Started(Nothing(), names), CPU)
    known = variants()
    started = {(source, macros) for source, _, macros in names}
    assert not [
        (source, macros) for source, sets in known.items() for macros in sets if (source, macros) not in started
    ]
    kernels = {(source, name) for source in known for name in KERNEL_NAME.findall(read_source(source))}
    assert len(kernels) > 8
    assert kernels == {(source, name) for source, name, _ in names}


@needs_compiler
@pytest.mark.parametrize(
    "name", sorted({name for each in source_names() for name in KERNEL_NAME.findall(read_source(each))})
)
def test_the_cases_find_a_kernel_that_does_nothing(name: str) -> None:
    """Every case that starts it; memory that nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for case in _one_of_each_kind(name):
            with pytest.raises(AssertionError):
                case.check(Without(name), CPU)
    finally:
        torch.use_deterministic_algorithms(False)


def _one_of_each_kind(name: str) -> list[Case]:
    """The first case of each kind that starts a kernel."""
    found: dict[str, Case] = {}
    for case in CASES:
        names: set[tuple[str, str, Macros]] = set()
        if case.kind not in found:
            with suppress(AssertionError):
                case.check(Started(Nothing(), names), CPU)
            if name in {started for _, started, _ in names}:
                found[case.kind] = case
    assert found
    return list(found.values())
