"""`moe-offload verify`: figures, exit codes, and clear words for what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moe_offload import verify_command
from moe_offload.cli import main
from moe_offload.layer_stream import LayerStream
from moe_offload.verify_reference import load_reference
from tests import cli_model

Run = Callable[..., tuple[int, str, str]]
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_experts": 4, "max_shard_size": "1MB"}
TEXT = "".join(f"line {number} of a text that is said to a model\n" for number in range(8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("verify") / "model", **SIZES)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def call(model: object, *arguments: object) -> tuple[int, str, str]:
        flags = ("--threads", 1, "--pack-dir", tmp_path / "packs", *arguments)
        code = main([str(each) for each in ("verify", model, *flags)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_table(run: Run, folder: Path, prompts: Path) -> None:
    code, out, err = run(folder, "--prompts", prompts, "--sequence-tokens", 50, "--decode-tokens", 4, "--device", "cpu")
    assert code == 0, err
    for words in (
        "experts f32", "eager experts, float32", "300 tokens in 6 sequences", "all tokens", "in prompts",
        "one by one", "largest error", "100.00 %", "perplexity, reference", "change of perplexity",
    ):  # fmt: skip
        assert words in " ".join(out.split()), words
    assert "errors are of logits" in err and "error:" not in err
    code, out, _ = run(folder, "--prompts", prompts, "--tokens", 60, "--decode-tokens", 0, "--device", "cpu")
    assert code == 0 and "60 tokens in 1 sequence " in out and "one by one" not in out


def test_json(run: Run, folder: Path, prompts: Path) -> None:
    flags = ("--prompts", prompts, "--sequence-tokens", 50, "--tokens", 120, "--json", "--device", "cpu")
    code, out, err = run(folder, *flags)
    said: dict[str, Any] = json.loads(out)
    assert (code, err) == (0, "") and said["sequences"] == 2 and said["complaints"] == []
    assert said["engine"] == {
        "weights": "f32", "dense": "stored", "activations": "auto", "dtype": "float32", "device": "cpu"
    }  # fmt: skip
    assert (said["all"]["tokens"], said["prompt"]["tokens"], said["decode"]["tokens"]) == (100, 68, 32)
    assert said["all"]["scored"] == 98 and said["all"]["max_error"] < 1e-4 and said["all"]["top1"] == 100
    again = json.loads(run(folder, *flags)[1])
    assert again["text_id"] == said["text_id"] and again["all"] == said["all"]
    other = json.loads(run(folder, *flags, "--sequence-tokens", 40)[1])
    assert other["text_id"] != said["text_id"]


def test_fewer_bits_cost_what_is_said(run: Run, folder: Path, prompts: Path) -> None:
    """Bounds are for machines: 1 where one is exceeded, and a line for each that is."""
    flags = ("--prompts", prompts, "--device", "cpu", "--weights", "int4", "--tokens", 128, "--sequence-tokens", 64)
    code, out, err = run(folder, *flags, "--json")
    said: dict[str, Any] = json.loads(out)
    assert code == 0 and said["engine"]["weights"] == "int4" and said["all"]["max_error"] > 1e-3, err
    top1, change = said["all"]["top1"], said["all"]["change"]
    assert run(folder, *flags, "--min-top1", top1, "--max-perplexity-change", max(change, 0))[0] == 0
    code, out, err = run(folder, *flags, "--max-perplexity-change", 0, "--json")
    assert code == (change > 0) and len(json.loads(out)["complaints"]) == (change > 0) == ("perplexity rises" in err)


def test_a_bound_that_is_exceeded(run: Run, folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's model is another one, which the reference knows nothing of."""
    other = cli_model.make_folder(prompts.parent / "other", seed=7, **SIZES)
    load = load_reference
    monkeypatch.setattr(verify_command, "load_reference", lambda _, **options: load(other, **options))
    flags = ("--prompts", prompts, "--device", "cpu", "--tokens", 64, "--sequence-tokens", 64)
    code, out, err = run(folder, *flags, "--max-perplexity-change", 1000000, "--min-top1", 90)
    assert code == 1 and "same first choice" in out and err.count("error:") == 1 and "--min-top1 90" in err
    code, out, err = run(folder, *flags)
    assert code == 0  # without a bound a difference is a finding, no failure


