"""Words to devices, on facts about machines that need not exist."""

import sys
from importlib import metadata
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.transfer import cupy_check
from moe_offload.transfer.accelerator import DeviceError
from moe_offload.transfer.cupy_check import CupyFacts, cupy_problem, detect_cupy
from moe_offload.transfer.find_device import (
    Card,
    CudaFacts,
    DeviceChoice,
    cuda_problem,
    detect_cuda,
    open_accelerator,
    parse_device,
    resolve_device,
    runs_on,
)

GIB = 1 << 30
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
PASCAL = Card("NVIDIA GeForce GTX 1080 Ti", (6, 1), 11 * GIB)
TURING = Card("Tesla T4", (7, 5), 15 * GIB)


@pytest.mark.parametrize(
    ("request_", "choice"),
    [
        ("auto", DeviceChoice("auto")),
        ("cpu", DeviceChoice("cpu")),
        ("cuda", DeviceChoice("cuda", 0)),
        ("cuda:0", DeviceChoice("cuda", 0)),
        ("cuda:12", DeviceChoice("cuda", 12)),
        ("virtual:gtx1080ti", DeviceChoice("virtual", profile="gtx1080ti")),
    ],
)
def test_devices(request_: str, choice: DeviceChoice) -> None:
    assert parse_device(request_) == choice
    assert parse_device(str(choice)) == choice


@pytest.mark.parametrize(
    "request_",
    ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1.5", "cuda:x", "cuda:١", "cuda:9999", "virtual", "virtual:",
     "virtual:a b", " cuda", "cuda\n", "auto:0", "cpu:0"],
)  # fmt: skip
def test_what_is_no_device(request_: str) -> None:
    with pytest.raises(ValueError, match="choose auto, cpu, cuda, cuda:N or virtual:PROFILE"):
        parse_device(request_)


