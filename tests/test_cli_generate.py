"""`moe-offload generate` with a tiny model: what it prints where, and that the flags do what they say."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_offload.cli import main
from tests import cli_model

Run = Any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("-p", "hi", ..., stdin=b"...") -> (exit code, stdout, stderr)."""

    def call(*arguments: str, stdin: bytes = b"", model: Path = folder) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["generate", str(model), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_text_on_stdout_figures_on_stderr(run: Run) -> None:
    code, out, err = run("-p", "hello", "--greedy", "--max-new-tokens", "9")
    assert code == 0
    assert out.endswith("\n") and len(out) > 1
    line = err.strip()
    assert "\n" not in line
    for part in ("first token ", "prefill ", "decode ", "tok/s", " of experts read", "stopped at 9 tokens"):
        assert part in line


def test_same_tokens_as_transformers(run: Run, folder: Path) -> None:
    _, out, _ = run("-p", "hello", "--greedy", "--max-new-tokens", "12", "--json")
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    tokenizer = cli_model.make_tokenizer()
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert json.loads(out)["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_prompt_from_anywhere(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("hello there\n")
    flags = ("--greedy", "--max-new-tokens", "6")
    expected = run("-p", "hello there", *flags)[1]
    assert run("--prompt-file", str(file), *flags)[1] == expected
    assert run(*flags, stdin=b"hello there\n")[1] == expected
    assert run(*flags, stdin=b"hello there\r\n")[1] == expected


def test_same_seed_same_text(run: Run) -> None:
    flags = ("-p", "hello", "--temperature", "2", "--max-new-tokens", "24")
    texts = [run(*flags, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_reported_seed_repeats_the_text(run: Run) -> None:
    flags = ("-p", "hello", "--temperature", "2", "--max-new-tokens", "16", "--json")
    first = json.loads(run(*flags)[1])
    again = json.loads(run(*flags, "--seed", str(first["seed"]))[1])
    assert first["text"] == again["text"]


def test_temperature_0_is_greedy(run: Run) -> None:
    flags = ("-p", "hello", "--max-new-tokens", "8", "--json")
    by_flag, by_zero = (json.loads(run(*flags, *how)[1]) for how in (("--greedy",), ("--temperature", "0")))
    assert by_flag["text"] == by_zero["text"]
    assert by_flag["seed"] is None


@pytest.mark.parametrize("flag", [("--top-k", "1"), ("--top-p", "0.0001"), ("--min-p", "1")])
def test_strictest_sampling_is_greedy(run: Run, flag: tuple[str, str]) -> None:
    flags = ("-p", "hello", "--max-new-tokens", "8")
    assert run(*flags, "--temperature", "5", *flag)[1] == run(*flags, "--greedy")[1]


def test_json_has_everything(run: Run, folder: Path) -> None:
    code, out, err = run("-p", "hello", "--max-new-tokens", "5", "--json", "--threads", "2", "--seed", "7")
    result = json.loads(out)
    assert code == 0 and err == ""
    assert list(result) == [
        "model", "prompt_tokens", "new_tokens", "text", "finish_reason", "seed", "ttft_s", "prefill_tokens_per_s",
        "decode_tokens_per_s", "expert_gb_per_s", "expert_bytes_read", "load_s", "threads", "weights", "device",
    ]  # fmt: skip
    assert result["model"] == str(folder)
    assert (result["prompt_tokens"], result["new_tokens"]) == (5, 5)
    assert (result["finish_reason"], result["threads"], result["weights"]) == ("length", 2, "f32")
    assert result["ttft_s"] > 0 and result["decode_tokens_per_s"] > 0
    assert result["expert_bytes_read"] > 0 and result["load_s"] > 0


def test_chat_puts_the_prompt_into_the_template(run: Run) -> None:
    plain = json.loads(run("-p", "hi", "--max-new-tokens", "2", "--json")[1])
    chat = json.loads(run("-p", "hi", "--chat", "--max-new-tokens", "2", "--json")[1])
    assert chat["prompt_tokens"] == plain["prompt_tokens"] + 2  # <|user|> and <|assistant|>


def test_end_of_sequence_stops(run: Run, folder: Path, tmp_path: Path) -> None:
    copy = cli_model.copied(folder, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(copy)
    ids = cli_model.make_tokenizer()("hello", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = int(model(ids).logits[0, -1].argmax())
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first]}))
    code, out, err = run("-p", "hello", "--greedy", model=copy)
    assert code == 0 and "stopped" not in err and err.strip().endswith("1 token")


def test_answer_is_limited_to_the_context(run: Run) -> None:
    code, out, err = run("-p", "hello", "--greedy", "--max-new-tokens", "9999", "--json")
    result = json.loads(out)
    assert code == 0 and result["prompt_tokens"] + result["new_tokens"] <= cli_model.CONTEXT
    assert err.startswith("note: ") and "251" in err and "256" in err


def test_prompt_that_fills_the_context_but_one(run: Run) -> None:
    out = run("-p", "x" * 255, "--greedy", "--json")[1]
    assert json.loads(out)["new_tokens"] == 1


def test_special_tokens_are_not_printed(run: Run) -> None:
    _, out, _ = run("-p", "hello", "--temperature", "1000", "--seed", "3", "--max-new-tokens", "200")
    assert not any(token in out for token in cli_model.SPECIAL)


def test_dtype_and_attention(run: Run) -> None:
    for flags in (("--dtype", "bf16"), ("--attn-implementation", "eager"), ("--weights", "f32")):
        code, out, err = run("-p", "hello", "--max-new-tokens", "2", "--greedy", *flags)
        assert code == 0 and out, err
