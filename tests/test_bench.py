"""The benchmark of a loaded model: what is run, what is timed and counted, and what is made of it."""

import io
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

import moe_offload
from moe_offload import bench_progress, terminal
from moe_offload.bench_command import parse_counts
from moe_offload.bench_generation import Sample
from moe_offload.bench_model import ModelBench, Test, TestResult, measure
from moe_offload.bench_progress import RunProgress
from moe_offload.bench_resources import Limits, Meter, Traffic, disk_bytes
from moe_offload.bench_table import Facts, written
from moe_offload.bench_text import RandomTokens, RealText, standard_library
from moe_offload.models.errors import CheckpointError, MoeOffloadError, OptionError
from moe_offload.transfer.server_profile import find_profile
from tests import cli_model

LAYERS, TOP_K = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[PreTrainedModel]:
    made = moe_offload.load(folder, device="cpu")
    with made.offload:
        yield made


class Recorded:
    """Random tokens, the model's end token among them, and a note of what was taken."""

    description = "recorded"

    def __init__(self) -> None:
        self.taken: list[NDArray[np.int64]] = []

    def take(self, count: int, length: int) -> NDArray[np.int64]:
        ids = np.random.default_rng(len(self.taken)).integers(3, 262, (count, length))
        ids[:, -2] = 2
        self.taken.append(ids)
        return ids


def bench(model: PreTrainedModel, repeats: int = 2, **more: Any) -> tuple[ModelBench, Recorded]:
    tokens = Recorded()
    return ModelBench(model, tokens, repeats, limit_mib=0, **more), tokens


@pytest.mark.parametrize(
    ("test", "name"),
    [
        (Test(512), "pp512"), (Test(512, batch=4), "pp512@4"), (Test(32, 128), "tg128"),
        (Test(32, 128, 16), "tg128@16"), (Test(512, 128, 16), "tg128@16 d512"),
    ],
)  # fmt: skip
def test_names(test: Test, name: str) -> None:
    assert test.name == name


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, 0, 1), (1, -1, 1), (1, 1, 0)])
def test_tests_out_of_bounds(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match="the least"):
        Test(*sizes)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9_999_999), min_size=1, max_size=5))
def test_counts_are_read_as_written(counts: list[int]) -> None:
    assert parse_counts(",".join(map(str, counts)), "-p") == counts


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("0159,-+. ne٣²"), max_size=9))
def test_any_other_text_is_refused(text: str) -> None:
    try:
        found = parse_counts(text, "--batch", optional=False)
    except OptionError as error:
        assert "--batch" in str(error)
    else:
        assert found == [int(part) for part in text.split(",")] and min(found) >= 1


def test_figures_of_a_result() -> None:
    traffic = [Traffic(4 * 10**9, 10**9, 10**9, disk=2 * 10**7, wanted=10, found=each) for each in (2.0, 4.0, 9.0)]
    samples = tuple(Sample(0.5 + at, at + 1.0, traffic[at]) for at in range(3))
    result = TestResult(Test(32, 10, 4), samples, Limits(8.0, None, 4.0))
    assert result.tokens_per_second == (40.0, 20.0, 40 / 3)
    assert result.median == 20 and result.mean == pytest.approx(statistics.mean((40, 20, 40 / 3)))
    assert result.deviation == pytest.approx(np.std((40, 20, 40 / 3), ddof=1))
    assert result.first_seconds == 1.5 and result.step_seconds == pytest.approx(0.2)
    assert result.hit_rate == pytest.approx(0.5)
    assert [(each.name, each.gb_per_s, each.share) for each in result.resources] == [
        ("CPU memory", 2.0, 0.25),
        ("link", 0.5, None),
        ("device memory", 0.5, 0.125),
    ]
    slow = tuple(Sample(1.0, 1.0, Traffic(cpu=10**9, disk=each)) for each in (0, 2 * 10**8, 10**8))
    found = TestResult(Test(8), slow, Limits()).resources
    assert [(each.name, each.gb_per_s, each.share) for each in found][1:] == [("disk", 0.1, None)]
    alone = TestResult(Test(8), (Sample(2.0, 2.0, Traffic(cpu=10**9)),), Limits())
    assert alone.mean == alone.median == 4.0 and alone.deviation == 0.0
    assert alone.step_seconds is None and alone.hit_rate is None
    assert [(each.name, each.share) for each in alone.resources] == [("CPU memory", None)]


