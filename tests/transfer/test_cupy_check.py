"""Which compiler CuPy takes, and what is said of the wrong one. The wheels are in test_find_device.py."""

import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.gpu_kernels import cupy_kernels
from moe_offload.transfer import cupy_check
from moe_offload.transfer.cupy_check import (
    CupyFacts,
    cupy_problem,
    detect_cupy,
    find_cupy_problem,
    remove_second_compiler,
    wanted_extra,
)

TWELVE, THIRTEEN = (("cupy-cuda12x", "14.2.0"),), (("cupy-cuda13x", "14.2.0"),)
INSTALL12, INSTALL13 = "pip install 'moe-offload[cuda12]'", "pip install 'moe-offload[cuda13]'"
UNINSTALL = "pip uninstall -y nvidia-cuda-nvrtc"
SYSTEM = "/usr/local/cuda-13.0/lib64/libnvrtc.so.13"


def facts(wheels: Any, compilers: Any, capability: Any, **more: Any) -> CupyFacts:
    return CupyFacts(wheels, compilers, None, capability, "12.6", **more)


@pytest.mark.parametrize(
    ("found", "text", "command"),
    [
        # the system's compiler, which no list of wheels shows
        (facts(TWELVE, (), (6, 1), compiler=(13, 0), compiler_file=SYSTEM), SYSTEM, INSTALL12),
        (facts(TWELVE, (), (7, 0), compiler=(13, 0)), "system's compiler of CUDA 13, and", INSTALL12),
        # CuPy was there before us, and the order of loading can no longer be chosen
        (facts(TWELVE, (12, 13), (6, 1), compiler=(13, 5)), "compiler of CUDA 13 is installed", UNINSTALL),
        (facts(TWELVE, (13,), (6, 1), compiler=(13, 5)), "cannot compile for compute capability 6.1",
         f"{UNINSTALL} && {INSTALL12}"),
        (facts(TWELVE, (13,), (8, 6), compiler=(13, 5), driver=(535, 183, 1)), "needs driver 580, and this one is 535",
         f"{UNINSTALL} && {INSTALL12}"),
        (facts(THIRTEEN, (13,), (8, 6), driver=(535, 183, 1)), "cupy-cuda13x needs driver 580",
         f"pip uninstall -y cupy-cuda13x && {INSTALL12}"),
        (facts(TWELVE, (), (8, 6), compiler_error="No such file: libnvrtc.so.12"), "libnvrtc.so.12", INSTALL12),
    ],
)  # fmt: skip
def test_the_wrong_compiler(found: CupyFacts, text: str, command: str) -> None:
    problem = find_cupy_problem(found)
    assert problem is not None and text in problem.text and problem.command == command
    assert cupy_problem(found) == f"{problem.text}: {problem.command}"


@pytest.mark.parametrize(
    ("found", "command"),
    [
        (facts(TWELVE, (12, 13), (6, 1), compiler=(12, 6)), UNINSTALL),  # loaded ahead of the other
        (facts(TWELVE, (12,), (6, 1), compiler=(12, 6)), None),
        (facts(TWELVE, (12, 13), (7, 5), compiler=(13, 5)), None),  # Turing has either
        (facts(THIRTEEN, (13,), (9, 0), compiler=(13, 5), driver=(580, 65, 6)), None),
    ],
)
def test_the_right_compiler(found: CupyFacts, command: str | None) -> None:
    assert find_cupy_problem(found) is None and cupy_problem(found) is None
    assert remove_second_compiler(found) == command


def test_the_extra_fits_the_driver() -> None:
    assert wanted_extra(CupyFacts(cuda="13.0", capability=(8, 0))) == "cuda13"
    assert wanted_extra(CupyFacts(cuda="13.0", capability=(8, 0), driver=(570, 1))) == "cuda12"


class Wheels:
    """CuPy 12x and both compilers are installed; CuPy takes `taken`."""

    def __init__(self, taken: tuple[int, int] | Exception) -> None:
        self.taken, self.asked_for = taken, list[Any]()
        self.installed = {"cupy-cuda12x": "14.2.0", "nvidia-cuda-nvrtc-cu12": "12.6.77", "nvidia-cuda-nvrtc": "13.5.37"}

    def import_cupy(self, capability: tuple[int, int] | None = None) -> Any:
        self.asked_for.append(capability)

        def version() -> tuple[int, int]:
            if isinstance(self.taken, Exception):
                raise self.taken
            return self.taken

        return SimpleNamespace(cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=version)))


@pytest.mark.parametrize("taken", [(12, 6), (13, 5), RuntimeError("no libnvrtc\nlooked in"), RuntimeError()])
def test_it_is_asked_which_one_it_takes(taken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = Wheels(taken)
    monkeypatch.setattr(metadata, "version", wheels.installed.__getitem__)
    monkeypatch.setattr(cupy_kernels, "import_cupy", wheels.import_cupy)
    monkeypatch.setattr(cupy_check, "_loaded", lambda name: f"/lib/{name}")
    found = detect_cupy((6, 1), (580, 65, 6))
    assert wheels.asked_for == [(6, 1)]  # it has the older compiler loaded for this card
    assert (found.capability, found.driver, found.compilers) == ((6, 1), (580, 65, 6), (12, 13))
    if isinstance(taken, Exception):
        assert found.compiler is None and found.compiler_error == ("no libnvrtc" if taken.args else "RuntimeError")
    else:
        assert found.compiler == taken and found.compiler_file == "/lib/libnvrtc.so"
    assert (find_cupy_problem(found) is None) is (taken == (12, 6))


def test_nothing_is_imported_where_there_is_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_cupy(capability: object) -> None:
        raise AssertionError

    installed: dict[str, str] = {}
    monkeypatch.setattr(metadata, "version", installed.__getitem__)
    monkeypatch.setattr(cupy_kernels, "import_cupy", import_cupy)
    assert detect_cupy((6, 1)) == CupyFacts((), (), None, (6, 1), torch.version.cuda)


@pytest.mark.skipif(sys.platform != "linux", reason="the list of loaded files is Linux's")
def test_the_file_of_a_loaded_library() -> None:
    assert cupy_check._loaded("libc.so").startswith("/") and "libc.so" in cupy_check._loaded("libc.so")
    assert cupy_check._loaded("libnosuch.so") == ""


names = st.sampled_from(cupy_check._WHEELS)
versions = st.none() | st.sampled_from([(535, 183, 1), (580, 65, 6), (525,), ()])


@given(
    st.builds(
        CupyFacts,
        st.lists(st.tuples(names, st.sampled_from(["14.2.0", "13.6.0", ""])), max_size=2).map(tuple),
        st.lists(st.sampled_from([0, 12, 13]), max_size=2).map(tuple),
        st.none(),
        st.none() | st.sampled_from([(5, 2), (6, 1), (7, 0), (7, 5), (9, 0)]),
        st.sampled_from([None, "12.6", "13.0"]),
        st.none() | st.sampled_from([(12, 6), (13, 5)]),
        st.sampled_from(["", SYSTEM]),
        st.none() | st.text(max_size=5),
        versions,
    )
)
@settings(deadline=None, max_examples=300)
def test_a_compiler_that_cannot_serve_is_never_accepted(found: CupyFacts) -> None:
    problem, old = find_cupy_problem(found), found.capability is not None and found.capability < (7, 5)
    remove_second_compiler(found)
    if problem is not None:
        assert problem.command.startswith("pip ")
        assert not (old or (found.driver is not None and found.driver < (580,))) or "[cuda13]" not in problem.command
    elif old:
        assert found.compiler is None or found.compiler[0] < 13