def test_logits_that_are_no_numbers(run: Run, folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Of a damaged checkpoint: the reference says so too, and it is not called agreement."""
    shutil.copytree(folder, tmp_path / "nan")
    for path in (tmp_path / "nan").glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name == "model.norm.weight":
                tensors[name].fill_(float("nan"))
        save_file(tensors, path, {"format": "pt"})
    code, out, err = run(tmp_path / "nan", "--prompts", prompts, "--tokens", 64, "--device", "cpu")
    assert (code, out) == (2, "") and "no numbers" in err and err.count("\n") == 1


def test_prompts_on_lines_and_the_default_text(run: Run, folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a"}\n{"prompt": "what is it"}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    code, out, err = run(folder, "--prompts", lines, "--json", "--device", "cpu", "--sequence-tokens", 9)
    said = json.loads(out)
    assert code == 0 and said["sequences"] == 2 and said["all"]["tokens"] == 9 + 4, err  # one has nothing to predict
    code, out, err = run(folder, "--tokens", 100, "--json", "--device", "cpu")
    assert code == 0 and json.loads(out)["text"].startswith("enum.py of Python 3."), err
    assert json.loads(out)["all"]["tokens"] == 100


def test_a_simulated_card(run: Run, folder: Path, prompts: Path) -> None:
    code, out, err = run(
        folder, "--prompts", prompts, "--json", "--tokens", 40, "--device", "virtual:p40", "--gpu-memory", "2MB",
        "--predictor", "off",
    )  # fmt: skip
    said = json.loads(out)
    assert code == 0 and "p40" in said["engine"]["device"].lower() and said["all"]["max_error"] < 1e-3, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens", 1), "--tokens 1 is out of bounds: it must be at least 2"),
        (("--sequence-tokens", 1), "--sequence-tokens 1 is out of bounds"),
        (("--sequence-tokens", 100, "--tokens", 50), "--sequence-tokens 100 is more than --tokens 50"),
        (("--sequence-tokens", 300), "context of 256"),
        (("--decode-tokens", -1), "--decode-tokens -1 is out of bounds"),
        (("--reference-dtype", "int8"), "--reference-dtype int8 is not one of auto, bf16, f16, f32"),
        (("--max-perplexity-change", -1), "0 or more"),
        (("--max-perplexity-change", "nan"), "0 or more"),
        (("--min-top1", 101), "0 to 100"),
        (("--weights", "int5"), "--weights int5"),
        (("--colour", "red"), "--colour"),
    ],
)
def test_values_out_of_bounds(run: Run, folder: Path, prompts: Path, arguments: tuple[object, ...], words: str) -> None:
    code, out, err = run(folder, "--prompts", prompts, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_text_that_cannot_be_used(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    cases: list[tuple[bytes | None, str]] = [
        (None, "cannot read the prompts"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"abc\xff", "is not UTF-8 text: byte 0xff at position 3"),
        (b"short", "fewer than 256 tokens"),
    ]
    for content, words in cases:
        if content is not None:
            path.write_bytes(content)
        code, out, err = run(folder, "--prompts", path)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"prompt": "a"}\n')
    code, out, err = run(folder, "--prompts", lines)
    assert code == 2 and "no prompt of two tokens" in err and err.count("\n") == 1


def test_models_that_cannot_be_used(run: Run, folder: Path, prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors*"))
    code, out, err = run(tmp_path / "config", "--prompts", prompts, "--sequence-tokens", 20)
    assert (code, out) == (2, "") and "safetensors" in err and err.count("\n") == 1
    code, out, err = run(tmp_path / "nowhere", "--prompts", prompts)
    assert (code, out) == (2, "") and "there is no folder" in err and err.count("\n") == 1
    code, out, err = run(folder, "--prompts", prompts, "--memory-limit", "100KB", "--sequence-tokens", 20)
    assert (code, out) == (2, "") and "largest layer need" in err and "limit given is 100 KB" in err


def test_ctrl_c(run: Run, folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place, name in ((LayerStream, "run"), (verify_command, "compare"), (verify_command, "load_reference")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupted)
            code, out, err = run(folder, "--prompts", prompts, "--tokens", 40, "--device", "cpu")
            assert (code, out, err) == (130, "", "")
    assert run(folder, "--prompts", prompts, "--tokens", 40, "--device", "cpu")[0] == 0