@given(st.text(max_size=20))
@settings(deadline=None, max_examples=200)
def test_any_text_is_a_device_or_a_value_error(text: str) -> None:
    try:
        choice = parse_device(text)
    except ValueError:
        return
    assert choice.kind in text and 0 <= choice.index < 1000


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (CU126, (6, 1), True),  # code for 6.0
        (CU126, (7, 0), True),
        (CU126, (7, 2), True),
        (CU126, (8, 9), True),
        (CU126, (12, 0), False),
        (CU130, (6, 1), False),
        (CU130, (7, 0), False),
        (CU130, (7, 5), True),
        (CU130, (13, 0), True),  # compiled from compute_120
        (("sm_86",), (8, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_90a",), (9, 1), False),
        (("sm_100f",), (10, 3), True),
        (("sm_100f",), (12, 0), False),
        (("compute_70",), (6, 1), False),
        (("gfx906", "sm_x"), (9, 0), False),
        ((), (8, 0), False),
    ],
)
def test_whether_code_runs_on_a_card(architectures: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(architectures, capability) is runs


@pytest.mark.parametrize(
    ("facts", "index", "words"),
    [
        (CudaFacts("2.13.0+cpu", None), 0, ["2.13.0+cpu has no CUDA", "whl/cu126", "whl/cu130"]),
        (CudaFacts("2.13.0", "13.0", trouble="Found no NVIDIA driver"), 0, ["Found no NVIDIA driver", "CUDA 13.0"]),
        (CudaFacts("2.13.0", "13.0", CU130), 0, ["sees no card", "CUDA_VISIBLE_DEVICES"]),
        (CudaFacts("2.13.0", "12.6", CU126, (PASCAL,)), 1, ["no cuda:1", "cuda:0 is the only card"]),
        (CudaFacts("2.13.0", "12.6", CU126, (PASCAL, TURING)), 2, ["no cuda:2", "cuda:0 to cuda:1 exist"]),
        (CudaFacts("2.13.0", "13.0", CU130, (PASCAL,)), 0, ["1080 Ti", "capability 6.1", "sm_75", "whl/cu126"]),
        (CudaFacts("2.6.0", "11.8", ("sm_60",), (TURING,)), 0, ["Tesla T4", "capability 7.5", "whl/cu130"]),
    ],
)
def test_why_a_card_cannot_be_used(facts: CudaFacts, index: int, words: list[str]) -> None:
    problem = cuda_problem(facts, index)
    assert problem is not None and all(word in problem for word in words)
    with pytest.raises(DeviceError) as caught:
        open_accelerator(DeviceChoice("cuda", index), facts=facts)
    assert str(caught.value) == problem
    if index == 0:
        assert open_accelerator(DeviceChoice("auto"), facts=facts) is None


def test_auto_takes_the_first_card_that_can_be_used() -> None:
    both = CudaFacts("2.13.0", "13.0", CU130, (PASCAL, TURING))
    assert resolve_device(DeviceChoice("auto"), both) == DeviceChoice("cuda", 1)
    old = CudaFacts("2.13.0", "12.6", CU126, (PASCAL, TURING))
    assert resolve_device(DeviceChoice("auto"), old) == DeviceChoice("cuda", 0)
    assert cuda_problem(old, 0) is None and resolve_device(DeviceChoice("cuda", 1), old) == DeviceChoice("cuda", 1)
    assert resolve_device(DeviceChoice("auto"), CudaFacts("2.13.0+cpu", None)) == DeviceChoice("cpu")


def test_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_offload.transfer import cuda

    opened: list[tuple[int, int | None]] = []
    monkeypatch.setattr(cuda, "CudaAccelerator", lambda index, budget: opened.append((index, budget)))
    facts = CudaFacts("2.13.0", "12.6", CU126, (PASCAL, TURING))
    open_accelerator(DeviceChoice("cuda", 1), 15 * GIB, facts=facts)
    open_accelerator(DeviceChoice("auto"), None, facts=facts)
    assert opened == [(1, 15 * GIB), (0, None)]
    for budget in (11 * GIB + 1, 0, -5):
        with pytest.raises(ValueError, match=rf"budget of {budget} bytes.*1080 Ti \(cuda:0\) has {11 * GIB}"):
            open_accelerator(DeviceChoice("auto"), budget, facts=facts)
    assert open_accelerator(DeviceChoice("cpu")) is None


def test_virtual_servers() -> None:
    device = open_accelerator(parse_device("virtual:gtx1080ti"), GIB)
    assert device is not None and device.simulated and device.budget == GIB
    device.close()
    with pytest.raises(ValueError, match="gtx1080ti"):  # the list of those that exist
        open_accelerator(parse_device("virtual:gtx9999"))
    with pytest.raises(ValueError, match=rf"budget of {1 << 50} bytes.*virtual:gtx1080ti has \d+"):
        open_accelerator(parse_device("virtual:gtx1080ti"), 1 << 50)


class BrokenCuda:
    """torch.cuda of a build with CUDA on a machine where it does not start."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("Found no NVIDIA driver on your system.\nPlease check"), AssertionError(), OSError("x")]
)
def test_looking_never_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    detect_cuda()
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch, "cuda", BrokenCuda(error))
    trouble = detect_cuda().trouble
    assert trouble and "\n" not in trouble
    problem = cuda_problem(detect_cuda(), 0)
    assert problem is not None and trouble in problem and "nvidia-smi" in problem
    assert detect_cupy().capability is None


def test_what_is_seen_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "Tesla T4", 7, 5, 15 * GIB

    monkeypatch.setattr(torch.version, "cuda", "12.6")
    for name, answer in {
        "init": None, "device_count": 2, "get_device_properties": Properties, "get_arch_list": ["sm_75"]
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert detect_cuda() == CudaFacts(str(torch.__version__), "12.6", ("sm_75",), (TURING, TURING))


TWELVE, THIRTEEN = ("cupy-cuda12x", "14.2.0"), ("cupy-cuda13x", "14.2.0")
INSTALL12, INSTALL13 = "pip install 'moe-offload[cuda12]'", "pip install 'moe-offload[cuda13]'"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (CupyFacts((TWELVE,), (12,), None, (6, 1), "12.6"), None),
        (CupyFacts((TWELVE,), (12, 13), None, (7, 5), "12.6"), None),
        (CupyFacts((TWELVE,), (), None, (9, 0), "13.0"), None),  # works for newer cards too
        (CupyFacts((THIRTEEN,), (13,), None, (7, 5), "13.0"), None),
        (CupyFacts((("cupy", "14.0.1"),), (), None, (8, 0), "12.6"), None),  # built from source
        (CupyFacts(), ["not installed", INSTALL12]),
        (CupyFacts((), (), None, (7, 5), "13.0"), ["not installed", INSTALL13]),
        (CupyFacts((), (), None, (7, 0), "13.0"), ["not installed", INSTALL12]),
        (
            CupyFacts((TWELVE, THIRTEEN), (12, 13), None, (8, 6), "13.0"),
            ["over each other", f"pip uninstall -y cupy-cuda12x cupy-cuda13x && {INSTALL13}"],
        ),
        (
            CupyFacts((THIRTEEN,), (13,), None, (6, 1), "12.6"),
            ["compute capability 6.1", f"pip uninstall -y cupy-cuda13x && {INSTALL12}"],
        ),
        (
            CupyFacts((("cupy-cuda11x", "13.6.0"),), (), None, (7, 0), "12.6"),
            ["too old", f"pip uninstall -y cupy-cuda11x && {INSTALL12}"],
        ),
        (CupyFacts((("cupy-cuda12x", "13.6.0"),), (12,), None, (7, 0), "12.6"), ["13.6.0", f"needed: {INSTALL12}"]),
        (
            CupyFacts((("cupy-cuda12x", "15.0"),), (12,), None, (8, 0), "13.0"),
            ["15.0", f"uninstall -y cupy-cuda12x && {INSTALL13}"],
        ),
        (
            CupyFacts((TWELVE,), (12, 13), None, (7, 0), "12.6"),
            ["compiler of CUDA 13", "uninstall -y nvidia-cuda-nvrtc"],
        ),
        (
            CupyFacts((TWELVE,), (13,), None, (7, 0), "12.6"),
            ["compiler of CUDA 13", f"nvidia-cuda-nvrtc && {INSTALL12}"],
        ),
        (
            CupyFacts((TWELVE,), (12,), "libcublas.so.12: cannot open", (8, 0), "12.6"),
            ["libcublas.so.12", f"uninstall -y cupy-cuda12x && {INSTALL12}"],
        ),
    ],
)
def test_what_is_wrong_with_cupy(facts: CupyFacts, words: list[str] | None) -> None:
    problem = cupy_problem(facts)
    if words is None:
        assert problem is None
    else:
        assert problem is not None and all(word in problem for word in words)
        assert problem.count("pip install") <= 1  # never both extras


versions = st.sampled_from(["14.2.0", "13.6.0", "15.0", "14", "x", "", "14.0rc1"])
wheels = st.lists(st.tuples(st.sampled_from(cupy_check._WHEELS), versions), max_size=3).map(tuple)
capabilities = st.none() | st.tuples(st.integers(3, 13), st.integers(0, 9))


@given(
    st.builds(
        CupyFacts,
        wheels,
        st.lists(st.sampled_from([0, 12, 13]), max_size=2).map(tuple),
        st.none() | st.text(max_size=5),
        capabilities,
        st.sampled_from([None, "11.8", "12.6", "13.0", ""]),
    )
)
@settings(deadline=None, max_examples=200)
def test_cupys_problem_never_raises_and_old_cards_never_get_cuda_13(facts: CupyFacts) -> None:
    problem = cupy_problem(facts)
    if facts.capability is not None and facts.capability < (7, 5):
        assert problem is None or "[cuda13]" not in problem
        if problem is None:
            assert facts.wheels[0][0] != "cupy-cuda13x" and 13 not in facts.compilers
    if problem is not None:
        assert "pip " in problem


def test_cupy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy_problem()
    installed = {"cupy-cuda12x": "14.2.0", "nvidia-cuda-nvrtc-cu12": "12.6.77", "nvidia-cuda-nvrtc": "13.0.88"}

    def version(name: str) -> str:
        if name == "cupy":
            raise OSError("damaged record")
        return installed[name]  # KeyError where there is none

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails
    facts = detect_cupy((6, 1))
    assert facts.wheels == (("cupy-cuda12x", "14.2.0"),) and facts.compilers == (12, 13) and facts.capability == (6, 1)
    assert facts.import_error is not None and "cupy" in facts.import_error