def test_what_is_printed_are_those_figures() -> None:
    facts = Facts(
        model="m|x", model_type="t", size_bytes=3 * 2**29, params=1_500_000_000, weights="int4", dense="int8",
        device="CPU", simulated=False, policy=None, threads=4, cpu="c", text="text", random_tokens=False, repeats=3,
        warm_ups=1,
    )  # fmt: skip
    samples = tuple(Sample(0.25 * at, at / 4, Traffic(cpu=10**9 * at)) for at in (1, 2, 4))
    result = TestResult(Test(32, 5, 4), samples, Limits(8.0))
    text = written("md", facts, [result], complete=True)
    lines = text.splitlines()
    # 80, 40 and 20 tokens a second
    assert lines[2] == "| m\\|x | 1.50 GiB | 1.50 B | int4 (other int8) | CPU | 4 | tg5@4 | 46.67 ± 30.55 |"
    assert lines[6] == "| tg5@4 | 40.00 | 500.00 ms | 100.00 ms | - | 4.00 of 8.0 GB/s (50%) |"
    (line,) = written("jsonl", facts, [result], complete=False).splitlines()
    said = json.loads(line)
    assert said["complete"] is False and said["samples_tokens_per_s"] == [80, 40, 20]
    assert [round(said[f"tokens_per_s_{key}"], 2) for key in ("mean", "sd", "median")] == [46.67, 30.55, 40]
    assert said["cpu_read_share"] == 0.5 and said["cpu_read_limit_gb_per_s"] == 8 and said["device_read_share"] is None


