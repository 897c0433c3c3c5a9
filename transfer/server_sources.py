"""Where the numbers of a server profile come from: which of its fields, and a sentence that can be followed."""

from typing import NamedTuple


class Source(NamedTuple):
    """fields: of a `ServerProfile`. text: who says so, and how the figure was made of it."""

    fields: tuple[str, ...]
    text: str


_MEMORY_SHARE = "65 % of it, as llama.cpp reaches 60 to 70 % at batch 1 on dense models"
_LINK_3 = Source(
    ("link_gbs",),
    "PCIe 3.0 x16, page-locked: 10.9 GB/s reported of an i9-10900K with an RTX 3090 (public notes), 11.8 to 13.0 from "
    "copy times in LayerScope's artifact (commit f85e627); 12 taken",
)
_LINK_4 = Source(
    ("link_gbs",),
    "PCIe 4.0 x16, page-locked: 25.1 (RTX 4090) and 25.3 GB/s (RTX 3090) reported by a survey of 2026; 25 taken",
)
_NVME_3 = Source(
    ("disk_gbs",),
    "NVMe on PCIe 3.0: 2.6 GB/s in one stream, 3.4 with four readers, reported of an i9-10900K (public notes); 2.6",
)
_NVME_4 = Source(("disk_gbs",), "NVMe on PCIe 4.0: 5 GB/s, an estimate")
_SATA = Source(("disk_gbs",), "SATA at 6 Gbit/s carries 0.6 GB/s at most; 0.5 taken, an estimate")
_STARTS = Source(
    (
        "link_latency", "launch_seconds", "kernel_seconds", "wait_seconds", "host_expert_seconds", "host_job_seconds",
        "jitter",
    ),
    "estimates, measured on none of these servers: launches by the CPU's clock, kernels and waits by the card's age",
)  # fmt: skip
_SYSTEM = Source(("host_memory_bytes",), "a typical size for such a server; nothing measured")
_MEASURED_EXPERTS = Source(
    ("expert_tables",),
    "bf16 experts on 16 threads of a Xeon Gold 6230R: github.com/nezha-Anonymous/LayerScope, commit f85e627, "
    "micro*.txt, smoothed (transfer/measured_experts.py)",
)


def _card(sheet: str, gbs: int, tflops: str, share: str, memory: str) -> tuple[Source, ...]:
    """sheet: the data sheet's name. gbs: memory, as it says. tflops: arithmetic, likewise. share: what is taken of
    the arithmetic. memory: the card's.
    """
    return (
        Source(("memory_bytes",), f"{memory} less 512 MiB for CUDA's context: {sheet}"),
        Source(("memory_gbs",), f"{gbs} GB/s: {sheet}; {_MEMORY_SHARE}"),
        Source(("flops",), f"{tflops}: {sheet}; {share}, as products of few rows are thin"),
    )


def _host(page: str, channels: str, cores: str, kernels: str) -> tuple[Source, ...]:
    """page: the CPU's product page. cores: with the clock under load of all of them, which is estimated."""
    return (
        Source(("host_read_gbs",), f"{channels}: {page}; 75 % of the sum, as STREAM reaches 75 to 85 %"),
        Source(
            ("host_flops",),
            f"{cores}: {page}, clock estimated; times {kernels} (benchmarks/results/cpu_experts.json, Zen 4), 80 % for "
            "the many threads",
        ),
    )


def _nvidia(product: str) -> str:
    """The name under which a data sheet is found."""
    return f"NVIDIA's data sheet of the {product}"


_VNNI = "90 Gop/s per core and GHz of the AVX-512 VNNI tier"
_AVX2 = "29 Gop/s per core and GHz of the AVX2 tier"
_ONE_PORT = "14.5 Gop/s per core and GHz, half of the AVX2 tier: Broadwell multiplies bytes on one port"

