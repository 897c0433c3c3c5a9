"""`moe-offload convert`, and what the other commands make of its packs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_offload.cli import main
from moe_offload.progress import _pace
from tests import cli_model
from tests.pack_cases import SIZES, dense_packs_in, files, pack_in

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = dict(SIZES)
    return cli_model.make_folder(tmp_path_factory.mktemp("convert") / "model", **sizes)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(each) for each in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_convert_then_generate(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = tmp_path / "new" / "packs"
    code, out, err = run("convert", folder, "-o", packs, "--weights", "int4")
    (dense,) = dense_packs_in(packs)
    assert code == 0 and out == f"{pack_in(packs)}\n{dense}\n"
    figures = r"\d.* [KM]B from \d.* in \d.* s \(.* GB/s\), checked\n"
    assert re.fullmatch(rf"int4, {figures}other linears: int8, {figures}", err)

    monkeypatch.setattr("moe_offload.packs.convert", None)  # nothing is converted from here on
    monkeypatch.setattr("moe_offload.dense_pack.convert_linears", None)
    code, out, err = run("convert", folder, "-o", packs, "--weights", "int4")
    assert code == 0 and err.count("was there already; checked") == 2
    code, out, _ = run(
        "generate", folder, "-p", "hi", "--weights", "int4", "--pack-dir", packs, "--activations", "f32",
        "--max-new-tokens", 2, "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["weights"] == "int4"
    assert files(packs) == {"pack", "verified", "lock"}


def test_json(run: Run, folder: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", folder, "-o", tmp_path, "--weights", "int8", "--json", "--threads", 1)
    said: dict[str, Any] = json.loads(out)
    path = pack_in(tmp_path)
    assert code == 0 and err == ""
    assert said["pack"] == str(path) and said["bytes"] == path.stat().st_size
    assert (said["weights"], said["stored_as"], said["was_there"]) == ("int8", "f32", False)
    (dense,) = dense_packs_in(tmp_path)
    assert said["dense"] == said["dense"] | {
        "pack": str(dense), "weights": "int8", "bytes": dense.stat().st_size, "was_there": False,
    }  # fmt: skip


def test_info_says_what_is_there(run: Run, folder: Path, tmp_path: Path) -> None:
    _, out, _ = run("info", folder, "--pack-dir", tmp_path)
    assert "int8 would need" in out and "weights auto" in out and "as stored" in out
    assert not any(tmp_path.iterdir())
    run("convert", folder, "-o", tmp_path, "--weights", "int8")
    _, out, _ = run("info", folder, "--pack-dir", tmp_path)
    assert "int8 here" in out and "int4 would need" in out
    said = json.loads(run("info", folder, "--pack-dir", tmp_path, "--json")[1])
    assert said["packs"][0] == {
        "format": "int8", "bytes": pack_in(tmp_path).stat().st_size, "path": str(pack_in(tmp_path)),
    }  # fmt: skip
    assert said["auto"] == "f32" and said["pack_dir"] == str(tmp_path)
    little = json.loads(run("info", folder, "--pack-dir", tmp_path, "--memory-limit", "10MB", "--json")[1])
    assert little["auto"] == "int8"


def test_nothing_to_convert(run: Run, folder: Path, tmp_path: Path) -> None:
    for weights, why in (("auto", "f32, as stored: its"), ("f32", "f32 is how they are stored")):
        code, out, err = run("convert", folder, "-o", tmp_path, "--weights", weights)
        assert (code, out) == (2, "")
        assert f"error: there is nothing to convert ({why}" in err and "--weights int8 or int4" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--weights", "int3"), "--weights int3 is not one of auto"),
        (("--weights", "bf16"), "stored as f32: give that, 'int8', 'int4' or 'auto'"),
        (("--threads", "0"), "--threads 0"),
        (("--weights", "int8", "-o", "/dev/null/packs"), "cannot be kept in /dev/null/packs"),
    ],
)
def test_mistakes(run: Run, folder: Path, flags: tuple[str, ...], said: str) -> None:
    code, out, err = run("convert", folder, *flags)
    assert (code, out) == (2, "") and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_activations_are_checked(run: Run, folder: Path) -> None:
    code, _, err = run("generate", folder, "-p", "hi", "--activations", "int4")
    assert code == 2 and "--activations int4 is not one of auto, int16" in err


def test_auto_is_stated(run: Run, folder: Path, tmp_path: Path) -> None:
    _, _, err = run(
        "generate", folder, "-p", "hi", "--max-new-tokens", 1, "--pack-dir", tmp_path, "--memory-limit", "10MB"
    )
    assert re.search(r"note: weights: int8, .* as stored \(f32\) the model needs", err)


def test_pace_in_bytes() -> None:
    assert _pace(2e9, 10e9, "bytes", 4.0) == "2.0 GB of 10.0 GB, 0.5 GB/s, 16 s left"
