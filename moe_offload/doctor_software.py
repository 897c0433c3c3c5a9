"""Judgement of `moe-offload doctor` on versions and on the environment's settings that hurt."""

import re

from moe_offload.doctor_cpu_facts import CpuFacts
from moe_offload.doctor_findings import Finding
from moe_offload.doctor_software_facts import PACKAGES, SoftwareFacts

TRANSFORMERS = "transformers>=5.14,<6"  # as pyproject.toml has it
_OLDEST_TRANSFORMERS, _NEXT_TRANSFORMERS = (5, 14), (6,)
_OFF = ("0", "false", "")


def software_findings(software: SoftwareFacts, cpu: CpuFacts) -> list[Finding]:
    """What is missing, and what the environment forbids or slows."""
    found = [_jit(software), _threads(software, cpu), _binding(software), _kernels(software)]
    found += [_slows(software, name, why) for name, why in _SLOWS.items()]
    missing = [name for name, version in software.packages if version is None and name in PACKAGES]
    if missing:
        text = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed as pip knows it"
        found.append(Finding("advice", text, command=f"pip install {' '.join(missing)}", section="software"))
    return [each for each in found if each is not None]


def transformers_finding(version: str | None) -> Finding | None:
    """Without one in the range no model runs."""
    numbers = re.match(r"(\d{1,9})(?:\.(\d{1,9}))?", version or "", re.ASCII)
    if numbers is not None and _OLDEST_TRANSFORMERS <= (int(numbers[1]), int(numbers[2] or 0)) < _NEXT_TRANSFORMERS:
        return None
    text = "transformers is not installed" if version is None else f"transformers {version} does not fit"
    return Finding("problem", f"{text}: no model runs", command=f'pip install "{TRANSFORMERS}"', section="software")


_SLOWS = {
    "NUMBA_DEBUG": "fills the terminal and slows compiling",
    "CUDA_LAUNCH_BLOCKING": "makes the CPU wait for every launch: nothing overlaps",
    "PYTHONMALLOC": "checks or changes every allocation of Python",
}


def _slows(software: SoftwareFacts, name: str, why: str) -> Finding | None:
    value = software.setting(name)
    if value is None or value.lower() in _OFF or value == "pymalloc":
        return None
    return Finding("advice", f"{name}={value} {why}", command=f"unset {name}", section="software")


def _jit(software: SoftwareFacts) -> Finding | None:
    value = software.setting("NUMBA_DISABLE_JIT")
    if value is None or value in _OFF:
        return None
    text = f"NUMBA_DISABLE_JIT={value} forbids compiling kernels: no model runs"
    return Finding("problem", text, command="unset NUMBA_DISABLE_JIT", section="software")


def _threads(software: SoftwareFacts, cpu: CpuFacts) -> Finding | None:
    """torch's threads do what is not an expert, and lend themselves to the engine where they are as many."""
    threads = software.torch_threads
    if threads is None or threads == cpu.cores:
        return None
    limits = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS")
    blame = [name for name in limits if (value := software.setting(name)) is not None and _first(value) == threads]
    if blame and threads < cpu.cores:
        values = " and ".join(f"{name}={software.setting(name)}" for name in blame)
        text = f"{values} gives torch {threads} of {cpu.cores} cores: attention and prompts run on these alone"
        return Finding("advice", text, command=f"unset {' '.join(blame)}", section="software")
    if threads > cpu.cores:
        text = (
            f"torch takes {threads} threads, and this process has {cpu.cores} cores to itself: they wait for each other"
        )
        return Finding("advice", text, command=f"export OMP_NUM_THREADS={cpu.cores}", section="software")
    return None


def _first(value: str) -> int | None:
    """Of '4,2', for nested regions."""
    number = value.partition(",")[0].strip()
    return int(number) if re.fullmatch(r"\d{1,9}", number, re.ASCII) else None


def _binding(software: SoftwareFacts) -> Finding | None:
    """OpenMP pins the thread that loads it, and whoever asks afterwards sees one core."""
    names = [name for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY") if _binds(software, name)]
    if not names:
        return None
    values = " and ".join(f"{name}={software.setting(name)}" for name in names)
    text = f"{values} pins this program's first thread to one core, so that the engine may see no other"
    return Finding("advice", text, command=f"unset {' '.join(names)}", section="software")


def _binds(software: SoftwareFacts, name: str) -> bool:
    value = (software.setting(name) or "false").lower()
    return value not in ("false", "disabled", "none")


def _kernels(software: SoftwareFacts) -> Finding | None:
    if software.kernels is not None:
        return None
    text = "compiled kernels can be kept nowhere: every start compiles for ten seconds and more"
    help_ = "set NUMBA_CACHE_DIR to a folder that you may write to"
    return Finding("advice", text, instruction=help_, section="software")
