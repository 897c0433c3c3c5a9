"""Packed linears on disk: converted once, mapped later, and never in the way of a load."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import moe_offload
from moe_offload import dense_conversion
from moe_offload.convert_model import read_stored
from moe_offload.cpu_kernels import packing
from moe_offload.dense_pack import find_dense_pack, make_dense_pack
from moe_offload.models.packed_linear import PackedLinear
from moe_offload.options import Options
from tests.conftest import Checkpoints
from tests.models.test_prequantised import fp8_checkpoint, mxfp4_checkpoint
from tests.pack_cases import dense_packs_in, files, logits, pack_in
from tests.pack_files import read_only

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = dict(hidden_size=64, intermediate_size=96)
# Loads, and kills itself when half of the linears are converted.
KILLED = """
import os, signal, sys
import moe_offload
def report(what, done, total):
    if what == "converting linears" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
moe_offload.load(sys.argv[1], dense="int8", pack_dir=sys.argv[2], progress=report)
"""


@pytest.fixture
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", **SIZES)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layouts of matrices that are packed from now on."""
    seen: list[Any] = []
    real = packing.pack_matrix

    def counting(weights: Any, layout: Any, *rest: Any) -> None:
        seen.append(layout)
        real(weights, layout, *rest)

    monkeypatch.setattr(packing, "pack_matrix", counting)
    return seen


def load(folder: Path, packs: Path, dense: str = "int8", **options: Any) -> PreTrainedModel:
    return moe_offload.load(folder, dense=dense, pack_dir=packs, **options)  # type: ignore[arg-type]


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("make", ["plain", "tied", "bf16 from f32", "fp8"])
def test_later_loads_convert_nothing(make: str, checkpoint: Checkpoints, tmp_path: Path, packed: list[Any]) -> None:
    tied = make == "tied"
    folder = fp8_checkpoint(tmp_path / "fp8") if make == "fp8" else checkpoint(
        "qwen3_moe", torch.float32, tie_word_embeddings=tied, **SIZES
    )  # fmt: skip
    dtype = torch.bfloat16 if make == "bf16 from f32" else "auto"
    first = load(folder, tmp_path / "packs", dtype=dtype)
    linears = sum(isinstance(module, PackedLinear) for module in first.modules())
    assert linears == len(packed) and linears >= 7 and isinstance(first.lm_head, PackedLinear)
    (pack,) = dense_packs_in(tmp_path / "packs")
    assert files(tmp_path / "packs") == {"pack", "verified", "lock"} and mapped(pack)
    packed.clear()
    second = load(folder, tmp_path / "packs", dtype=dtype)
    assert not packed
    assert torch.equal(logits(first), logits(second))
    assert (second.lm_head.packed.memory == first.lm_head.packed.memory).all()
    plain = type(second).from_pretrained(folder, dtype=dtype) if make != "fp8" else None
    restored = second.offload.detach().state_dict()
    if plain is not None:
        assert all(torch.equal(value, restored[name]) for name, value in plain.state_dict().items())


def test_formats_dtypes_and_experts_side_by_side(folder: Path, tmp_path: Path, packed: list[Any]) -> None:
    """One pack of experts, and one of linears for every format and for every dtype that they are rounded to."""
    wanted = [("int8", "auto"), ("int4", "auto"), ("int8", torch.bfloat16)]
    outputs = [logits(load(folder, tmp_path, dense, dtype=dtype, weights="int8")) for dense, dtype in wanted]
    stored = load(folder, tmp_path, "stored", weights="int8")
    assert stored.offload.pack == pack_in(tmp_path)
    assert len(dense_packs_in(tmp_path)) == 3
    packed.clear()
    again = [logits(load(folder, tmp_path, dense, dtype=dtype, weights="int8")) for dense, dtype in wanted]
    assert not packed
    assert all(torch.equal(*pair) for pair in zip(outputs, again, strict=True))
    assert not torch.equal(outputs[0], outputs[1])


