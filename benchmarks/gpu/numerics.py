"""What is right or wrong, not fast or slow: the gpu tests, and compute-sanitizer over one launch of every kernel."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
_TOOLS = ("memcheck", "racecheck")
_PATIENCE = 1800  # seconds
_FOUND = 9  # the exit code that compute-sanitizer is told to give for errors


def gpu_tests(files: tuple[str, ...] = ("tests",)) -> dict[str, Any]:
    """`pytest -m gpu` in a process of its own: how many passed, failed and were skipped; the names of failed ones."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *files]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {_PATIENCE} s"}
        if not report.exists():
            return {"exit_code": done.returncode, "error": (done.stdout + done.stderr)[-2000:]}
        return {"exit_code": done.returncode, **counted(report.read_text())}


def counted(report: str) -> dict[str, Any]:
    """Counts of a JUnit report."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {
        "passed": len(cases) - len(skipped) - len(failed),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def sanitized() -> dict[str, str]:
    """The verdict of each tool of compute-sanitizer on `benchmarks.gpu.every_kernel`, if it is there."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return dict.fromkeys(_TOOLS, "not available: no compute-sanitizer on PATH")
    return {tool: _verdict(program, tool) for tool in _TOOLS}


def _verdict(program: str, tool: str) -> str:
    command = [
        program, "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable, "-m", "benchmarks.gpu.every_kernel",
    ]  # fmt: skip
    # torch's allocator would put many tensors into one allocation, and their ends would not be seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return f"stopped after {_PATIENCE} s"
    if done.returncode == 0:
        return "clean"
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    what = "errors" if done.returncode == _FOUND else f"exit code {done.returncode}"
    return f"{what}: " + " | ".join(said[-8:])
