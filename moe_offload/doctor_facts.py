"""What `moe-offload doctor` looks at: this machine as facts, without any judgement."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from moe_offload import __version__
from moe_offload.bench_cpu import tier_name
from moe_offload.cpu_kernels.amx import permission
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.cpu_kernels.target import current_target
from moe_offload.machine import cpu_name
from moe_offload.memory import Memory, detect_memory
from moe_offload.transfer.card_facts import CardFacts, DriverFacts, detect_cards, measure_copy
from moe_offload.transfer.cupy_check import CupyFacts, detect_cupy
from moe_offload.transfer.find_device import CudaFacts, cuda_problem, detect_cuda

_COPY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """`cores`: physical ones that this process may use. `tier`: the instruction set of the kernels."""

    name: str
    cores: int
    tier: str
    memory: Memory


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """`visible`: CUDA_VISIBLE_DEVICES, None where it is not set. `transformers`: its version, None where there is none.

    `cupy` is as for the oldest card, whose needs are the narrowest.
    """

    cpu: CpuFacts
    cuda: CudaFacts
    cupy: CupyFacts = CupyFacts()
    driver: DriverFacts = DriverFacts()
    cards: tuple[CardFacts, ...] = ()
    transformers: str | None = None
    visible: str | None = None
    wsl: bool = False
    container: bool = False
    python: str = field(default_factory=platform.python_version)
    version: str = __version__


def detect_machine(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> MachineFacts:
    """Takes as long as starting CUDA does, and a second for each card that is measured."""
    cuda = detect_cuda()
    driver, cards = detect_cards(cuda, root)
    capabilities = [card.capability for card in cards if card.capability is not None]
    return MachineFacts(
        detect_cpu(),
        cuda,
        detect_cupy(min(capabilities, default=None), driver.version),
        driver,
        tuple(_measured(card, cuda) for card in cards),
        _version("transformers"),
        environment.get("CUDA_VISIBLE_DEVICES"),
        "microsoft" in platform.release().lower(),
        any((root / name).exists() for name in (".dockerenv", "run/.containerenv")),
    )


def detect_cpu() -> CpuFacts:
    """The CPU as the engine would use it, under this process's affinity and control group."""
    target = current_target()
    tier = tier_name(target)
    if target.tiles:
        tier += " and AMX" if permission() else " (AMX is there, but the system refuses it)"
    return CpuFacts(cpu_name(), default_threads(), tier, detect_memory())


def _measured(card: CardFacts, cuda: CudaFacts) -> CardFacts:
    """With the rate of a copy, where torch can use the card."""
    if card.index is None or cuda_problem(cuda, card.index) is not None:
        return card
    try:
        from moe_offload.transfer.cuda import CudaAccelerator

        accelerator = CudaAccelerator(card.index, _COPY_BYTES)
        try:
            return replace(card, copy_rate=measure_copy(accelerator, _COPY_BYTES))
        finally:
            accelerator.close()
    except Exception as error:
        return replace(card, copy_error=str(error).strip().partition("\n")[0] or type(error).__name__)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except Exception:  # not there, or its record is damaged
        return None
