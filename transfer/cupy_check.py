"""Whether the CuPy that is installed can run our kernels on this card, and the command that mends it."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

_WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")  # all of them write into one folder
_TURING = (7, 5)  # CUDA 13 has no kernels for cards before it
_DRIVER_OF_CUDA_13 = (580,)


@dataclass(frozen=True, slots=True)
class CupyFacts:
    """What is installed: wheels of CuPy as (name, version), majors of CUDA's run-time compiler (NVRTC) wheels, and what
    importing CuPy said (None: nothing wrong). `capability` of the card, None without one. `cuda`: what torch was built
    with. `compiler`: the version of the compiler that CuPy takes, out of `compiler_file`, and `compiler_error` what was
    said when it was asked; None where it was not. `driver`: its version, None where nobody knows.
    """

    wheels: tuple[tuple[str, str], ...] = ()
    compilers: tuple[int, ...] = ()
    import_error: str | None = None
    capability: tuple[int, int] | None = None
    cuda: str | None = None
    compiler: tuple[int, int] | None = None
    compiler_file: str = ""
    compiler_error: str | None = None
    driver: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class CupyProblem:
    """What is wrong, and the command that mends it."""

    text: str
    command: str


def cupy_problem(facts: CupyFacts | None = None) -> str | None:
    """What is wrong with CuPy, with the command that mends it; None when nothing is. Never raises. `facts`: None to
    look.
    """
    problem = find_cupy_problem(detect_cupy() if facts is None else facts)
    return None if problem is None else f"{problem.text}: {problem.command}"


def find_cupy_problem(facts: CupyFacts) -> CupyProblem | None:
    """The first thing that is wrong; None when nothing is. Never raises."""
    extra = wanted_extra(facts)
    install = f"pip install 'moe-offload[{extra}]'"
    names = [name for name, _ in facts.wheels]
    if not names:
        return CupyProblem("CuPy is not installed", install)
    remove = f"pip uninstall -y {' '.join(names)}"
    reinstall = f"{remove} && {install}"
    if len(names) > 1:
        return CupyProblem(f"{' and '.join(names)} are installed over each other", reinstall)
    (name, version), card = facts.wheels[0], _spoken(facts.capability)
    if name == "cupy-cuda13x" and _before_turing(facts):
        return CupyProblem(f"cupy-cuda13x cannot compile for {card}", reinstall)
    if name == "cupy-cuda13x" and _old_driver(facts):
        return CupyProblem(f"cupy-cuda13x needs driver 580, and this one is {_dotted(facts.driver)}", reinstall)
    if name == "cupy-cuda11x":
        return CupyProblem("cupy-cuda11x is too old, version 14 for CUDA 12 or 13 is needed", reinstall)
    if _major(version) != 14:
        text = f"{name} {version} is installed, version 14 is needed"
        return CupyProblem(text, install if name == f"cupy-{extra}x" else reinstall)
    if facts.import_error is not None:
        return CupyProblem(f"{name} {version} cannot be imported ({facts.import_error})", reinstall)
    if facts.compiler_error is not None:
        return CupyProblem(f"{name} {version} finds no compiler, NVRTC ({facts.compiler_error})", install)
    return _wrong_compiler(facts, install)


def wanted_extra(facts: CupyFacts) -> str:
    """cuda12 for cards before Turing and drivers before 580; else what torch was built with, so that one set of CUDA's
    libraries serves both.
    """
    if _before_turing(facts) or _old_driver(facts):
        return "cuda12"
    return "cuda13" if facts.cuda is not None and _major(facts.cuda) >= 13 else "cuda12"


def remove_second_compiler(facts: CupyFacts) -> str | None:
    """The command that takes CUDA 13's compiler away where CuPy works only because CUDA 12's is loaded ahead of it;
    None where it does no harm.
    """
    if not _before_turing(facts) or 13 not in facts.compilers or 12 not in facts.compilers:
        return None
    return "pip uninstall -y nvidia-cuda-nvrtc"


def detect_cupy(capability: tuple[int, int] | None = None, driver: tuple[int, ...] | None = None) -> CupyFacts:
    """Never raises. `capability` of the card that it is for; None for torch's first one."""
    if capability is None:
        try:
            capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None
        except Exception:
            capability = None
    wheels = tuple(_versions(_WHEELS))
    compilers = tuple(_major(version) for _, version in _versions(("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")))
    failure: str | None = None
    compiler: tuple[int, int] | None = None
    silence: str | None = None
    file = ""
    if wheels:
        try:
            # as the kernels do it: for old cards it has CUDA 12's compiler loaded first
            from moe_offload.gpu_kernels.cupy_kernels import import_cupy

            cupy = import_cupy(capability)
        except Exception as error:
            failure = _first_line(error)
        else:
            try:
                major, minor = cupy.cuda.nvrtc.getVersion()
                compiler, file = (int(major), int(minor)), _loaded("libnvrtc.so")
            except Exception as error:
                silence = _first_line(error)
    return CupyFacts(
        wheels, compilers, failure, capability, torch.version.cuda, compiler, file, silence, driver
    )  # fmt: skip


def _wrong_compiler(facts: CupyFacts, install: str) -> CupyProblem | None:
    """cupy-cuda12x takes the newest compiler that it finds; what it has taken in fact decides, where that is known."""
    major = facts.compiler[0] if facts.compiler is not None else max(facts.compilers, default=0)
    if major < 13:
        return None
    if _before_turing(facts):
        limit = f"it cannot compile for {_spoken(facts.capability)}"
    elif _old_driver(facts):
        limit = f"what it compiles needs driver 580, and this one is {_dotted(facts.driver)}"
    else:
        return None
    if 13 not in facts.compilers:
        where = f" ({facts.compiler_file})" if facts.compiler_file else ""
        return CupyProblem(f"CuPy uses the system's compiler of CUDA 13{where}, and {limit}", install)
    remove = "pip uninstall -y nvidia-cuda-nvrtc"
    return CupyProblem(
        f"the compiler of CUDA 13 is installed, and CuPy would use it, but {limit}",
        remove if 12 in facts.compilers else f"{remove} && {install}",
    )


def _before_turing(facts: CupyFacts) -> bool:
    return facts.capability is not None and facts.capability < _TURING


def _old_driver(facts: CupyFacts) -> bool:
    return facts.driver is not None and facts.driver < _DRIVER_OF_CUDA_13


def _loaded(library: str) -> str:
    """The file of a library that this process has loaded; "" where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ""
    files = (line.partition("/") for line in lines)
    return next((f"/{rest}" for _, slash, rest in files if slash and library in rest.rpartition("/")[2]), "")


def _versions(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except Exception:  # not there, or its record is damaged
            continue


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _major(version: str) -> int:
    digits = version.partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _dotted(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version or ()))


def _spoken(capability: tuple[int, int] | None) -> str:
    return "this card" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
