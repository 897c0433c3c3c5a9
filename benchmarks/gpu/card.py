"""What the card is, and how fast its memory and its link are: what everything else is a share of."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from moe_offload.transfer.card_facts import detect_cards
from moe_offload.transfer.find_device import detect_cuda

Facts = dict[str, Any]


def card_facts(bench: Bench) -> Facts:
    """From torch, and from the driver where nvidia-ml-py is installed; nothing that tells whose card it is."""
    driver, cards = detect_cards(detect_cuda())
    facts: Facts = {
        "name": "host shim",
        "capability": ".".join(map(str, bench.capability)),
        "processors": bench.processors,
        "cache_bytes": bench.cache_bytes,
        "cuda": torch.version.cuda,
        "driver": None if driver.version is None else ".".join(map(str, driver.version)),
        "nvml": driver.nvml_error or driver.nvml,
        "clock_mhz": _asked(bench, torch.cuda.clock_rate),
        "power_mw": _asked(bench, torch.cuda.power_draw),
        "temperature": _asked(bench, torch.cuda.temperature),
    }
    for card in cards:
        if card.index == bench.device.index and bench.on_card:
            facts |= {"name": card.name, "memory_bytes": card.memory_bytes, "link": asdict(card.link)}
    return facts


def _asked(bench: Bench, question: Callable[[torch.device], int]) -> int | str | None:
    """What NVML says through torch, right behind the bandwidths, so that clocks are those of work."""
    if not bench.on_card:
        return None
    try:
        return question(bench.device)
    except Exception as error:  # no probe of it is worth more than the figures
        return str(error).partition("\n")[0]


def bandwidth(bench: Bench) -> dict[str, float]:
    """GB/s. copy: device to device, read and written bytes both counted; read: a sum; link: page-locked memory over
    PCIe, in both directions.
    """
    large = [torch.ones(bench.sizes.copied_bytes // 4, device=bench.device) for _ in range(2)]
    sums = torch.zeros(1, device=bench.device)
    host = torch.zeros(bench.sizes.linked_bytes // 4, pin_memory=bench.on_card)
    near = torch.zeros_like(host, device=bench.device)
    series = bench.times(
        copy=[lambda: _copy(large[0], large[1]), lambda: _copy(large[1], large[0])],
        read=[lambda: _sum(large[0], sums), lambda: _sum(large[1], sums)],
        link_in=[lambda: _copy(near, host)],
        link_out=[lambda: _copy(host, near)],
    )
    moved = {"copy": 2 * large[0].nbytes, "read": large[0].nbytes, "link_in": host.nbytes, "link_out": host.nbytes}
    return {name: round(moved[name] / each.seconds / 1e9, 2) for name, each in series.items()}


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _sum(source: torch.Tensor, out: torch.Tensor) -> None:
    torch.sum(source, dim=0, keepdim=True, out=out)
