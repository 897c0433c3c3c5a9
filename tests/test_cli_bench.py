"""`moe-offload bench`: what it prints, in all its forms, and what it says of mistakes and of an interruption."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_offload import bench_model
from moe_offload.bench_generation import Sample
from moe_offload.bench_model import ModelBench, Test
from moe_offload.cli import main
from moe_offload.models.errors import MoeOffloadError
from tests import cli_model

Run = Callable[..., tuple[int, str, str]]
SMALL = ("-p", "8", "-n", "4", "-r", "2")
COLUMNS = ["model", "size", "params", "weights", "device", "threads", "test", "t/s"]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "LIMIT_MIB", 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("-p", 8, ...) -> (exit code, stdout, stderr) on the tiny model, or on `model`; on the CPU if nothing else."""

    def call(*arguments: object, model: object = None) -> tuple[int, str, str]:
        given = [str(each) for each in arguments]
        given += [] if "--device" in given else ["--device", "cpu"]
        code = main(["bench", str(model or folder), *given])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables in a text."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("| "):
            lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()]
            assert all(re.fullmatch(r"-+:?", cell) for cell in lines[1])
            found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def test_the_demo_model_in_a_table_for_eyes(run: Run) -> None:
    code, out, err = run(*SMALL, "--threads", 1, model="demo")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert all(name in words for name in COLUMNS)
    for test in ("pp8", "tg4"):  # 6.98 million: what is tied counts once
        assert re.search(rf"demo +13\.\d\d MiB +6\.98 M +bf16 +CPU +1 +{test} +\d+\.\d\d ± \d+\.\d\d", out), out
    assert "mean ± standard deviation of 2 repeats, 1 warm-up run before" in words
    assert "Text of Python's standard library, generation behind 32 tokens of it." in words
    assert "imulated" not in words and "andom" not in words


def test_markdown_is_the_table_of_llama_bench(run: Run) -> None:
    code, out, err = run(*SMALL, "-b", "1,2", "-o", "md", "--weights", "int8", "--dense", "int8")
    assert (code, err) == (0, "")
    speeds, limits = tables(out)
    assert list(speeds[0]) == COLUMNS
    assert [row["test"] for row in speeds] == [row["test"] for row in limits] == ["pp8", "pp8@2", "tg4", "tg4@2"]
    assert {row["weights"] for row in speeds} == {"int8 (other int8)"} and {row["model"] for row in speeds} == {"tiny"}
    for row in limits:
        assert (row["each step"] == "-") == row["test"].startswith("pp") and row["experts found"] == "-"
        assert re.fullmatch(r"\d+\.\d\d of \d+\.\d GB/s \(\d+%\)", row["CPU memory"])


def test_json_has_every_sample(run: Run) -> None:
    code, out, err = run(*SMALL, "--batch", "3", "--json", "--warm-up", 0, "--depth", 5)
    said: dict[str, Any] = json.loads(out)
    assert (code, err) == (0, "") and said["complete"] is True
    assert said["model"] == "tiny" and said["device"] == "CPU" and said["simulated"] is False
    assert said["warm_ups"] == 0 and said["repeats"] == 2
    assert [(each["test"], each["prompt_tokens"]) for each in said["tests"]] == [("pp8@3", 8), ("tg4@3 d5", 5)]
    for each in said["tests"]:
        rates, seconds = each["samples_tokens_per_s"], each["samples_s"]
        tokens = 3 * (each["new_tokens"] or each["prompt_tokens"])
        assert len(rates) == len(seconds) == len(each["samples_first_token_s"]) == 2
        assert rates == pytest.approx([tokens / taken for taken in seconds])
        assert each["tokens_per_s_mean"] == each["tokens_per_s_median"] == pytest.approx(sum(rates) / 2)
        assert each["tokens_per_s_sd"] == pytest.approx(abs(rates[0] - rates[1]) / 2**0.5)
        assert each["cpu_read_share"] == pytest.approx(each["cpu_read_gb_per_s"] / each["cpu_read_limit_gb_per_s"])
        assert each["link_gb_per_s"] is each["hit_rate"] is None
    prompt, steps = said["tests"]
    assert prompt["samples_s"] == prompt["samples_first_token_s"] and prompt["step_s"] is None
    assert steps["step_s"] == pytest.approx(sum(steps["samples_s"]) / 2 / 4)


