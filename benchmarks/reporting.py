"""What every benchmark's result says beside its figures: the machine, the versions, the commit, and how it was run."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
FORMAT = 1  # of result files: raised when what `benchmarks.compare` relies on changes its meaning
# Where benchmarks keep the checkpoints they make, to find them again.
WORK = Path(tempfile.gettempdir()) / "moe-offload-benchmarks"


def machine() -> dict[str, Any]:
    """Facts that figures depend on; nothing that tells whose machine it is."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numba", "numpy")},
    }


def _cpu_name() -> str:
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, _, value in lines}
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def commit() -> str:
    """The checkout's commit, with "-dirty" where code differs from it; "unknown" outside of a checkout or without git.

    Results and documents do not count as a difference: benchmarks write them one after the other.
    """
    found = _git("rev-parse", "HEAD")
    if not found:
        return "unknown"
    # from the root of the checkout, which this folder is one below
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results", ":!/docs")
    return found if changed == "" else f"{found}-dirty"


def _git(*arguments: str) -> str | None:
    """What git says of this checkout; None when it does not."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write results/NAME.json beside its final place and rename it there."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.json"
    beside = target.with_suffix(f".{os.getpid()}.tmp")
    about = {"format": FORMAT, "benchmark": name, "commit": commit(), "machine": machine()}
    beside.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    beside.replace(target)
    return target


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of a measured series."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def resident() -> dict[str, int]:
    """Bytes of this process by kind: anonymous (its own), file-backed, and the most it ever had."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile", "VmHWM"):
            fields[name] = int(rest.split()[0]) * 1024
    return fields


def wide_console() -> Console:
    """For tables: as wide as the terminal, and wide where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def progress(text: str) -> None:
    """A line of progress for whoever waits."""
    sys.stderr.write(text + "\n")
