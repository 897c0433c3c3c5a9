"""Conversions of a real checkpoint that end early or run side by side, in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_offload
from moe_offload.transfer.pack_layout import Section
from moe_offload.transfer.pack_writer import PackWriter
from tests.conftest import Checkpoints
from tests.pack_cases import SIZES, files, logits, pack_in

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Converts as `load` does, and sends itself a signal in the middle of the second layer.
CONVERT = """
import os, sys
from pathlib import Path
from moe_offload.convert_model import read_experts
from moe_offload.options import Options
from moe_offload.packs import find_pack, make_pack
model, packs, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
experts = read_experts(model)
def report(what, done, total):
    if what == "converting experts" and done > 0.45 * total:
        os.kill(os.getpid(), number)
make_pack(find_pack(experts, "int8", Options(threads=2, pack_dir=packs), report), experts)
"""

# Makes a pack without a model, slowly, and prints how many sections this process has written.
BOTH = """
import sys, time
from pathlib import Path
from moe_offload.pack_cache import PackCache
from tests.pack_files import PLAN, Conversion, check
conversion = Conversion()
def slowly(writer, report):
    time.sleep(1)
    conversion(writer, report)
check(PackCache(Path(sys.argv[1]) / "model.pack", PLAN).open(slowly))
print(len(conversion.done))
"""


def converting(folder: Path, packs: Path, number: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(folder), str(packs), str(number)],
        cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def load(folder: Path, packs: Path, **options: Any) -> PreTrainedModel:
    return moe_offload.load(folder, weights="int8", dense="stored", pack_dir=packs, **options)


@pytest.fixture
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", **SIZES)


def test_a_killed_conversion_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = converting(folder, tmp_path / "packs", signal.SIGKILL)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert files(tmp_path / "packs") == {"partial", "journal", "lock"}

    written: list[str] = []
    finish = PackWriter.finish_section

    def noted(self: PackWriter, section: Section, checksums: list[int]) -> None:
        written.append(section.name)
        finish(self, section, checksums)

    monkeypatch.setattr(PackWriter, "finish_section", noted)
    resumed = load(folder, tmp_path / "packs")
    assert written == [layer.path for layer in resumed.offload.spec.layers][1:]
    fresh = load(folder, tmp_path / "fresh")
    assert pack_in(tmp_path / "packs").read_bytes() == pack_in(tmp_path / "fresh").read_bytes()
    assert torch.equal(logits(resumed), logits(fresh))


def test_two_processes_at_once(tmp_path: Path) -> None:
    """One of them converts, the other uses what it made."""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", BOTH, str(tmp_path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    written = []
    for process in both:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        written.append(int(out))
    assert sorted(written) == [0, 3]
    assert files(tmp_path) == {"pack", "verified", "lock"}


def test_progress_that_raises_ends_the_conversion(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C arrives in the main thread, wherever it is; the threads that convert end before the exception goes on."""

    def interrupted(what: str, done: int, total: int) -> None:
        if what == "converting experts" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path, progress=interrupted)
    assert files(tmp_path) == {"partial", "journal", "lock"}
    assert load(folder, tmp_path).offload.weights == "int8"
