"""What the card is, and how fast its memory and its link are: what everything else is a share of."""

from typing import Any

import torch

from benchmarks.gpu.bench import Bench

Facts = dict[str, Any]


def card_facts(bench: Bench) -> Facts:
    """From torch, and from NVML where nvidia-ml-py is installed."""
    facts: Facts = {
        "capability": ".".join(map(str, bench.capability)),
        "processors": bench.processors,
        "cache_bytes": bench.cache_bytes,
        "cuda": torch.version.cuda,
    }
    if not bench.on_card:
        return {"name": "host shim", **facts}
    found = torch.cuda.get_device_properties(bench.device)
    return {"name": str(found.name), "memory_bytes": int(found.total_memory), **facts, **_of_nvml(found)}


def _of_nvml(found: Any) -> Facts:
    """Driver, clocks (MHz) and link. Numbers of NVML and CUDA differ: the card is found by its UUID."""
    try:
        import pynvml
    except ImportError:
        return {"nvml": "nvidia-ml-py is not installed"}
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{found.uuid}")
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "clock_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
            "greatest_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000,
            "link_generation": pynvml.nvmlDeviceGetMaxPcieLinkGeneration(card),
            "link_width": pynvml.nvmlDeviceGetCurrPcieLinkWidth(card),
        }
    except Exception as error:  # no probe of it is worth more than the figures
        return {"nvml": str(error)}


def bandwidth(bench: Bench) -> dict[str, float]:
    """GB/s. copy: device to device, read and written bytes both counted; read: a sum; in and out: page-locked memory
    over the link.
    """
    large = [torch.ones(bench.sizes.copied_bytes // 4, device=bench.device) for _ in range(2)]
    sums = torch.zeros(1, device=bench.device)
    host = torch.zeros(bench.sizes.linked_bytes // 4, pin_memory=bench.on_card)
    near = torch.zeros_like(host, device=bench.device)
    series = bench.times(
        copy=[lambda: _copy(large[0], large[1]), lambda: _copy(large[1], large[0])],
        read=[lambda source=source: _sum(source, sums) for source in large],  # type: ignore[misc]
        link_in=[lambda: _copy(near, host)],
        link_out=[lambda: _copy(host, near)],
    )
    moved = {"copy": 2 * large[0].nbytes, "read": large[0].nbytes, "link_in": host.nbytes, "link_out": host.nbytes}
    return {name: round(moved[name] / each.seconds / 1e9, 2) for name, each in series.items()}


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _sum(source: torch.Tensor, out: torch.Tensor) -> None:
    torch.sum(source, dim=0, keepdim=True, out=out)
