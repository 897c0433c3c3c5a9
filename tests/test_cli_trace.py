"""`moe-offload trace`: a trace of a text or of prompts, gone on with, and clear words for what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_offload import tracing
from moe_offload.cli import main
from moe_offload.predictor.trace import TEST, read_trace
from tests import cli_model

Run = Callable[..., tuple[int, str, str]]
TEXT = "".join(f"line {number} of a text that is said to a model\n" for number in range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("trace") / "model", num_experts=8)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    def call(prompts: Path, output: Path, *arguments: object) -> tuple[int, str, str]:
        flags = ["--threads", 1, "--sequence-tokens", 20, "--projected", 8, *arguments]
        code = main([str(each) for each in ("trace", folder, "--prompts", prompts, "-o", output, *flags)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_text(run: Run, prompts: Path, tmp_path: Path) -> None:
    code, out, err = run(prompts, tmp_path / "t", "--note", "made up")
    assert (code, out) == (0, f"{tmp_path / 't'}\n")
    trace = read_trace(tmp_path / "t")
    whole = (len(TEXT) - 1) // 20  # a token is a byte; what is left over is left out
    assert np.diff(trace.starts).tolist() == [20] * whole and trace.info.note == "made up"
    assert f"{whole * 20} tokens in {whole} sequences (" in err and " test)" in err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["prompts.txt", "t"]

    code, out, err = run(prompts, tmp_path / "t", "--note", "made up")
    assert code == 0 and out == f"{tmp_path / 't'}\n" and "was there already" in err
    code, out, err = run(prompts, tmp_path / "t")
    assert (code, out) == (2, "") and "is there already" in err and "another with -o" in err


def test_json_new_tokens_and_a_bound(run: Run, prompts: Path, tmp_path: Path) -> None:
    code, out, err = run(prompts, tmp_path / "t", "--new-tokens", 4, "--max-tokens", 240, "--json")
    said: dict[str, Any] = json.loads(out)
    trace = read_trace(tmp_path / "t", said["model"])
    assert code == 0 and err == ""
    assert said["tokens"] == trace.experts.shape[1] <= 240 and said["sequences"] == 10 == sum(said["split"].values())
    assert (said["layers"], said["experts"], said["top_k"], said["projected"]) == (3, 8, 2, 8)
    assert said["bytes"] == (tmp_path / "t").stat().st_size and said["trace"] == str(tmp_path / "t")
    assert (trace.prompt_tokens == 20).all() and trace.generated(np.arange(24)).sum() <= 4


def test_prompts_in_lines_with_the_projections_of_a_text(run: Run, prompts: Path, tmp_path: Path) -> None:
    run(prompts, tmp_path / "t")
    lines = tmp_path / "p.jsonl"
    messages = [{"role": "user", "content": "hello"}]
    lines.write_text('{"prompt": "abc"}\n\n{"prompt": "' + "x" * 99 + '"}\n' + json.dumps({"messages": messages}))
    code, _, err = run(lines, tmp_path / "p", "--like", tmp_path / "t")
    assert code == 0, err
    trace, first = read_trace(tmp_path / "p"), read_trace(tmp_path / "t")
    assert np.diff(trace.starts).tolist() == [3, 20, 7]  # user, five bytes, assistant
    assert (trace.split == TEST).all() and np.array_equal(trace.projection, first.projection)


def test_interrupted_and_gone_on(run: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tracing._run
    batches = 0

    def stop(*arguments: Any) -> list[int]:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(tracing, "_BATCH", 4)
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "_run", stop)
        code, out, err = run(prompts, tmp_path / "t")
    assert (code, out) == (130, "") and "interrupted" in err and "goes on" in err
    assert not (tmp_path / "t").exists()
    code, _, err = run(prompts, tmp_path / "t")
    assert code == 0 and "8 of them from an earlier run" in err
    read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b" \n\n", "is empty"),
        ("p.txt", b"too short", "fewer than 20 tokens"),
        ("p.txt", b"a\xff" * 50, "is not UTF-8 text: byte 0xff at position 1"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("p.jsonl", b'\n\n{"prompt": 5}', "line 3: it needs"),
        ("p.jsonl", b'{"prompt": ""}', "line 1: it needs"),
        ("p.jsonl", b"[1]", "line 1: it needs"),
        ("p.jsonl", b'{"messages": []}', "line 1: it needs"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: it needs"),
        ("p.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("none.txt", None, "No such file"),
    ],
)
def test_prompts_that_cannot_be_used(run: Run, tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run(tmp_path / name, tmp_path / "t")
    assert (code, out) == (2, "") and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "t").exists() and not (tmp_path / "t.parts").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sequence-tokens", 1), "at least 2"),
        (("--new-tokens", -1), "at least 0"),
        (("--projected", 0), "at least 1"),
        (("--max-tokens", 19), "less than the first sequence"),
        (("--new-tokens", 250), "context of 256"),
        (("-o", "/dev/null/t"), "no folder /dev/null"),
        (("-o", "/"), "is a folder"),
        (("--like", "/none"), "there is no trace /none"),
        (("--projected", 32, "--max-tokens", 20), "do not tell"),
    ],
)
def test_wishes_that_cannot_be_had(run: Run, prompts: Path, tmp_path: Path, flags: Any, said: str) -> None:
    code, out, err = run(prompts, tmp_path / "t", *flags)
    assert (code, out) == (2, "") and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "t").exists() and not (tmp_path / "t.parts").exists()


def test_a_trace_of_another_model_is_refused(
    run: Run, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prompts, tmp_path / "t")
    monkeypatch.setattr("moe_offload.trace_command.content_key", lambda *_: "cd" * 32)
    code, _, err = run(prompts, tmp_path / "other", "--like", tmp_path / "t")
    assert code == 2 and "another model" in err
