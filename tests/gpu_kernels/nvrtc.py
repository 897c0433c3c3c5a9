"""Every kernel compiled for every card, with the compiler's wheel alone: no GPU, no driver, no CuPy.

`python -m tests.gpu_kernels.nvrtc` prints registers, shared memory and spills of all kernels, each with all macros
that its launcher uses (VARIANTS of the modules of gpu_kernels), and ends with 1 where one fails or spills.
"""

import ctypes
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

from moe_offload import gpu_kernels
from moe_offload.gpu_kernels.launch import KernelError, Macros
from moe_offload.gpu_kernels.sources import read_source, source_names
from tests.gpu_kernels.build_cache import cached

# compute capabilities, by the major of the NVRTC that has to compile for them
ARCHITECTURES = {12: (60, 61, 70, 75, 80, 86, 89, 90), 13: (100, 120)}
MOST_SHARED = 48 << 10  # bytes of a block; the compiler lets more pass
_WHEELS = {
    12: ("nvidia-cuda-nvrtc-cu12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
    13: ("nvidia-cuda-nvrtc", "nvidia/cu13/lib/libnvrtc.so.13"),
}
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers.*?(?:(\d+) bytes smem|$)")
_WARNING = re.compile(r"\bwarning\s*[#:]")
_DEPRECATED = re.compile(r"architectures? .*(deprecated|removed)|-Wno-deprecated-gpu-targets", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes on one card: registers of a thread, bytes of shared memory of a block, of a thread's local
    memory (stack), and of registers written to it for want of more (spills).
    """

    kernel: str
    registers: int
    shared: int
    stack: int
    spills: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """One source for one card; `error` is the compiler's log where it failed."""

    source: str
    macros: Macros
    architecture: int
    kernels: tuple[Resources, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """What must not be; empty for a source that is all right."""
        where = f"{self.source} {dict(self.macros)} sm_{self.architecture}"
        if self.error:
            return [f"{where} does not compile:\n{self.error}"]
        spilling = [f"{where}: {each.kernel} spills {each.spills} bytes" for each in self.kernels if each.spills]
        large = [
            f"{where}: {each.kernel} takes {each.shared} bytes of shared memory; {MOST_SHARED} are given without asking"
            for each in self.kernels
            if each.shared > MOST_SHARED
        ]
        none = [] if self.kernels else [f"{where} has no kernel"]
        return [*spilling, *large, *none, *(f"{where}: {warning}" for warning in self.warnings)]


class Nvrtc:
    """The compiler of one wheel; KernelError where it is not installed."""

    def __init__(self, major: int) -> None:
        wheel, name = _WHEELS[major]
        try:
            path = Path(str(metadata.distribution(wheel).locate_file(name)))
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # under a sanitizer NVRTC does not find it
                ctypes.CDLL(str(builtins))
            self._library = ctypes.CDLL(str(path))
        except (metadata.PackageNotFoundError, OSError) as error:
            raise KernelError(f"no NVRTC {major}: pip install {wheel}") from error
        found = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(found[0]), ctypes.byref(found[1]))
        self.version = found[0].value, found[1].value
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def compile(self, text: str, options: Sequence[str], what: str) -> tuple[bytes, str]:
        """`what` ("PTX" or "CUBIN") and the compiler's log; KernelError with the log where it fails."""
        program = ctypes.c_void_p()
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None))
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), given)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode()
            if failed:
                raise KernelError(log or self._library.nvrtcGetErrorString(failed).decode())
            return self._read(program, what), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data))
        return data.raw

    def _check(self, failed: int) -> None:
        if failed:
            raise KernelError(self._library.nvrtcGetErrorString(failed).decode())


@cache
def nvrtc(major: int) -> Nvrtc:
    return Nvrtc(major)


def installed(major: int) -> bool:
    try:
        nvrtc(major)
    except KernelError:
        return False
    return True


def ptx(source: str, macros: Macros, arch: int) -> bytes:
    """The PTX of a source for compute capability `arch`, such as 61, from NVRTC 12."""
    options = [f"-arch=compute_{arch}", *_options(macros)]
    compiler, text = nvrtc(12), read_source(source)

    def make(path: Path) -> None:
        path.write_bytes(compiler.compile(text, options, "PTX")[0].rstrip(b"\0"))

    return cached(".ptx", (compiler.version, text, options), make).read_bytes()


def compiled(source: str, macros: Macros, arch: int) -> Compiled:
    """The source for one card, by the oldest NVRTC that knows it."""
    return compiled_text(read_source(source), source, macros, arch)


