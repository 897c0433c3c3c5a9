"""Whether the CuPy that is installed can run our kernels on this card, and the command that mends it."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

import torch

_WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")  # all of them write into one folder
_TURING = (7, 5)  # CUDA 13 has no kernels for cards before it


@dataclass(frozen=True, slots=True)
class CupyFacts:
    """What is installed: wheels of CuPy as (name, version), majors of CUDA's run-time compiler (NVRTC) wheels, and what
    importing CuPy said (None: nothing wrong). `capability` of the card, None without one. `cuda`: what torch was built
    with.
    """

    wheels: tuple[tuple[str, str], ...] = ()
    compilers: tuple[int, ...] = ()
    import_error: str | None = None
    capability: tuple[int, int] | None = None
    cuda: str | None = None


def cupy_problem(facts: CupyFacts | None = None) -> str | None:
    """What is wrong with CuPy, with the command that mends it; None when nothing is. Never raises. `facts`: None to
    look.
    """
    facts = detect_cupy() if facts is None else facts
    extra = wanted_extra(facts)
    install = f"pip install 'moe-offload[{extra}]'"
    names = [name for name, _ in facts.wheels]
    old = facts.capability is not None and facts.capability < _TURING
    if not names:
        return f"CuPy is not installed: {install}"
    remove = f"pip uninstall -y {' '.join(names)}"
    if len(names) > 1:
        return f"{' and '.join(names)} are installed over each other: {remove} && {install}"
    (name, version), card = facts.wheels[0], _spoken(facts.capability)
    if name == "cupy-cuda13x" and old:
        return f"cupy-cuda13x cannot compile for {card}: {remove} && {install}"
    if name == "cupy-cuda11x":
        return f"cupy-cuda11x is too old, version 14 for CUDA 12 or 13 is needed: {remove} && {install}"
    if _major(version) != 14:
        return f"{name} {version} is installed, version 14 is needed: " + (
            install if name == f"cupy-{extra}x" else f"{remove} && {install}"
        )
    if 13 in facts.compilers and old:
        # cupy-cuda12x takes the newest compiler that it finds
        return f"the compiler of CUDA 13 is installed, and CuPy would use it, but it cannot compile for {card}: " + (
            "pip uninstall -y nvidia-cuda-nvrtc" + ("" if 12 in facts.compilers else f" && {install}")
        )
    if facts.import_error is not None:
        return f"{name} {version} cannot be imported ({facts.import_error}): {remove} && {install}"
    return None


def wanted_extra(facts: CupyFacts) -> str:
    """cuda12 for cards before Turing; else what torch was built with, so that one set of CUDA's libraries serves
    both.
    """
    if facts.capability is not None and facts.capability < _TURING:
        return "cuda12"
    return "cuda13" if facts.cuda is not None and _major(facts.cuda) >= 13 else "cuda12"


def detect_cupy(capability: tuple[int, int] | None = None) -> CupyFacts:
    """Never raises. `capability` of the card that it is for; None for torch's first one."""
    wheels = tuple(_versions(_WHEELS))
    compilers = tuple(_major(version) for _, version in _versions(("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")))
    failure = None
    if wheels:
        try:
            import cupy  # noqa: F401
        except Exception as error:
            failure = str(error).strip().partition("\n")[0] or type(error).__name__
    if capability is None:
        try:
            capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None
        except Exception:
            capability = None
    return CupyFacts(wheels, compilers, failure, capability, torch.version.cuda)


def _versions(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except Exception:  # not there, or its record is damaged
            continue


def _major(version: str) -> int:
    digits = version.partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _spoken(capability: tuple[int, int] | None) -> str:
    return "this card" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
