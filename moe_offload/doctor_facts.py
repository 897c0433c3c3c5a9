"""What `moe-offload doctor` looks at: this machine as facts, without any judgement."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from moe_offload import __version__
from moe_offload.doctor_cpu_facts import CpuFacts, detect_cpu
from moe_offload.doctor_disk_facts import DiskFacts, detect_disks
from moe_offload.doctor_memory_facts import MemoryFacts, detect_main_memory
from moe_offload.doctor_software_facts import SoftwareFacts, detect_software, version_of
from moe_offload.transfer.card_facts import CardFacts, DriverFacts, detect_cards, measure_copy
from moe_offload.transfer.cupy_check import CupyFacts, detect_cupy
from moe_offload.transfer.find_device import CudaFacts, cuda_problem, detect_cuda

_COPY_BYTES = 64 << 20


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
    memory: MemoryFacts = MemoryFacts(0, 0)
    disks: tuple[DiskFacts, ...] = ()
    software: SoftwareFacts = SoftwareFacts()


def detect_machine(
    root: Path = Path("/"),
    environment: Mapping[str, str] = os.environ,
    *,
    measure: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> MachineFacts:
    """Takes as long as starting CUDA does, and a second or two for each of what is measured: main memory, disks, cards.

    report: called with what is being done.
    """
    if measure:
        report("reading memory as fast as it goes")
    cpu = detect_cpu(root, measure)
    if measure:
        report("reading from disk as fast as it goes")
    disks = detect_disks(root, measure)
    report("looking for cards")
    cuda = detect_cuda()
    driver, cards = detect_cards(cuda, root)
    capabilities = [card.capability for card in cards if card.capability is not None]
    return MachineFacts(
        cpu,
        cuda,
        detect_cupy(min(capabilities, default=None), driver.version),
        driver,
        tuple(_measured(card, cuda) if measure else card for card in cards),
        version_of("transformers"),
        environment.get("CUDA_VISIBLE_DEVICES"),
        "microsoft" in platform.release().lower(),
        any((root / name).exists() for name in (".dockerenv", "run/.containerenv")),
        memory=detect_main_memory(root),
        disks=disks,
        software=detect_software(environment),
    )


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