def test_other_weights_have_another_pack(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    for shard in other.glob("*.safetensors"):
        save_file({name: value * 2 for name, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    for each in (folder, other):
        load(each, tmp_path / "packs")
    assert len(dense_packs_in(tmp_path / "packs")) == 2


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def overwrite(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [(overwrite(-1), "is damaged at"), (overwrite(8), "is of version 0"), (cut, "has .* bytes, expected")],
    ids=["byte", "version", "size"],
)
def test_what_is_damaged_is_made_again(
    folder: Path, tmp_path: Path, packed: list[Any], caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None], said: str,
) -> None:  # fmt: skip
    expected = logits(load(folder, tmp_path))
    (pack,) = dense_packs_in(tmp_path)
    content, linears = pack.read_bytes(), len(packed)
    pack.rename(tmp_path / "was")  # the model above has it mapped
    shutil.copy(tmp_path / "was", pack)
    damage(pack)
    assert torch.equal(logits(load(folder, tmp_path)), expected)
    assert len(packed) == 2 * linears and pack.read_bytes() == content
    message = caplog.records[0].getMessage()
    assert pack.name in message and "the linears are converted again" in message
    assert re.search(said, message)


def test_no_place_to_keep_them(
    folder: Path, tmp_path: Path, packed: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """They are converted in memory, to the same bits, and the user is told why at every load."""
    expected = logits(load(folder, tmp_path / "packs"))
    linears = len(packed)
    (tmp_path / "file").touch()
    told: list[tuple[str, int, int]] = []
    for again in (2, 3):
        caplog.clear()
        model = load(folder, tmp_path / "file" / "packs", progress=lambda *what: told.append(what))
        assert len(packed) == again * linears
        assert torch.equal(logits(model), expected)
        assert "are converted at every load: the converted linears (" in caplog.text and "--pack-dir" in caplog.text
    model.offload.detach()
    steps = [(done, total) for what, done, total in told if what == "converting linears"]
    assert len(steps) == 2 * linears and steps[-1][0] == steps[-1][1]


def test_a_disk_that_is_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert load(folder, tmp_path).offload.dense == "int8"
    assert "is full: the converted linears still need" in caplog.text
    assert not dense_packs_in(tmp_path)


def test_a_read_only_folder_with_the_pack_in_it(
    folder: Path, tmp_path: Path, packed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, tmp_path)
    packed.clear()
    monkeypatch.setattr(os, "open", read_only(os.open))
    load(folder, tmp_path)
    assert not packed


def test_a_killed_conversion_goes_on(folder: Path, tmp_path: Path, packed: list[Any]) -> None:
    arguments = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "packs")]
    killed = subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert files(tmp_path / "packs") == {"partial", "journal", "lock"}
    resumed = logits(load(folder, tmp_path / "packs"))
    rest = len(packed)
    assert torch.equal(resumed, logits(load(folder, tmp_path / "fresh")))
    assert 0 < rest < len(packed) - rest
    (mine,), (fresh,) = (dense_packs_in(tmp_path / name) for name in ("packs", "fresh"))
    assert mine.name == fresh.name and mine.read_bytes() == fresh.read_bytes()


def test_the_pack_is_unmapped_with_the_last_linear(folder: Path, tmp_path: Path) -> None:
    """Closing ends the engine; whoever still has a linear may unpack it."""
    model = load(folder, tmp_path)
    (pack,) = dense_packs_in(tmp_path)
    head = model.lm_head
    model.offload.detach()
    assert type(model.lm_head) is nn.Linear and mapped(pack)
    assert head.weight.abs().sum() > 0
    del head
    assert not mapped(pack)


def test_nothing_to_pack(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = load(checkpoint("qwen3_moe", hidden_size=16), tmp_path)
    assert model.offload.dense == "int8" and not dense_packs_in(tmp_path)


def test_a_zero_matrix_is_held(folder: Path, tmp_path: Path) -> None:
    """Zeros in the file mean that the format could not hold a linear; a matrix of zeros is something else."""
    zeros = tmp_path / "model"
    shutil.copytree(folder, zeros)
    for shard in zeros.glob("*.safetensors"):
        save_file({name: value * 0 for name, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    for format_ in ("int8", "int4"):
        model = load(zeros, tmp_path / "packs", format_)
        linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert len(linears) >= 7 and all(dense_conversion.is_held(each.packed.memory) for each in linears)
        assert not (model.lm_head.weight + 0).any()


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "longcat_flash", "fp8", "mxfp4"])
@pytest.mark.parametrize("tied", [False, True])
def test_convert_finds_the_linears_that_load_does(
    arch: str, tied: bool, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the model being loaded: the same linears, so that its pack is the one that is looked for."""
    if arch in ("fp8", "mxfp4"):
        folder = (fp8_checkpoint if arch == "fp8" else mxfp4_checkpoint)(tmp_path / "model")
    else:
        folder = checkpoint(arch, torch.bfloat16, tie_word_embeddings=tied, **SIZES)
    _, stored = read_stored(folder)
    options = Options(pack_dir=tmp_path / "packs")
    make_dense_pack(find_dense_pack(stored, "int4", options), stored).close()
    monkeypatch.setattr("moe_offload.dense_pack.convert_linears", None)
    model = load(folder, tmp_path / "packs", "int4")
    assert len(stored.linears) == sum(isinstance(module, PackedLinear) for module in model.modules())
