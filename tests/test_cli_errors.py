"""Bad input through the command line: one clear line on stderr, exit code 2, nothing left behind."""

import gc
import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_offload.cli import main
from moe_offload.memory import detect_memory
from tests import cli_model, tiny_models

Damage = Callable[[Path], None]
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
OTHER = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("errors") / "model")


@pytest.fixture
def fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., str]:
    """Runs a command that must fail, and returns the message. Checks everything that holds for all of them."""

    def call(*arguments: str, stdin: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir(exist_ok=True)
        before = {path for path in tmp_path.rglob("*")}
        threads = set(threading.enumerate())
        files = _open_files()
        assert main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(r"error: [^\n]+\n", captured.err), captured.err
        assert "Traceback" not in captured.err and len(captured.err) < 700
        assert {path for path in tmp_path.rglob("*")} == before
        assert {t for t in set(threading.enumerate()) - threads if t.name.startswith("moe-offload")} == set()
        if any(name.endswith(".safetensors") for name in _open_files() - files):
            gc.collect()  # a model is a cycle, and safetensors maps what transformers loaded
        assert not [f for f in _open_files() - files if f.endswith(".safetensors")]
        return captured.err.removeprefix("error: ").strip()

    return call


def _open_files() -> set[str]:
    """Files open or mapped by this process."""
    opened = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            opened.add(os.readlink(entry))
        except OSError:  # the listing's own descriptor
            pass
    maps = Path("/proc/self/maps").read_text().splitlines()
    return opened | {line.split(None, 5)[5] for line in maps if len(line.split(None, 5)) == 6}


def header_edit(tensor: str, **changes: Any) -> Damage:
    """Say something else of `tensor` in its shard's header."""

    def damage(folder: Path) -> None:
        path = cli_model.shard_of(folder, tensor)
        header, data = cli_model.read_shard(path)
        for key, value in changes.items():
            header[tensor][key] = value(header[tensor][key]) if callable(value) else value
        cli_model.write_shard(path, header, data)

    return damage


def json_edit(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_bytes())
        (folder / name).write_text(json.dumps(content | changes))

    return damage


def replaced(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def removed(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def shard_removed(folder: Path) -> None:
    cli_model.shard_of(folder, EXPERT).unlink()


def shard_truncated(folder: Path) -> None:
    path = cli_model.shard_of(folder, EXPERT)
    os.truncate(path, path.stat().st_size - 100)


def shard_empty(folder: Path) -> None:
    os.truncate(cli_model.shard_of(folder, EXPERT), 0)


def shard_is_a_folder(folder: Path) -> None:
    path = cli_model.shard_of(folder, EXPERT)
    path.unlink()
    path.mkdir()


def index_names_missing(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["weight_map"]["model.nothing"] = index["weight_map"][OTHER]
    path.write_text(json.dumps(index))


def tensor_removed(tensor: str) -> Damage:
    def damage(folder: Path) -> None:
        path = cli_model.shard_of(folder, tensor)
        header, data = cli_model.read_shard(path)
        begin, end = header.pop(tensor)["data_offsets"]
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [n - (end - begin) for n in entry["data_offsets"]]
        cli_model.write_shard(path, header, data[:begin] + data[end:])
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_bytes())
        del content["weight_map"][tensor]
        index.write_text(json.dumps(content))

    return damage


def length_prefix(value: int) -> Damage:
    def damage(folder: Path) -> None:
        with cli_model.shard_of(folder, EXPERT).open("r+b") as file:
            file.write(value.to_bytes(8, "little"))

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing shard": (shard_removed, "shard model-00"),
    "truncated shard": (shard_truncated, "truncated"),
    "empty shard": (shard_empty, "0 bytes"),
    "shard is a folder": (shard_is_a_folder, "missing"),
    "header length beyond the file": (length_prefix(1 << 40), "header claims"),
    "header length too small": (length_prefix(20), "not valid JSON"),
    "offsets beyond the file": (header_edit(EXPERT, data_offsets=[0, 1 << 50]), "claims bytes"),
    "offsets overlap": (header_edit(EXPERT, data_offsets=[0, 3072]), "overlap|hole"),
    "offsets swapped": (header_edit(EXPERT, data_offsets=lambda o: o[::-1]), "claims bytes"),
    "negative offset": (header_edit(EXPERT, data_offsets=[-8, 3064]), "data_offsets"),
    "size does not fit shape": (header_edit(EXPERT, shape=[32, 23]), "needs .* bytes"),
    "unknown dtype": (header_edit(EXPERT, dtype="F31"), "F31"),
    "expert of the wrong shape": (header_edit(EXPERT, shape=lambda s: s[::-1]), r"expected F32 \[32, 24\]"),
    "expert of integers": (header_edit(EXPERT, dtype="I32"), "I32"),
    "expert of half the dtype": (
        header_edit(EXPERT, dtype="BF16", shape=lambda s: [s[0], 2 * s[1]]), "BF16"
    ),
    "other tensor of the wrong shape": (header_edit(OTHER, shape=[16, 64]), r"\[16, 64\].*\[32, 32\]"),
    "other tensor of integers": (header_edit(OTHER, dtype="I32"), "I32"),
    "norm of integers": (header_edit(NORM, dtype="U32"), "U32"),
    "norm of bytes": (header_edit(NORM, dtype="F8_E4M3", shape=lambda s: [4 * s[0]]), "F8_E4M3"),
    "expert not in the checkpoint": (tensor_removed(EXPERT), "down_proj"),
    "other tensor not in the checkpoint": (tensor_removed(OTHER), OTHER),
    "index names a missing tensor": (index_names_missing, "model.nothing"),
    "index is no JSON": (replaced("model.safetensors.index.json", b"{"), "index.json is not valid"),
    "index leaves the folder": (
        json_edit("model.safetensors.index.json", weight_map={"a": "../x.safetensors"}), "file name"
    ),
    "no config": (removed("config.json"), "no config.json"),
    "config is no JSON": (replaced("config.json", b'{"model_type": '), "cannot be read"),
    "config is a list": (replaced("config.json", b"[]"), "model_type"),
    "config is nested": (replaced("config.json", b"[" * 100_000), "cannot be read"),
    "config of an unknown model": (json_edit("config.json", model_type="nope"), "nope"),
    "config with a word for a number": (json_edit("config.json", hidden_size="x"), "hidden_size"),
    "config with more layers": (json_edit("config.json", num_hidden_layers=5), "layers.3"),
    "config with fewer words": (json_edit("config.json", vocab_size=100), "lm_head|embed_tokens"),
    "config without heads": (json_edit("config.json", num_attention_heads=0), "transformers|divi"),
    "config with a negative size": (json_edit("config.json", hidden_size=-1), "transformers"),
    "quantised in another way": (
        json_edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"
    ),
    "sampling defaults out of bounds": (
        json_edit("generation_config.json", do_sample=True, temperature="x"), "temperature 'x'"
    ),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "half a tokenizer": (removed("tokenizer.json"), "tokenizer"),
    "tokenizer is no JSON": (replaced("tokenizer.json", b"{"), "tokenizer"),
    "tokenizer is another JSON": (replaced("tokenizer.json", b'{"model": {}}'), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model(name: str, folder: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    damage, message = DAMAGES[name]
    damaged = cli_model.copied(folder, tmp_path / "damaged")
    damage(damaged)
    assert re.search(message, fails("generate", str(damaged), "-p", "hi", "--max-new-tokens", "2"))


FLAGS = {
    ("--temperature", "nan"): "nan.*between 0.001 and 1000",
    ("--temperature", "inf"): "inf",
    ("--temperature", "-1"): "-1",
    ("--temperature", "warm"): "--temperature",
    ("--top-p", "nan"): "nan.*at most 1",
    ("--top-p", "1.5"): "1.5.*at most 1",
    ("--top-p", "0"): "more than 0",
    ("--top-k", "-1"): "-1.*at least 0",
    ("--top-k", "2.5"): "--top-k",
    ("--min-p", "inf"): "between 0 and 1",
    ("--repetition-penalty", "nan"): "between 0.1 and 10",
    ("--repetition-penalty", "0"): "between 0.1 and 10",
    ("--seed", "-3"): "-3",
    ("--seed", str(2**64)): "between",
    ("--max-new-tokens", "0"): "at least 1",
    ("--greedy", "--temperature", "0.5"): "one or the other",
    ("--threads", "0"): "--threads 0.*at least 1",
    ("--weights", "int3"): "int3.*bf16",
    ("--weights", "bf16"): "stored as f32",
    ("--dtype", "int8"): "int8.*bf16",
    ("--memory-limit", "lots"): "8GB",
    ("--memory-limit", "0"): "1 byte",
    ("--memory-limit", "9" * 400 + "TB"): "8 EiB",
    ("--memory-limit", "20KB"): "need .* KB of memory, but the limit given is 20.0 KB",
    ("--attn-implementation", "nothing"): "nothing",
    ("--tempature", "1"): "--tempature",
    ("--prompt-file", "/nowhere/x"): "/nowhere/x",
    ("--prompt", "again", "--prompt-file", "x"): "exclude each other",
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags)[:40])
def test_bad_flag(flags: tuple[str, ...], folder: Path, fails: Callable[..., str]) -> None:
    prompt = () if "--prompt-file" in flags else ("-p", "hi")
    assert re.search(FLAGS[flags], fails("generate", str(folder), *prompt, *flags))


def test_prompts_that_are_none(folder: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"\x80abc")
    assert "empty" in fails("generate", str(folder), "-p", "")
    assert "empty" in fails("generate", str(folder), stdin=b"")
    assert "empty" in fails("generate", str(folder), stdin=b"\n")
    assert "UTF-8" in fails("generate", str(folder), stdin=b"ab\xff\xfe\x00")
    assert "byte 0x80 at position 0" in fails("generate", str(folder), "--prompt-file", str(file))
    assert "UTF-8" in fails("generate", str(folder), "-p", "a\udcff")


def test_prompt_longer_than_the_context(folder: Path, fails: Callable[..., str]) -> None:
    message = fails("generate", str(folder), "-p", "x" * 300)
    assert "300" in message and "256" in message
    assert "256 tokens" in fails("generate", str(folder), "-p", "x" * 256)


def test_models_that_are_none(folder: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    for command in (("generate", "-p", "hi"), ("chat",), ("info",)):
        name, *rest = command
        assert "/nowhere/model" in fails(name, "/nowhere/model", *rest)
        assert "is a file" in fails(name, str(folder / "config.json"), *rest)
        assert "no config.json" in fails(name, str(tmp_path), *rest)
        assert "empty" in fails(name, "", *rest)


def test_name_that_the_hub_has_not(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    message = fails("generate", "someone/nothing-of-that-name", "-p", "hi")
    assert "someone/nothing-of-that-name" in message and "Name or service not known" in message


def test_dense_model(tmp_path: Path, fails: Callable[..., str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    dense = tmp_path / "dense"
    LlamaForCausalLM(config).save_pretrained(dense)
    cli_model.make_tokenizer().save_pretrained(dense)
    for command in (("generate", "-p", "hi"), ("chat",), ("info",)):
        name, *rest = command
        assert "llama" in fails(name, str(dense), *rest).lower()


def test_tokenizer_of_another_model(folder: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    model = tiny_models.build("qwen3_moe", vocab_size=64, num_hidden_layers=1)
    tiny_models.save(model, tmp_path / "model")
    cli_model.make_tokenizer().save_pretrained(tmp_path / "model")
    assert "another model" in fails("generate", str(tmp_path / "model"), "-p", "zzz")


def test_no_chat_template(tmp_path: Path, fails: Callable[..., str]) -> None:
    plain = cli_model.make_folder(tmp_path / "plain", template=None)
    assert "moe-offload generate" in fails("chat", str(plain), stdin=b"hi\n")
    assert "moe-offload generate" in fails("generate", str(plain), "-p", "hi", "--chat")


def test_chat_template_that_fails(tmp_path: Path, fails: Callable[..., str]) -> None:
    odd = cli_model.make_folder(tmp_path / "odd", template="{{ raise_exception('only poems') }}")
    assert "only poems" in fails("generate", str(odd), "-p", "hi", "--chat")
    broken = cli_model.make_folder(tmp_path / "broken", template="{% for %}")
    assert "template" in fails("generate", str(broken), "-p", "hi", "--chat")


def test_non_expert_weights_larger_than_memory(tmp_path: Path, fails: Callable[..., str]) -> None:
    """A real checkpoint whose embedding is a hole in a sparse file: nothing of it may be read to find out."""
    rows = detect_memory().total // (32 * 2) + 1_000_000
    small = cli_model.make_folder(tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    json_edit("config.json", vocab_size=rows)(small)
    with (small / "model-embedding.safetensors").open("wb") as file:
        nbytes = rows * 32 * 2
        entry = {name: {"dtype": "BF16", "shape": [rows, 32], "data_offsets": [0, nbytes]}}
        text = json.dumps(entry).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)
    tensor_removed(name)(small)
    index = small / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    content["weight_map"][name] = "model-embedding.safetensors"
    index.write_text(json.dumps(content))
    message = fails("generate", str(small), "-p", "hi")
    assert re.search(r"non-expert weights need \d+(\.\d)? GB of memory, but \d+(\.\d)? GB are free", message)


def test_unknown_command(fails: Callable[..., str]) -> None:
    assert "generat" in fails("generat", "demo")


def test_missing_argument(fails: Callable[..., str]) -> None:
    assert "MODEL" in fails("generate", "-p", "hi")


@pytest.mark.parametrize("command", [("generate", "-p", "x"), ("bench",), ("verify",), ("plan",), ("info",)])
def test_a_dense_model_is_called_one_whatever_else_is_missing(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2}
    sizes = {"intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    assert main([command[0], str(tmp_path), *command[1:]]) != 0
    said = capsys.readouterr().err
    assert said.startswith("error: 'llama' is a dense model") and said.count("\n") == 1