SOURCES: dict[str, tuple[Source, ...]] = {
    "v100-6230r": (
        *_card(_nvidia("Tesla V100 PCIe 32 GB"), 900, "112 TFLOP/s of f16 tensor cores", "40 %", "32 GiB"),
        *_host(
            "Intel Xeon Gold 6230R, product page (ARK)",
            "6 x DDR4-2933",
            "26 cores at 2.2 GHz",
            _VNNI,
        ),
        _LINK_3,
        _NVME_3,
        _STARTS,
        _SYSTEM,
        _MEASURED_EXPERTS,
    ),
    "p40": (
        *_card(_nvidia("Tesla P40"), 346, "11.8 TFLOP/s of f32", "50 %", "15/16 (ECC) of 24 GiB"),
        *_host(
            "Intel Xeon E5-2690 v4, product page (ARK)",
            "4 x DDR4-2400",
            "14 cores at 2.9 GHz",
            _ONE_PORT,
        ),
        _LINK_3,
        _SATA,
        _STARTS,
        _SYSTEM,
    ),
    "p100": (
        *_card(_nvidia("Tesla P100 PCIe 16 GB"), 732, "18.7 TFLOP/s of f16", "50 %", "16 GiB"),
        *_host(
            "Intel Xeon E5-2698 v4, product page (ARK)",
            "4 x DDR4-2400",
            "20 cores at 2.5 GHz",
            _ONE_PORT,
        ),
        _LINK_3,
        _SATA,
        _STARTS,
        _SYSTEM,
    ),
    "gtx1080ti": (
        *_card("NVIDIA GeForce GTX 1080 Ti, product page", 484, "11.3 TFLOP/s of f32", "50 %", "11 GiB"),
        *_host(
            "Intel Xeon E5-2680 v4, product page (ARK)",
            "4 x DDR4-2400",
            "14 cores at 2.7 GHz",
            _ONE_PORT,
        ),
        _LINK_3,
        _NVME_3,
        _STARTS,
        _SYSTEM,
    ),
    "rtx2080ti": (
        *_card(
            "NVIDIA Turing architecture white paper, RTX 2080 Ti",
            616,
            "53.8 TFLOP/s of tensor cores adding in f32",
            "40 %",
            "11 GiB",
        ),
        *_host("Intel Core i9-9900K, product page (ARK)", "2 x DDR4-2666", "8 cores at 4.5 GHz", _AVX2),
        _LINK_3,
        _NVME_3,
        _STARTS,
        _SYSTEM,
    ),
    "t4": (
        *_card(
            _nvidia("T4"),
            320,
            "65 TFLOP/s of f16 tensor cores",
            "30 %, as 70 W do not hold its clock",
            "15/16 (ECC) of 16 GiB",
        ),
        *_host(
            "Intel Xeon Silver 4216, product page (ARK)",
            "6 x DDR4-2400",
            "16 cores at 1.9 GHz",
            _VNNI,
        ),
        _LINK_3,
        _NVME_3,
        _STARTS,
        _SYSTEM,
    ),
    "rtx3090": (
        *_card(
            "NVIDIA Ampere GA102 white paper, RTX 3090",
            936,
            "71 TFLOP/s of bf16 tensor cores adding in f32",
            "40 %",
            "24 GiB",
        ),
        *_host("AMD Ryzen 9 5950X, product page", "2 x DDR4-3200", "16 cores at 4.0 GHz", _AVX2),
        _LINK_4,
        _NVME_4,
        _STARTS,
        _SYSTEM,
    ),
    "a100": (
        *_card(_nvidia("A100 PCIe 40 GB"), 1555, "312 TFLOP/s of bf16 tensor cores", "40 %", "40 GiB"),
        *_host("AMD EPYC 7543, product page", "8 x DDR4-3200", "32 cores at 3.2 GHz", _AVX2),
        _LINK_4,
        _NVME_4,
        _STARTS,
        _SYSTEM,
    ),
}
