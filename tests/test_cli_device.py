"""`moe-offload generate` with a device: what --stats and --trace say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_offload.cli import main
from moe_offload.scheduling.policies import POLICIES as ALL
from moe_offload.scheduling.policy_names import POLICIES
from tests import cli_model

Run = Any
DEVICE = ("--device", "virtual:gtx1080ti", "--gpu-memory", "2MB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("device") / "model")


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("--device", ...) -> (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["generate", str(folder), "-p", "hello", "--greedy", "--max-new-tokens", "6", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("policy", ["ours", "lru"])
def test_text_is_that_of_the_cpu_and_stats_follow(run: Run, policy: str) -> None:
    plain = run("--device", "cpu")
    code, out, err = run(*DEVICE, "--policy", policy, "--stats")
    assert code == 0 and out == plain[1]
    for words in (f"simulated: times are modelled), policy {policy}", "expert slots of", "a fetch", "guard, 1 token:"):
        assert (words in err) == (policy == "ours" or not words.startswith("guard")), err


def test_json_has_the_statistics(run: Run) -> None:
    code, out, err = run(*DEVICE, "--stats", "--json")
    found = json.loads(out)
    stats = found["device_stats"]
    assert code == 0 and err == ""
    assert found["device"] == stats["device"] == "virtual gtx1080ti" and stats["simulated"] is True
    assert 0 < stats["memory_used"] <= stats["memory_peak"] <= stats["memory_budget"] == 2_000_000
    assert len(stats["layers"]) == 3 and stats["steps"] == 6
    first = stats["layers"][0]
    assert first["calls"] == 6
    assert first["rows_on_cpu"] + first["rows_on_device"] == 2 * (found["prompt_tokens"] + found["new_tokens"] - 1)


def test_a_trace_is_a_timeline_of_streams(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    code, _, err = run(*DEVICE, "--policy", "lru", "--trace", str(path))
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert code == 0 and f"{len(spans)} events" in err
    assert {"virtual gtx1080ti", "compute", "host"} <= names
    assert spans and all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "virtual:nope"), "no virtual server 'nope': choose one of v100-6230r"),
        (("--device", "gpu"), "no device 'gpu': choose auto, cpu, cuda, cuda:N or virtual:PROFILE"),
        (("--device", "virtual:gtx1080ti", "--gpu-memory", "6 apples"), "--gpu-memory 6 apples is no size"),
        (("--device", "virtual:gtx1080ti", "--gpu-memory", "-1"), "--gpu-memory -1 is no size"),
        (("--device", "virtual:gtx1080ti", "--gpu-memory", "0"), "--gpu-memory 0 is out of bounds"),
        (("--device", "virtual:gtx1080ti", "--gpu-memory", "99GB"), "99000000000"),
        (("--device", "virtual:gtx1080ti", "--gpu-memory", "10KB"), "the non-expert weights need"),
        (("--device", "virtual:gtx1080ti", "--ram", "1KB"), "ram (--ram) is too little"),
        (("--device", "virtual:gtx1080ti", "--dense", "int8"), "packs linears for the CPU"),
        (("--device", "cpu", "--gpu-memory", "1GB"), "uses no GPU"),
        (("--policy", "best"), "there is no policy 'best': choose one of ours, static"),
        (("--device", "cpu", "--trace", "x.json"), "everything runs on the CPU"),
        (("--trace", "/nowhere/x.json"), "its folder does not exist"),
    ],
)
def test_what_is_refused_says_why(run: Run, flags: tuple[str, ...], words: str) -> None:
    code, out, err = run(*flags)
    assert (code, out) == (2, "")
    assert words in err and len(err.strip().splitlines()) == 1, err


def test_names_are_those_of_the_policies() -> None:
    assert set(POLICIES) == set(ALL) - {"oracle"}
