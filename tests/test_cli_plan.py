"""`moe-offload plan`: what it prints, what it refuses, and how it measures this machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_offload import plan_calibration, plan_command, plan_program
from moe_offload.cli import main
from moe_offload.model_folder import DEMO_FOLDER
from moe_offload.plan_calibration import host_rates
from moe_offload.plan_program import ProgramTimes
from moe_offload.plan_rates import Curve, MeasuredHost, kind_of
from moe_offload.plan_sizes import ModelSizes, PlannedModel
from moe_offload.transfer import profile_file
from moe_offload.transfer.disk_rate import ReadRate
from tests import tiny_models
from tests.conftest import Checkpoints

HUGE = ("--ram", "100TB")


def fake_rates(sizes: ModelSizes, threads: int, **_: Any) -> MeasuredHost:
    curves = {kind_of(group): Curve((1, 8), (1e-5, 2e-5)) for group in sizes.groups}
    return MeasuredHost(threads, 50.0, curves, 40.0, 1e12, 20.0, 1e12, 1e-3, 1e-5, 1e-5)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command, "host_rates", fake_rates)
    monkeypatch.setattr("moe_offload.saved_profiles.card_of_this_machine", lambda memory: None)


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_models.make_config("qwen3_moe").save_pretrained(folder)
    return folder


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    content: dict[str, Any] = json.loads(captured.out)
    return content


def test_the_demo_model_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--ram", "4GB"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for part in ("verdict", "fits", "this machine", "decode", "prompt of 512", "limited by", "Assumed:", "bf16"):
        assert part in said.out, part
    assert "simulated" not in said.out and "card" not in said.out
    assert all(len(line) <= 100 for line in said.out.splitlines())


def test_a_configuration_alone_is_enough(config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(
        capsys, str(config_only), "--profile", "p40", "--weights", "int4", "--context", "100", "--batch", "3"
    )
    assert said["verdict"] == "fits" and said["changes"] == []
    assert (said["context"], said["batch"], said["weights"], said["simulated"]) == (100, 3, "int4", True)
    config = tiny_models.make_config("qwen3_moe")
    experts = config.num_hidden_layers * config.num_experts
    assert said["gpu"]["slots"] == said["expert_count"] == experts
    assert said["decode"]["tokens"] == 3 and said["prefill"]["tokens"] == 100
    for speed in (said["decode"], said["prefill"]):
        assert speed["tokens_per_second"] == pytest.approx(speed["tokens"] / speed["seconds"])
        assert speed["limit"] in speed["seconds_by_resource"]


def test_shards_are_headers_alone(checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the data of the shards replaced by holes it is the same plan."""
    folder = tmp_path / "hollow"
    shutil.copytree(checkpoint("qwen3_moe", dtype=torch.bfloat16), folder)
    for shard in folder.glob("*.safetensors"):
        size = shard.stat().st_size
        with shard.open("r+b") as file:
            file.truncate(8 + int.from_bytes(file.read(8), "little"))
            file.truncate(size)
    said = planned(capsys, str(folder), *HUGE)
    assert said["weights"] == "bf16"
    assert said["ram"]["experts"] == said["expert_bytes"]


def test_a_disk_that_is_needed_is_measured(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("qwen3_moe", dtype=torch.bfloat16))
    whole = planned(capsys, folder, *HUGE)
    ram = str(sum(size for name, size in whole["ram"].items() if name != "budget") - whole["expert_bytes"] // 2)
    monkeypatch.setattr(plan_command, "LEAST_FILE", 1)

    def disk_of(ram: str) -> tuple[float, str]:
        said = planned(capsys, folder, "--ram", ram)
        (fact,) = [each for each in said["assumptions"] if "disk of" in each]
        return said["decode"]["seconds_by_resource"].get("disk", 0.0), fact

    for rate, direct, known in ((5e9, True, "5 GB/s, measured"), (1e9, False, "2.6 GB/s, assumed")):
        monkeypatch.setattr(plan_command, "measure_read", lambda *_, r=rate, d=direct: ReadRate(r, 1 << 30, 0.2, d))
        seconds, fact = disk_of(ram)
        assert fact == f"a disk of {known}"
        assert seconds > 0
        assert disk_of("100TB") == (0.0, "a disk of 2.6 GB/s, assumed")

    def broken(*_: object) -> ReadRate:
        raise OSError("gone")

    monkeypatch.setattr(plan_command, "measure_read", broken)
    assert disk_of(ram)[1] == "a disk of 2.6 GB/s, assumed"


def test_what_does_not_fit_is_said_with_what_would(config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config_only), "--ram", "1MB"]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said and "the host lacks" in said and "more memory (--ram " in said
    assert "decode" not in said
    small = planned(capsys, str(config_only), "--profile", "t4", "--gpu-memory", "10KB")
    assert small["verdict"] == "does not fit" and small["decode"] is None and small["gpu"]["lacking"] > 0
    assert any("the CPU alone" in each for each in small["changes"])


