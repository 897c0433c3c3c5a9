"""`moe-offload info`: what it says agrees with the model, and nothing is loaded for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_offload.cli import main
from moe_offload.memory import Memory
from moe_offload.report import fit
from moe_offload.report_table import count
from tests import cli_model, tiny_models
from tests.conftest import Checkpoints

Info = Callable[..., str]


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str]) -> Info:
    def call(model: Path | str, *flags: str) -> str:
        assert main(["info", str(model), *flags]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return call


def described(info: Info, model: Path | str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(info(model, "--json"))
    return content


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_moe", "nemotron_h"])
def test_figures_are_those_of_the_model(arch: str, info: Info, checkpoint: Checkpoints) -> None:
    folder = checkpoint(arch)
    said = described(info, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert said["total_params"] == sum(p.numel() for p in model.parameters())
    assert said["architecture"] == type(model).__name__
    assert said["layers"] == model.config.num_hidden_layers
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())  # buffers are stored as well
    assert said["stored"]["bytes"] == stored
    assert said["stored"]["format"] == "f32"
    assert said["stored"]["bytes"] == said["stored"]["expert_bytes"] + said["stored"]["non_expert_bytes"]
    assert 0 < said["active_params"] < said["total_params"]


def test_formats(info: Info, checkpoint: Checkpoints) -> None:
    said = described(info, checkpoint("qwen3_moe", dtype=torch.bfloat16))
    sizes = {each["format"]: each for each in said["formats"]}
    assert list(sizes) == ["bf16", "int8", "int4", "mxfp4"]
    assert sizes["bf16"]["expert_bytes"] == 2 * said["expert_params"] == said["stored"]["expert_bytes"]
    assert sizes["int4"]["expert_bytes"] == pytest.approx(said["expert_params"] * 4.5 / 8)
    share = said["experts_per_token"] / said["experts"]
    for each in sizes.values():
        assert each["bytes_per_token"] == pytest.approx(each["expert_bytes"] * share, rel=0.01)
        assert each["fit"] == "fits"


def test_no_weight_is_read(info: Info, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """The data of the shards replaced by holes: only headers can have been read."""
    folder = cli_model.copied(checkpoint("qwen3_moe"), tmp_path / "hollow")
    expected = described(info, checkpoint("qwen3_moe"))
    for shard in folder.glob("*.safetensors"):
        size = shard.stat().st_size
        with shard.open("r+b") as file:
            file.truncate(8 + int.from_bytes(file.read(8), "little"))
            file.truncate(size)
    volatile = ("model", "folder", "memory_available", "formats")
    assert _without(described(info, folder), volatile) == _without(expected, volatile)


def _without(content: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def test_configuration_alone(info: Info, tmp_path: Path) -> None:
    tiny_models.make_config("qwen3_moe").save_pretrained(tmp_path)
    assert described(info, tmp_path)["stored"] is None
    assert "only the configuration" in info(tmp_path)


def test_table(info: Info, checkpoint: Checkpoints) -> None:
    text = info(checkpoint("deepseek_v3"))
    for part in (
        "DeepseekV3ForCausalLM", "3, 2 of them with experts", "2 per token", "shared experts", "f32 (stored)",
        "int8", "8.5", "mxfp4", "read per token", "fits", "This machine has",
    ):  # fmt: skip
        assert part in text, part
    assert all(len(line) <= 100 for line in text.splitlines())


def test_demo(info: Info) -> None:
    said = described(info, "demo")
    assert said["model"] == "demo" and said["stored"]["bytes"] < 16_000_000


GB = 10**9


@pytest.mark.parametrize(
    ("experts", "others", "expected"),
    [
        (4, 1, "fits"),
        (9, 1, "fits, but not with what is free now"),
        (90, 1, "runs from disk"),
        (90, 8, "runs from disk"),
        (1, 17, "does not fit"),
    ],
)
def test_fit(experts: int, others: int, expected: str) -> None:
    assert fit(experts * GB, others * GB, Memory(total=16 * GB, available=6 * GB)) == expected


def test_counts_are_readable() -> None:
    assert [count(n) for n in (512, 49_152, 6_980_000, 30_532_122_624, 10**12)] == [
        "512", "49,152", "6.98 million", "30.5 billion", "1 trillion",
    ]  # fmt: skip
