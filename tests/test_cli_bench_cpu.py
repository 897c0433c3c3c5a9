"""`moe-offload bench-cpu`: what it prints, and what it says of mistakes and of an interruption."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from moe_offload import bench_cpu_command
from moe_offload.bench_cpu import ColdExperts, CpuBench, ExpertFormat, random_expert, tier_name
from moe_offload.cli import main
from moe_offload.cpu_kernels.bandwidth import ReadLimit
from moe_offload.cpu_kernels.packing import unpack_matrix
from moe_offload.cpu_kernels.target import current_target

SMALL = ("bench-cpu", "--shape", "64,96", "--threads", "1")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu_command, "SECONDS", 0.01)
    monkeypatch.setattr(bench_cpu_command, "MOST_MIB", 16)


def test_a_table_for_eyes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert tier_name(current_target()) in said.out
    assert "GB/s" in said.out and "64 x 96" in said.out
    for name in bench_cpu_command.FORMATS:
        assert f" {name} " in said.out


def test_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["threads"] == 1 and said["complete"] and said["read_gb_per_s"] > 0
    assert [each["format"] for each in said["kernels"]] == list(bench_cpu_command.FORMATS)
    for each in said["kernels"]:
        assert each["share"] == pytest.approx(each["read_gb_per_s"] / said["read_gb_per_s"])
        assert each["gop_per_s"] > 0


@pytest.mark.parametrize("rounds", [0, 1])
def test_interrupted_it_shows_what_there_is(
    rounds: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = 0
    sample = ReadLimit.sample

    def interrupt(limit: ReadLimit) -> None:
        nonlocal sampled
        if sampled == rounds:
            raise KeyboardInterrupt
        sampled += 1
        sample(limit)

    monkeypatch.setattr(ReadLimit, "sample", interrupt)
    assert main([*SMALL, "--json"]) == 130
    said = capsys.readouterr()
    assert "stopped early" in said.err
    content = json.loads(said.out)
    assert not content["complete"]
    assert all((each["share"] is None) == (rounds == 0) for each in content["kernels"])


@pytest.mark.parametrize(
    "arguments", [("--shape", "2048"), ("--shape", "0,768"), ("--shape", "a,b"), ("--threads", "-1")]
)
def test_mistakes(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-cpu", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_formats() -> None:
    for text in ("int4", "int8:128", "bf16-transposed", "mxfp4"):
        assert str(ExpertFormat.parse(text)) == text
    for text in ("int5", "int4:x", ""):
        with pytest.raises(ValueError, match="no format"):
            ExpertFormat.parse(text)
    with pytest.raises(ValueError, match="one layout"):
        ExpertFormat.parse("int4-transposed").kernel(64, 64)


@pytest.mark.parametrize("name", bench_cpu_command.FORMATS)
def test_random_experts_are_sound(name: str) -> None:
    record = ExpertFormat.parse(name).record(64, 96)
    expert = random_expert(record, np.random.default_rng(0))
    if record.packed:
        weights = unpack_matrix(expert[record.offsets[1] :], record.up_matrix)
    else:
        weights = (expert.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(weights).all() and 0.005 < weights.std() < 0.05
    experts = ColdExperts(ExpertFormat.parse(name), 64, 96, 1)
    assert len(set(experts.next_groups(1).experts) & set(experts.next_groups(1).experts)) == 0


def test_nothing_measured_is_no_figure() -> None:
    from moe_offload.cpu_kernels import ThreadTeam

    with ThreadTeam(1) as team:
        bench = CpuBench([ExpertFormat.parse("int4")], (64, 96), team, 16, lambda what, share: None)
        assert bench.read_limit is None
        assert bench.figures()[0].share is None
