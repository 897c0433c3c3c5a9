"""Every kernel compiles for the cards that differ most, without spills and warnings; for all cards:
`python -m tests.gpu_kernels.nvrtc`, which .ci/run runs.
"""

from importlib import metadata

import pytest

from moe_offload.gpu_kernels.launch import KernelError, Macros
from moe_offload.gpu_kernels.sources import source_names
from tests.gpu_kernels import nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.installed(12), reason="needs NVRTC 12: pip install nvidia-cuda-nvrtc-cu12")
# P100: no dp4a; 1080 Ti: dp4a; H100: the newest that NVRTC 12.6 knows
TESTED = (60, 61, 90)
CASES = [(source, macros) for source, sets in sorted(nvrtc.variants().items()) for macros in sets]

# 64 running sums for a thread, and two blocks of 1024 threads a multiprocessor leave it 32 registers
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) planted(const float* x, float* y, int n) {
    float sums[64] = {};
    for (int k = 0; k < n; ++k)
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[i] = sums[i] * sums[(i + 1) % 64] + x[k * 64 + i];
#pragma unroll
    for (int i = 0; i < 64; ++i) y[threadIdx.x * 64 + i] = sums[i];
}
"""


@needs_nvrtc
@pytest.mark.parametrize(("source", "macros"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_no_spills_and_no_warnings(source: str, macros: Macros) -> None:
    """A fifth of the whole table's time: what is special about a card in between is the table's to say."""
    assert [fault for arch in TESTED for fault in nvrtc.compiled(source, macros, arch).faults] == []


@pytest.mark.skipif(not nvrtc.installed(13), reason="needs NVRTC 13: pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize("source", source_names())
def test_the_newest_cards(source: str) -> None:
    macros = nvrtc.variants()[source][-1]
    assert nvrtc.compiled(source, macros, 120).faults == []


@needs_nvrtc
def test_a_spill_is_found() -> None:
    found = nvrtc.compiled_text(SPILLING, "planted.cu", (), 61)
    assert found.faults == [f"planted.cu {{}} sm_61: planted spills {found.kernels[0].spills} bytes"]
    assert found.kernels[0].spills > 100 and found.kernels[0].registers == 32
    assert f"32/{found.kernels[0].spills}" in nvrtc.table([found])
    sound = nvrtc.compiled_text(SPILLING.replace("(1024, 2)", "(256)"), "planted.cu", (), 61)
    assert sound.faults == [] and sound.kernels[0].registers > 64


@needs_nvrtc
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("__global__ void f(int* x) { x[0] = nothing; }", "does not compile:(.|\n)*nothing"),
        (
            "__global__ void f(int* x) { __shared__ int all[13000]; all[x[0]] = 1; x[1] = all[x[2]]; }",
            "takes 52000 bytes of shared memory; 49152",
        ),
        ("__global__ void f(int* x) { int unused; x[0] = 1; }", "warning.*unused"),
        ("__device__ int f(int x) { return x; }", "has no kernel"),
    ],
)
def test_other_faults_are_found(text: str, fault: str) -> None:
    found = nvrtc.compiled_text(f'extern "C" {text}', "planted.cu", (), 61)
    assert len(found.faults) == 1
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(found.faults[0])


@needs_nvrtc
@pytest.mark.parametrize(("arch", "expected"), [(60, False), (61, True), (70, True)])
def test_ptx_of_old_cards_takes_its_own_branch(arch: int, expected: bool) -> None:
    source = "packed_experts.cu"
    text = nvrtc.ptx(source, nvrtc.variants()[source][0], arch).decode()
    assert f".target sm_{arch}" in text and ("dp4a" in text) == expected


def test_a_source_without_variants_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(nvrtc.variants()) == source_names()
    monkeypatch.setattr(nvrtc, "source_names", lambda: [*source_names(), "forgotten.cu"])
    with pytest.raises(ValueError, match="forgotten.cu"):
        nvrtc.variants()
    monkeypatch.setattr(nvrtc, "source_names", lambda: source_names()[1:])
    with pytest.raises(ValueError, match="which is no source"):
        nvrtc.variants()


def test_a_compiler_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(f"{nvrtc.__name__}.metadata.distribution", missing)
    with pytest.raises(KernelError, match="no NVRTC 12: pip install nvidia-cuda-nvrtc-cu12"):
        nvrtc.Nvrtc(12)