def test_generation_is_the_models_own_and_follows_the_text(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End tokens do not end it, the model's own wishes for chance and penalties are off, and come back."""
    outputs: list[torch.Tensor] = []
    generate = model.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        outputs.append(generate(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(model, "generate", spy)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 9.0)
    kept = model.generation_config
    runner, tokens = bench(model)
    runner.run([Test(8, 5), Test(8, 0, 3)])
    assert len(outputs) == 6
    for ids, output in zip(tokens.taken, outputs, strict=True):
        np.testing.assert_array_equal(output.numpy(), ids)
    assert [ids.shape for ids in tokens.taken] == [(1, 14)] * 3 + [(3, 9)] * 3
    assert model.generation_config is kept and kept.eos_token_id == 2


def test_warm_ups_and_the_prompt_are_timed_apart(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts layers: a prompt is one pass, generation one for every new token."""
    engine: Any = model.offload
    monkeypatch.setattr(Meter, "now", lambda meter: float(engine.statistics.snapshot().layer_calls))
    runner, tokens = bench(model, repeats=3, warm_ups=2)
    runner.run([Test(8, 5, 2), Test(8, 0, 2)])
    steps, prompt = runner.results()
    assert len(tokens.taken) == 10 and len(steps.samples) == len(prompt.samples) == 3
    assert steps.seconds == (LAYERS * 5,) * 3 and steps.first_seconds == LAYERS
    assert prompt.seconds == (LAYERS,) * 3 and prompt.first_seconds == LAYERS
    assert steps.tokens_per_second[0] == 2 * 5 / (LAYERS * 5) and prompt.tokens_per_second[0] == 2 * 8 / LAYERS


def test_bytes_are_those_of_the_weights_that_a_step_reads(model: PreTrainedModel) -> None:
    runner, _ = bench(model, repeats=1)
    runner.run([Test(4, 6)])
    (result,) = runner.results()
    layer = model.offload.spec.layers[0]
    expert = 4 * 3 * layer.hidden_size * layer.intermediate_size
    others = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert not model.config.tie_word_embeddings
    assert result.samples[0].traffic.cpu == 6 * (LAYERS * TOP_K * expert + others)
    assert result.samples[0].traffic.device == result.samples[0].traffic.link == 0


def test_linears_that_are_packed_count_as_packed(folder: Path, tmp_path: Path) -> None:
    made = moe_offload.load(folder, device="cpu", weights="int8", dense="int8", pack_dir=tmp_path)
    plain = moe_offload.load(folder, device="cpu")
    with made.offload, plain.offload:
        dense: Any = made.offload
        matrices = dense._dense.nbytes
        packed, stored = Meter(made).other_bytes, Meter(plain).other_bytes
    assert packed == matrices + sum(each.nbytes for each in made.parameters()) < stored


def test_what_comes_from_disk_is_what_the_system_counts(tmp_path: Path) -> None:
    (tmp_path / "io").write_text("rchar: 9\nread_bytes: 4096\nwrite_bytes: 7\n")
    assert disk_bytes(tmp_path / "io") == 4096
    assert disk_bytes(tmp_path / "none") == 0
    assert disk_bytes() >= 0


def test_a_test_too_long_runs_nothing(model: PreTrainedModel) -> None:
    runner, tokens = bench(model)
    runner.run([Test(cli_model.CONTEXT - 4, 3)])
    with pytest.raises(OptionError, match=r"pp256 needs 257 tokens of context, and the model's holds 256"):
        runner.run([Test(8), Test(cli_model.CONTEXT)])
    assert len(tokens.taken) == 3


@pytest.mark.parametrize(("repeats", "warm_ups"), [(0, 1), (1, -1)])
def test_repeats_out_of_bounds(model: PreTrainedModel, repeats: int, warm_ups: int) -> None:
    with pytest.raises(OptionError, match="the least"):
        bench(model, repeats, warm_ups=warm_ups)


@settings(deadline=None, max_examples=8)
@given(runs=st.integers(0, 7))
def test_interrupted_it_has_what_there_is(model: PreTrainedModel, runs: int) -> None:
    """Two tests of a warm-up and two repeats, stopped before run number `runs`."""
    begun = 0

    def stop(test: Test, done: int, total: int) -> None:
        nonlocal begun
        assert total == 3
        if done < total:
            if begun == runs:
                raise KeyboardInterrupt
            begun += 1

    runner, _ = bench(model, report=stop)
    tests = [Test(4), Test(4, 2)]
    if runs < 6:
        with pytest.raises(KeyboardInterrupt):
            runner.run(tests)
    else:
        runner.run(tests)
    expected = [max(0, min(runs - 3 * at, 3) - 1) for at in range(2)]
    assert [len(each.samples) for each in runner.results()] == [count for count in expected if count]


def test_measure(model: PreTrainedModel, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for found in (
        measure(model, tokenizer, [Test(8), Test(8, 2, 2)], 2, limit_mib=16),
        measure(model, None, [Test(8), Test(8, 2, 2)], 2, limit_mib=16, warm_ups=0),
    ):
        assert [each.name for each in found] == ["pp8", "tg2@2 d8"]
        for each in found:
            assert len(each.tokens_per_second) == 2 and min(each.tokens_per_second) > 0
            (memory,) = each.resources
            assert memory.limit is not None and memory.limit > 0 and memory.gb_per_s > 0


def test_on_a_virtual_server(folder: Path) -> None:
    """Its clock, its limits; bytes are split between the places, and every wanted expert is somewhere."""
    made = moe_offload.load(folder, device="virtual:gtx1080ti", gpu_memory=500_000)
    engine = made.offload
    with engine:
        runner, _ = bench(made, repeats=3)
        started = engine.device.accelerator.now()
        runner.run([Test(8, 6, 2)])
        total = engine.device.accelerator.now() - started
    (result,) = runner.results()
    profile = find_profile("gtx1080ti")
    assert runner.meter.simulated
    assert result.limits == Limits(profile.host_read_gbs, profile.link_gbs, profile.memory_gbs)
    assert [each.name for each in result.resources] == ["CPU memory", "link", "device memory"]
    assert 0 < sum(each.seconds + each.first_seconds for each in result.samples) < total
    others = sum(p.nbytes for name, p in made.named_parameters() if "embed_tokens" not in name)
    for sample in result.samples:
        traffic = sample.traffic
        assert 6 * LAYERS * TOP_K <= traffic.wanted <= 6 * LAYERS * TOP_K * 2
        assert 0 <= traffic.found <= traffic.wanted
        layer = engine.spec.layers[0]
        least = traffic.wanted * 4 * 3 * layer.hidden_size * layer.intermediate_size
        experts = traffic.cpu + traffic.device - 6 * others
        assert least <= experts < 1.5 * least  # records are aligned
    assert result.hit_rate is not None and 0 <= result.hit_rate <= 1


def test_what_is_not_found_on_the_device_is_the_cpus(folder: Path) -> None:
    """By a placement that copies nothing later."""
    made = moe_offload.load(folder, device="virtual:gtx1080ti", policy="static")
    with made.offload:
        runner, _ = bench(made)
        runner.run([Test(8, 3)])
        expert = made.offload.spec.layers[0].bytes_per_expert("f32")
    (result,) = runner.results()
    for traffic in (sample.traffic for sample in result.samples):
        assert traffic.link == 0 and traffic.cpu == (traffic.wanted - traffic.found) * expert
    assert result.hit_rate is not None and 0.8 < result.hit_rate < 1


def test_a_device_that_is_lost_ends_it(folder: Path) -> None:
    made = moe_offload.load(folder, device="virtual:gtx1080ti", gpu_memory=500_000)
    with made.offload:

        def lose(test: Test, done: int, total: int) -> None:
            if test.new_tokens and done == 1:
                made.offload.device.accelerator.fail_after(20)

        runner, _ = bench(made, report=lose)
        with pytest.raises(MoeOffloadError, match="the device was lost"):
            runner.run([Test(8), Test(8, 4)])
    assert [each.name for each in runner.results()] == ["pp8"]


@pytest.fixture(scope="module")
def real(folder: Path) -> Callable[..., RealText]:
    """real(text, ...) -> documents of those texts."""
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)

    def make(*texts: str, seed: int = 0) -> RealText:
        return RealText(tokenizer, config, [partial(str, text) for text in texts], "text", seed)

    return make


def test_text_is_of_the_documents(folder: Path, real: Callable[..., RealText]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [f"line {number:05} of the text\n" for number in range(3000)]
    ids = real("".join(lines)).take(8, 100)
    assert ids.shape == (8, 100)
    texts = [tokenizer.decode(row) for row in ids]
    assert len(set(texts)) == 8  # distinct stretches
    assert all("".join(lines).find(text) % len(lines[0]) == 0 for text in texts)  # that begin with a line
    np.testing.assert_array_equal(real("".join(lines)).take(8, 100), ids)
    assert (real("".join(lines), seed=1).take(8, 100) != ids).any()


def test_every_sequence_begins_in_another_document(folder: Path, real: Callable[..., RealText]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = real(*(letter * 3000 for letter in "abcd")).take(4, 20)
    assert sorted(tokenizer.decode(row)[0] for row in rows) == list("abcd")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("a\n ", max_size=30), min_size=1, max_size=3), st.integers(1, 50), st.integers(0, 3))
def test_short_texts_go_round(real: Callable[..., RealText], texts: list[str], length: int, seed: int) -> None:
    source = real(*texts, seed=seed)
    if any(texts):
        assert source.take(2, length).shape == (2, length)
    else:
        with pytest.raises(OptionError, match="no token"):
            source.take(2, length)


def test_the_standard_library_is_there(folder: Path) -> None:
    ids = standard_library(AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)).take(3, 64)
    assert len({tuple(row) for row in ids.tolist()}) == 3


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = 20
    with pytest.raises(CheckpointError, match="belongs to another model"):
        standard_library(AutoTokenizer.from_pretrained(folder), config).take(1, 64)


def test_random_tokens_are_of_the_vocabulary(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = [2, 7], 1, None
    ids = set(RandomTokens(config).take(20, 500).ravel().tolist())
    assert ids == set(range(262)) - {1, 2, 7}


def test_the_line_that_says_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(bench_progress, "time", SimpleNamespace(perf_counter=lambda: now))
    tests = [Test(100), Test(100, batch=2), Test(32, 50)]
    progress = RunProgress(tests, enabled=False)
    progress(tests[0], 0, 3)
    assert progress.line(tests[0], 0, 3) == "pp100: run 1 of 3, test 1 of 3"
    now += 2.0
    progress(tests[0], 1, 3)
    # two more of 2 s, three of 4 s; nothing is known of generation
    assert progress.line(tests[0], 1, 3) == "pp100: run 2 of 3, test 1 of 3, 50 t/s, more than 16 s left"
    now += 1.0
    progress(tests[1], 3, 3)
    assert progress.line(tests[1], 3, 3) == "pp100@2: run 3 of 3, test 2 of 3, 200 t/s"
    progress(tests[2], 0, 3)
    now += 5.0
    progress(tests[2], 1, 3)
    assert progress.line(tests[2], 1, 3) == "tg50: run 2 of 3, test 3 of 3, 10 t/s, about 10 s left"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_line_is_gone_afterwards(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "console", lambda: Console(file=screen, force_terminal=True, width=20))
    test = Test(8)
    with RunProgress([test], enabled=enabled) as progress:
        progress(test, 0, 2)
    *_, said, last = screen.getvalue().split("\r\x1b[K") if enabled else ("pp8: run 1 of 2, te", "")
    assert said == "pp8: run 1 of 2, te" and last == ""  # no wider than the screen
    assert enabled or not screen.getvalue()