def test_jsonl_and_csv_are_one_record_for_each_test(run: Run) -> None:
    code, out, _ = run(*SMALL, "-o", "jsonl")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["test"] for line in lines] == ["pp8", "tg4"]
    code, out, _ = run(*SMALL, "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["test"] for row in rows] == ["pp8", "tg4"]
    for line, row in zip(lines, rows, strict=True):
        assert set(line) - set(row) == {"samples_tokens_per_s", "samples_s", "samples_first_token_s"}
        for key in ("model", "size_bytes", "params", "weights", "device", "threads", "prompt_tokens", "repeats"):
            assert row[key] == str(line[key])
        assert float(row["tokens_per_s_mean"]) > 0


def test_a_simulated_server_says_so(run: Run) -> None:
    device = ("--device", "virtual:gtx1080ti", "--gpu-memory", "500KB", "--policy", "lru")
    code, out, err = run(*SMALL, *device, "-o", "md")
    assert (code, err) == (0, "")
    speeds, limits = tables(out)
    assert {row["device"] for row in speeds} == {"virtual gtx1080ti (simulated)"}
    assert {row["threads"] for row in speeds} == {"-"}  # the server's are not this machine's
    assert "Simulated: times are modelled" in out
    for row in limits:
        assert " of 12.0 GB/s" in row["link"] and " of 57.6 GB/s" in row["CPU memory"] and "%" in row["experts found"]
    said = json.loads(run(*SMALL, *device, "--json")[1])
    assert said["simulated"] is True and said["threads"] is None and said["policy"] == "lru"


@pytest.mark.parametrize(("chosen", "tests"), [(("-p", "none"), ["tg4"]), (("-n", "none"), ["pp8"])])
def test_some_tests_only(run: Run, chosen: tuple[str, str], tests: list[str]) -> None:
    code, out, _ = run(*SMALL, *chosen, "-o", "jsonl")
    assert code == 0 and [json.loads(line)["test"] for line in out.splitlines()] == tests


def test_random_tokens_on_demand_are_named(run: Run) -> None:
    code, out, err = run(*SMALL, "--random-tokens")
    assert (code, err) == (0, "") and "Random tokens route unrealistically" in out
    assert json.loads(run(*SMALL, "--random-tokens", "--json")[1])["random_tokens"] is True


def test_without_a_tokenizer_tokens_are_random(run: Run, folder: Path, tmp_path: Path) -> None:
    bare = cli_model.copied(folder, tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    code, out, err = run(*SMALL, model=bare)
    assert code == 0 and "Random tokens route unrealistically" in out
    assert "has no tokenizer" in err and "random tokens are taken" in err and err.count("\n") == 1
    (tmp_path / "text").write_text("some text")
    code, out, err = run(*SMALL, "--prompt-file", tmp_path / "text", model=bare)
    assert (code, out) == (2, "") and "has no tokenizer" in err


def test_text_of_ones_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader\n" * 9)
    code, out, err = run(*SMALL, "--prompt-file", tmp_path / "letter.txt")
    assert (code, err) == (0, "") and "Text of letter.txt" in " ".join(out.split())


@pytest.mark.parametrize(
    ("output", "runs"),
    [("table", 0), ("table", 2), ("md", 1), ("md", 5), ("csv", 0), ("csv", 2), ("json", 1), ("json", 5), ("jsonl", 2)],
)
def test_interrupted_it_prints_what_there_is(run: Run, output: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after so many of six runs: a warm-up and two repeats of either test."""
    code, out, err = interrupted(run, runs, KeyboardInterrupt(), monkeypatch, "-o", output)
    assert code == 130 and "stopped early" in err and err.count("\n") == 1
    tests = [name for name, least in (("pp8", 2), ("tg4", 5)) if runs >= least]
    assert [name for name in ("pp8", "tg4") if name in out] == tests
    if output == "md":
        assert ("of 1 to 2 repeats" in out) == (runs == 5)
    if output == "json":
        said = json.loads(out)
        assert said["complete"] is False
        assert [len(each["samples_s"]) for each in said["tests"]] == {0: [], 1: [], 2: [1], 5: [2, 1]}[runs]


def test_what_was_measured_before_an_error_is_printed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = interrupted(run, 4, MoeOffloadError("the device was lost"), monkeypatch, "-o", "md")
    assert code == 2 and [row["test"] for row in tables(out)[0]] == ["pp8"]
    assert err == "error: the device was lost\n"


def interrupted(
    run: Run, runs: int, error: BaseException, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[int, str, str]:
    left = runs
    once = ModelBench._once

    def stop(runner: ModelBench, test: Test) -> Sample:
        nonlocal left
        if left == 0:
            raise error
        left -= 1
        return once(runner, test)

    monkeypatch.setattr(ModelBench, "_once", stop)
    return run(*SMALL, *more)


def test_a_folder_with_only_a_configuration(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    code, out, err = run(*SMALL, model=tmp_path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "has no weights (*.safetensors)" in err and "moe-offload plan" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-p", "0"), "--prompt-tokens 0: '0' is no number from 1 to 9999999"),
        (("-p", ""), "--prompt-tokens"),
        (("-p", "8,,8"), "write it like 1,16, or none"),
        (("-n", "-4"), "--new-tokens -4"),
        (("-n", "many"), "'many' is no number"),
        (("-n", "1e3"), "'1e3' is no number"),
        (("--batch", "0"), "--batch 0"),
        (("--batch", "none"), "--batch none"),
        (("-r", "0"), "--repeats 0 is out of bounds: it must be at least 1"),
        (("-r", "x"), "'--repeats' / '-r'"),
        (("--warm-up", "-1"), "--warm-up -1"),
        (("-d", "0"), "--depth 0"),
        (("-o", "xml"), "--output xml is not one of table, md, csv, json, jsonl"),
        (("-o", "csv", "--json"), "exclude each other"),
        (("-p", "none", "-n", "none"), "leave no test"),
        (("-p", "256"), "pp256 needs 257 tokens of context, and the model's holds 256"),
        (("-n", "250"), "tg250 needs 283 tokens of context"),
        (("--random-tokens", "--prompt-file", "x"), "exclude each other"),
        (("--prompt-file", "/nowhere/x"), "cannot read the prompt file"),
        (("--device", "virtual:nope"), "no virtual server 'nope'"),
        (("--weights", "int3"), "--weights int3"),
        (("--frobnicate",), "--frobnicate"),
    ],
)
def test_what_is_refused_says_why(run: Run, flags: tuple[str, ...], words: str) -> None:
    code, out, err = run(*SMALL, *flags)
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1, err


def test_an_empty_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    code, _, err = run(*SMALL, "--prompt-file", tmp_path / "empty")
    assert code == 2 and "is empty" in err
