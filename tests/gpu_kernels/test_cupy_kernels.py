"""Launches through CuPy, on stand-ins for CuPy and torch.cuda: what is called, in which order, with which bytes.

On a card: test_kernels_gpu.py.
"""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_offload.gpu_kernels import cupy_kernels
from moe_offload.gpu_kernels.cupy_kernels import CupyKernels, import_cupy
from moe_offload.gpu_kernels.launch import KernelError
from moe_offload.gpu_kernels.sources import read_source

HERE = cupy_kernels.__name__


class CompileException(Exception):
    def __str__(self) -> str:
        return "\n".join(f"kernel.cu({line}): error" for line in range(100))


class DriverError(RuntimeError):
    pass


class FakeCupy:
    """CuPy as far as it is used. `log` has what happened; kernels named in `missing` are not there."""

    def __init__(self, compiler: tuple[int, int] = (12, 6)) -> None:
        self.log: list[Any] = []
        self.missing = {"absent"}
        self.fault: Exception | None = None
        owner = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def __enter__(self) -> None:
                owner.log.append(f"enter {self.name}")

            def __exit__(self, *_: object) -> None:
                owner.log.append(f"leave {self.name}")

            @classmethod
            def from_external(cls, raw: Any) -> "Stream":
                owner.log.append(f"wrap {raw.cuda_stream}")
                return cls(str(raw.cuda_stream))

        Stream.null = Stream("null")  # type: ignore[attr-defined]
        self.cuda = SimpleNamespace(
            Stream=Stream,
            ExternalStream=lambda handle, device: Stream(f"old {handle} of {device}"),
            nvrtc=SimpleNamespace(getVersion=lambda: compiler, NVRTCError=KeyError),
            compiler=SimpleNamespace(CompileException=CompileException),
            driver=SimpleNamespace(CUDADriverError=DriverError),
        )

    def RawModule(self, **given: Any) -> Any:
        self.log.append(given)

        def get_function(name: str) -> Callable[..., None]:
            if self.fault is not None:
                raise self.fault
            if name in self.missing:
                raise DriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
            return lambda *call, **options: self.log.append((name, *call, options))

        return SimpleNamespace(get_function=get_function)


class FakeTorchCuda:
    """torch.cuda as far as it is used; `current` is the handle of the current stream."""

    def __init__(self, capability: tuple[int, int], cupy: FakeCupy) -> None:
        self.capability, self.cupy, self.current, self.protocol = capability, cupy, 5, True

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capability

    def current_stream(self, index: int) -> Any:
        stream = SimpleNamespace(cuda_stream=self.current)
        if self.protocol:
            stream.__cuda_stream__ = lambda: (0, self.current)
        return stream

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        self.cupy.log.append(f"device {index}")
        yield


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    return with_card(monkeypatch, FakeCupy(), (6, 1))[0]


def with_card(
    monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy, capability: tuple[int, int]
) -> tuple[FakeCupy, FakeTorchCuda]:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cuda = FakeTorchCuda(capability, cupy)
    monkeypatch.setattr(cupy_kernels, "torch", SimpleNamespace(cuda=cuda, Tensor=torch.Tensor))
    return cupy, cuda


def test_a_launch_is_one_call_on_torch_s_stream(cupy: FakeCupy) -> None:
    kernels = CupyKernels(1)
    join = kernels.get("routing.cu", "join", (("WIDTH", 4), ("DEPTH", 2)))
    options = ("-std=c++17", "-DWIDTH=4", "-DDEPTH=2")
    assert cupy.log == ["device 1", {"code": read_source("routing.cu"), "options": options, "backend": "nvrtc"}]
    cupy.log.clear()
    x = torch.zeros(4)
    table = np.zeros(1, np.dtype([("a", np.int32), ("b", np.float32)]))
    join([3], [32, 2], (x, None, np.int32(7), np.float32(0.5), table), shared_bytes=64)
    join((1,), (1,), ())
    assert cupy.log[:3] == ["device 1", "wrap 5", "enter 5"] and cupy.log[4:7] == ["leave 5", "device 1", "enter 5"]
    name, grid, block, values, shared = cupy.log[3]
    assert (name, grid, block, shared) == ("join", (3,), (32, 2), {"shared_mem": 64})
    assert [type(value) for value in values] == [np.uintp, np.uintp, np.int32, np.float32, np.ndarray]
    assert values[:4] == (x.data_ptr(), 0, 7, 0.5) and values[4] is table


def test_streams_are_wrapped_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, cuda = with_card(monkeypatch, FakeCupy(), (8, 0))
    kernel = CupyKernels().get("routing.cu", "join")
    for handle in (5, 6, 5, 0, 0):
        cuda.current = handle
        kernel((1,), (1,), ())
    cuda.current, cuda.protocol = 9, False
    kernel((1,), (1,), ())
    of_streams = [entry for entry in cupy.log if isinstance(entry, str) and entry.startswith(("wrap", "enter"))]
    assert of_streams == ["wrap 5", "enter 5", "wrap 6", "enter 6", "enter 5", "enter null", "enter null",
                          "enter old 9 of 0"]  # fmt: skip