def compiled_text(text: str, source: str, macros: Macros, arch: int) -> Compiled:
    """Likewise, of any text."""
    major = next(major for major, known in ARCHITECTURES.items() if arch in known)
    compiler = nvrtc(major)
    options = [f"-arch=sm_{arch}", *_options(macros), "--ptxas-options=-v"]

    def make(path: Path) -> None:
        path.write_text(compiler.compile(text, options, "CUBIN")[1])

    try:
        kernels, warnings = _report(cached(".log", (compiler.version, text, options), make).read_text())
    except KernelError as error:
        return Compiled(source, macros, arch, error=str(error))
    return Compiled(source, macros, arch, tuple(kernels), tuple(warnings))


def _options(macros: Macros) -> list[str]:
    return ["-std=c++17", *(f"-D{name}={value}" for name, value in macros)]


def _report(log: str) -> tuple[list[Resources], list[str]]:
    """What the assembler says of each kernel, and the compiler's warnings."""
    kernels, name, frame = [], "", (0, 0, 0)
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            name = found[1]
        elif found := _FRAME.search(line):
            frame = int(found[1]), int(found[2]), int(found[3])
        elif found := _USED.search(line):
            kernels.append(Resources(name, int(found[1]), int(found[2] or 0), frame[0], frame[1] + frame[2]))
    warnings = [line for line in log.splitlines() if _WARNING.search(line) and not _DEPRECATED.search(line)]
    return kernels, warnings


def variants() -> dict[str, list[Macros]]:
    """The macros that each source is compiled with: VARIANTS of the package's modules."""
    known: dict[str, list[Macros]] = {}
    for module in pkgutil.iter_modules(gpu_kernels.__path__):
        found = getattr(import_module(f"{gpu_kernels.__name__}.{module.name}"), "VARIANTS", {})
        for source, sets in found.items():
            known.setdefault(source, []).extend(each for each in sets if each not in known.get(source, []))
    missing = [name for name in source_names() if not known.get(name)]
    unknown = [name for name in known if name not in source_names()]
    if missing or unknown:
        raise ValueError(f"VARIANTS of no module names {missing}, or names {unknown}, which is no source")
    return known


def compile_all(majors: Sequence[int]) -> Iterator[Compiled]:
    """Every source with all its macros for the cards of these NVRTC versions, in order, two at a time."""
    cases = [
        (source, macros, arch)
        for source, sets in sorted(variants().items())
        for macros in sets
        for major in majors
        for arch in ARCHITECTURES[major]
    ]
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda case: compiled(*case), cases)


def table(results: Sequence[Compiled]) -> str:
    """A line for each kernel and set of macros, a column for each card: registers, with /spilled bytes if any."""
    architectures = sorted({each.architecture for each in results})
    rows: dict[tuple[str, str, str], dict[int, Resources]] = {}
    for each in results:
        macros = " ".join(f"{name}={value}" for name, value in each.macros)
        for kernel in each.kernels:
            rows.setdefault((each.source, kernel.kernel, macros), {})[each.architecture] = kernel
    titles = ("source", "kernel", "macros", "shared", "stack", *(f"sm_{arch}" for arch in architectures))
    lines = [titles, *(_row(key, found, architectures) for key, found in rows.items())]
    widths = [max(len(line[at]) for line in lines) for at in range(len(titles))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _row(key: tuple[str, ...], found: dict[int, Resources], architectures: Sequence[int]) -> tuple[str, ...]:
    cells = [
        "failed"
        if arch not in found
        else f"{found[arch].registers}" + (f"/{found[arch].spills}" * bool(found[arch].spills))
        for arch in architectures
    ]
    most = [str(max(getattr(each, name) for each in found.values())) for name in ("shared", "stack")]
    return (*key, *most, *cells)


def main() -> int:
    majors = [major for major in ARCHITECTURES if installed(major)]
    if 12 not in majors:
        print("no NVRTC 12: pip install nvidia-cuda-nvrtc-cu12", file=sys.stderr)  # noqa: T201
        return 1
    results = list(compile_all(majors))
    versions = ", ".join(".".join(map(str, nvrtc(major).version)) for major in majors)
    print(f"NVRTC {versions}: registers, /bytes spilled\n{table(results)}")  # noqa: T201
    faults = [fault for result in results for fault in result.faults]
    print("\n".join(faults or ["no spills"]))  # noqa: T201
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
