"""What is known about the cards of this machine: by the driver (NVML), by torch, and by the system's own files.

NVML knows cards that torch does not see, and how a card is connected; it comes with the package nvidia-ml-py, which may
be missing. Its order of cards is that of the bus, CUDA's may be another: cards are matched by their UUID or their place
on the bus, never by number. Every probe may fail, and what it would have said is None then.

Never run with a card by us: only with stand-ins for NVML, torch and the system's files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_offload.transfer.accelerator import Accelerator
from moe_offload.transfer.card_probes import (
    CardFacts,
    DriverFacts,
    Link,
    ask_nvml,
    listed_cards,
    numa_node,
    plain_uuid,
    read_driver,
    system_link,
    tried,
)
from moe_offload.transfer.find_device import Card, CudaFacts

__all__ = ["CardFacts", "DriverFacts", "Link", "detect_cards", "match_cards", "measure_copy"]


def detect_cards(facts: CudaFacts, root: Path = Path("/")) -> tuple[DriverFacts, tuple[CardFacts, ...]]:
    """The driver, and all cards: torch's in torch's order, then those that torch does not see. Never raises."""
    driver, known = ask_nvml(read_driver(root))
    known = known or listed_cards(root)
    cards = match_cards(facts.cards, [_torch_identity(index) for index in range(len(facts.cards))], known)
    return driver, tuple(_with_system_facts(card, root) for card in cards)


def match_cards(
    cards: Sequence[Card], identities: Sequence[tuple[str | None, str | None]], known: Sequence[CardFacts]
) -> tuple[CardFacts, ...]:
    """Torch's `cards`, whose (UUID, bus) are `identities`, joined to what else is `known` about each."""
    left = list(known)
    joined: list[CardFacts] = []
    for index, (card, (uuid, bus)) in enumerate(zip(cards, identities, strict=True)):
        found = next((each for each in left if uuid is not None and each.uuid == uuid), None)
        found = found or next((each for each in left if bus is not None and each.bus == bus), None)
        if found is None and uuid is None and bus is None:  # an old torch: a name is enough where it is the only one
            alike = [each for each in left if each.name == card.name]
            found = alike[0] if len(alike) == 1 and sum(each.name == card.name for each in cards) == 1 else None
        if found is None:
            found = CardFacts(card.name, uuid=uuid, bus=bus)
        else:
            left.remove(found)
        joined.append(
            replace(found, name=card.name, index=index, capability=card.capability, memory_bytes=card.memory_bytes)
        )
    return (*joined, *left)


def measure_copy(accelerator: Accelerator, nbytes: int = 64 << 20, repeats: int = 3) -> float:
    """Bytes a second from page-locked memory to the device, the best of `repeats` copies behind one that warms up."""
    arena = accelerator.host_arena(nbytes)
    try:
        host, device = arena.take(nbytes, "measured copy"), accelerator.allocate(nbytes, "measured copy")
        host.host(write=True)[:] = 0
        try:
            stream = accelerator.stream("measured copy")
            rates: list[float] = []
            for _ in range(1 + repeats):
                start = stream.record(timed=True)
                accelerator.copy_in(device, host, stream)
                end = stream.record(timed=True)
                end.synchronize()
                rates.append(nbytes / max(end.time() - start.time(), 1e-9))
            return max(rates[1:])
        finally:
            accelerator.free(device)
    finally:
        arena.close()


def _torch_identity(index: int) -> tuple[str | None, str | None]:
    """UUID and place on the bus of cuda:`index`; older torch knows one or none of them."""
    try:
        card: Any = torch.cuda.get_device_properties(index)
    except Exception:
        return None, None
    uuid = tried(lambda: plain_uuid(str(card.uuid)))
    bus = tried(lambda: f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0")
    return uuid, bus


def _with_system_facts(card: CardFacts, root: Path) -> CardFacts:
    """The NUMA node; the link, where NVML was not there to tell; free memory, by torch."""
    free, link, node = card.free_bytes, card.link, None
    if free is None and card.index is not None:
        free = tried(lambda: int(torch.cuda.mem_get_info(card.index)[0]))
    if card.bus is not None:
        node = numa_node(card.bus, root)
        link = system_link(card.bus, root) if link == Link() else link
    return replace(card, free_bytes=free, link=link, numa_node=node)