def test_kernels_are_compiled_once(cupy: FakeCupy) -> None:
    kernels = CupyKernels()
    first = kernels.get("routing.cu", "join", (("A", 1),))
    assert kernels.get("routing.cu", "join", (("A", 1),)) is first
    kernels.get("routing.cu", "export_layer", (("A", 1),))
    kernels.get("routing.cu", "join", (("A", 2),))
    assert len([entry for entry in cupy.log if isinstance(entry, dict)]) == 2


@pytest.mark.parametrize("wrong", [1, 0.5, True, [1]])
def test_what_has_no_size_is_refused(cupy: FakeCupy, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"join: argument 1 is a Python {type(wrong).__name__}"):
        CupyKernels().get("routing.cu", "join")((1,), (1,), (None, wrong))


def test_sizes_and_arrays_that_cannot_be_launched(cupy: FakeCupy) -> None:
    join = CupyKernels().get("routing.cu", "join")
    with pytest.raises(KernelError, match="argument 0 has 2 elements"):
        join((1,), (1,), (np.zeros(2, np.int32),))
    with pytest.raises(KernelError, match=r"no grid \(0,\)"):
        join((0,), (32,), ())
    assert not [entry for entry in cupy.log if isinstance(entry, tuple)]


def test_a_kernel_that_is_not_there_and_a_source_that_does_not_compile(cupy: FakeCupy) -> None:
    kernels = CupyKernels()
    with pytest.raises(ValueError, match="routing.cu has no kernel 'absent'"):
        kernels.get("routing.cu", "absent")
    cupy.fault = CompileException()
    with pytest.raises(
        KernelError, match=r"(?s)routing.cu cannot be compiled: kernel.cu\(0\): error.*\(11\)"
    ) as caught:
        kernels.get("routing.cu", "join")
    assert "(12)" not in str(caught.value)
    cupy.fault = DriverError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available")
    with pytest.raises(KernelError, match="join of routing.cu cannot be loaded: CUDA_ERROR_NO_BINARY_FOR_GPU"):
        kernels.get("routing.cu", "join")
    cupy.fault = None
    kernels.get("routing.cu", "join")


def test_ready_ptx_is_loaded_from_a_file(cupy: FakeCupy) -> None:
    asked = []

    def ptx(source: str, macros: Any) -> bytes:
        asked.append((source, macros))
        return b".version 8.5"

    kernels = CupyKernels.of_ptx(ptx, 2)
    for macros in ((), (("A", 1),)):
        kernels.get("rows.cu", "gather", macros)
        kernels.get("rows.cu", "scatter", macros)
    assert asked == [("rows.cu", ()), ("rows.cu", (("A", 1),))]
    paths = [Path(entry["path"]) for entry in cupy.log if isinstance(entry, dict)]
    assert len(set(paths)) == 2 and all(path.read_bytes() == b".version 8.5" for path in paths)
    del kernels
    gc.collect()
    assert not any(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("compiler", "capability", "message"),
    [
        ((12, 6), (6, 1), ""),
        ((13, 0), (7, 5), ""),
        (
            (13, 5),
            (6, 1),
            "NVRTC 13.5, which cannot compile for compute capability 6.1: pip uninstall -y nvidia-cuda-nvrtc",
        ),
        ((13, 0), (7, 0), "capability 7.0"),
        ((12, 6), (5, 2), "6.0 and later, this card has 5.2"),
    ],
)
def test_the_compiler_has_to_know_the_card(
    compiler: tuple[int, int], capability: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, FakeCupy(compiler), capability)
    if not message:
        CupyKernels()
        return
    with pytest.raises(KernelError, match=message):
        CupyKernels()


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, FakeCupy(), (8, 0))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(KernelError, match="CuPy and its compiler cannot be used: .*cupy"):
        CupyKernels()


@pytest.mark.parametrize(
    ("capability", "imported", "wheel", "loads"),
    [
        ((6, 1), False, True, True),
        ((7, 0), False, True, True),
        ((7, 5), False, True, False),
        (None, False, True, False),
        ((6, 1), True, True, False),  # too late
        ((6, 1), False, False, False),
    ],
)
def test_for_old_cards_the_older_compiler_is_loaded_first(
    capability: tuple[int, int] | None, imported: bool, wheel: bool, loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []

    def distribution(name: str) -> Any:
        if not wheel:
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(locate_file=lambda path: Path("/site") / path)

    def load(path: str, mode: int) -> None:
        log.append((path, mode))

    def import_module(name: str) -> str:
        log.append(name)
        return "the module"

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    if imported:
        monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    monkeypatch.setattr(f"{HERE}.metadata.distribution", distribution)
    monkeypatch.setattr(f"{HERE}.ctypes.CDLL", load)
    monkeypatch.setattr(f"{HERE}.importlib.import_module", import_module)
    assert import_cupy(capability) == "the module"
    library = "/site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12", ctypes.RTLD_GLOBAL
    assert log == ([library] if loads else []) + ["cupy"]


def test_a_compiler_that_cannot_be_loaded_is_cupy_s_own_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, mode: int) -> None:
        raise OSError("no such file")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(f"{HERE}.ctypes.CDLL", fail)
    monkeypatch.setattr(f"{HERE}.metadata.distribution", lambda name: SimpleNamespace(locate_file=Path))
    monkeypatch.setattr(f"{HERE}.importlib.import_module", lambda name: "the module")
    assert import_cupy((6, 1)) == "the module"