def test_the_amount_proposed_is_enough(config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, str(config_only), "--ram", "1MB")
    (more,) = [each for each in said["changes"] if "--ram " in each]
    size = more.partition("--ram ")[2].rstrip(")")
    assert planned(capsys, str(config_only), "--ram", size)["verdict"] == "fits"


def test_a_saved_profile_is_found(
    config_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.test_cli_profiles import cardless, saved

    monkeypatch.setattr(profile_file, "profile_folder", lambda: tmp_path / "profiles")
    for profile in (saved("mine"), cardless("bare")):
        profile_file.write_profile(profile)
    said = planned(capsys, str(config_only), "--profile", "mine")
    assert said["server"] == "mine" and not said["simulated"] and said["gpu"] is not None
    assert planned(capsys, str(config_only), "--profile", "bare")["gpu"] is None
    assert main(["plan", str(config_only), "--profile", "bare", "--gpu-memory", "1GB"]) == 2
    assert "bare has no card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu-memory", "0"), "--gpu-memory 0 is out of bounds"),
        (("--gpu-memory", "6GB"), "no usable card here"),
        (("--gpu-memory", "99GB", "--profile", "p40"), "more than the card of p40 has"),
        (("--ram", "-1"), "--ram -1 is no size"),
        (("--ram", "10PB"), "--ram 10PB is no size"),
        (("--ram", "10000TB"), "--ram of 10000 TB is out of bounds"),
        (("--context", "0"), "--context 0 is out of bounds: give from 1 to 256"),
        (("--context", "1000000"), "--context 1000000 is out of bounds"),
        (("--batch", "0"), "--batch 0 is out of bounds"),
        (("--threads", "0"), "--threads 0 is out of bounds"),
        (("--threads", "2", "--profile", "p40"), "leave them out"),
        (("--measure", "--profile", "p40"), "leave them out"),
        (("--profile", "p4"), "did you mean p40"),
        (("--profile", ""), "no virtual server ''"),
        (("--weights", "int5"), "int5 is not one of"),
        (("--weights", "mxfp4"), "stored as f32"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], said: str, config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config_only), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_models_that_cannot_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    dense = tmp_path / "dense"
    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2).save_pretrained(dense)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "abacus"}')
    for model in (dense, unknown, tmp_path / "nothing"):
        assert main(["plan", str(model), "--profile", "p40"]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("arch", ["deepseek_v2", "gpt_oss", "qwen3_next", "mixtral", "jamba", "llama4_text"])
def test_other_architectures(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.make_config(arch).save_pretrained(tmp_path)
    for server in (("--profile", "gtx1080ti"), HUGE):
        said = planned(capsys, str(tmp_path), *server)
        assert said["verdict"] == "fits" and said["decode"]["tokens_per_second"] > 0


def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really, in little time; the second time they come from the file, and a file that is damaged is replaced."""
    monkeypatch.setattr(plan_calibration, "SECONDS", 0.01)
    monkeypatch.setattr(plan_calibration, "ROWS", (1, 4))
    monkeypatch.setattr(plan_calibration, "_MIB", 4)
    monkeypatch.setattr(plan_calibration, "_READ_MIB", 16)
    monkeypatch.setattr(plan_calibration, "_TORCH", (64, 64))
    monkeypatch.setattr(plan_calibration, "measure_program", lambda threads, report: ProgramTimes(1e-3, 1e-5, 1e-5))
    sizes = PlannedModel(DEMO_FOLDER).sizes("bf16")
    first = host_rates(sizes, 1, folder=tmp_path)
    assert set(first.curves) == {"bf16 256x64"} and first.threads == 1 and first.step == 1e-3
    (curve,) = first.curves.values()
    assert curve.rows == (1, 4) and 0 < curve.seconds[0] <= curve.seconds[1]
    assert min(first.read_gbs, first.linear_gbs, first.linear_flops, first.torch_gbs, first.torch_flops) > 0
    (file,) = tmp_path.iterdir()
    assert host_rates(sizes, 1, folder=tmp_path) == first
    again = host_rates(sizes, 1, folder=tmp_path, measure=True)
    assert again != first and host_rates(sizes, 1, folder=tmp_path) == again
    monkeypatch.setattr(plan_calibration, "measure_host", lambda groups, threads, report: first)
    for damage in ("", "{}", "[]", file.read_text().replace('"read_gbs": ', '"read_gbs": -'), "null"):
        file.write_text(damage)
        assert host_rates(sizes, 1, folder=tmp_path) == first
        assert json.loads(file.read_bytes())["host"]["read_gbs"] > 0


def test_the_programs_own_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_program, "_TOKENS", 3)
    monkeypatch.setattr(plan_program, "_REPEATS", 1)
    times = plan_program.measure_program(1, lambda what, share: None)
    assert 0 < times.layer < times.step and times.module > 0
