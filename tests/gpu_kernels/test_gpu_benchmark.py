"""`benchmarks.gpu` where there is no card: what of it can be wrong without one."""

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import numerics, timer
from benchmarks.gpu.bench import SMOKE, Bench, Sizes
from benchmarks.gpu.contestants import FusedLayer, check
from benchmarks.gpu.experts import Experts, route
from benchmarks.gpu.many_tokens import first_win
from benchmarks.gpu.timer import CudaTimer, Sample, WallTimer, take_turns
from tests.gpu_kernels.gpu_card import PROBLEM
from tests.gpu_kernels.host_kernels import HostKernels, needs_compiler

CPU = torch.device("cpu")


class FakeCard:
    """A stream whose clock runs on the host's: asking takes the host `ask` seconds a call, the work `work` seconds."""

    def __init__(self, ask: float, work: float) -> None:
        self.ask, self.work = ask, work
        self.host = self.stream = 0.0  # now, and when all that was asked for is done
        self.waits: list[int] = []

    def call(self) -> None:
        self.host += self.ask
        self.stream = max(self.stream, self.host) + self.work

    def sleep(self, cycles: int) -> None:
        self.waits.append(cycles)
        self.stream = max(self.stream, self.host) + cycles / 2e9

    def synchronize(self, device: object = None) -> None:
        self.host = self.stream = max(self.host, self.stream)

    def event(self, enable_timing: bool = False) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, card: FakeCard) -> None:
        self.card, self.at = card, 0.0

    def record(self) -> None:
        self.at = max(self.card.host, self.card.stream)

    def query(self) -> bool:
        return self.card.host >= self.at

    def synchronize(self) -> None:
        self.card.host = max(self.card.host, self.at)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCard]:
    card = FakeCard(*request.param)
    for name, replacement in (("Event", card.event), ("_sleep", card.sleep), ("synchronize", card.synchronize)):
        monkeypatch.setattr(torch.cuda, name, replacement)
    yield card


@pytest.mark.parametrize("fake", [(20e-6, 5e-6), (1e-3, 1e-6), (1e-6, 1e-3)], indirect=True)
def test_the_hosts_time_is_not_the_devices(fake: FakeCard) -> None:
    """Whichever of the two takes longer."""
    found = CudaTimer(CPU).sample([fake.call] * 16)
    assert found == Sample(pytest.approx(fake.work), False)  # type: ignore[arg-type]


@pytest.mark.parametrize("fake", [(1e-3, 1e-6)], indirect=True)
def test_the_wait_is_made_longer_once(fake: FakeCard) -> None:
    measured = CudaTimer(CPU)
    measured.sample([fake.call] * 16)
    assert len(fake.waits) > 1 and fake.waits == sorted(fake.waits)
    tried = len(fake.waits)
    measured.sample([fake.call] * 16)
    assert len(fake.waits) == tried + 1


@pytest.mark.parametrize("fake", [(10e-6, 5e-6)], indirect=True)
def test_calls_that_wait_for_the_device_are_told(fake: FakeCard) -> None:
    def waits() -> None:
        fake.call()
        fake.synchronize()

    found = CudaTimer(CPU).sample([waits] * 4)
    assert found.host_bound
    series = take_turns(CudaTimer(CPU), {"waits": [waits], "plain": [fake.call]}, 3)
    assert series["waits"].to_dict()["host_bound"] and not series["plain"].to_dict()["host_bound"]


def test_a_graph_is_captured_behind_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps what it works on alive."""
    said: list[str] = []

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        said.append("begin")
        yield
        said.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("wait"))
    tensor = torch.ones(1)
    alive = weakref.ref(tensor)
    replay = CudaTimer(CPU).captured(partial(lambda kept: said.append("call"), tensor))
    del tensor
    replay()
    assert said == ["call", "wait", "begin", "call", "end", "replay"]
    assert alive() is not None


def test_a_card_says_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(major=6, minor=1, multi_processor_count=28, L2_cache_size=2 << 20, name="a card")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 20, 200 << 20))
    monkeypatch.setattr("moe_offload.gpu_kernels.cupy_kernels.CupyKernels", lambda index: HostKernels())
    here = Bench.of_card(0)
    assert (here.capability, here.processors, here.cache_bytes) == ((6, 1), 28, 2 << 20)
    assert here.on_card and here.half == torch.float16
    assert here.copies(1 << 20, 3) == 10  # five caches
    assert here.copies(1 << 20, 70) == 50  # half of what is free
    with pytest.raises(MemoryError, match=str(60 << 20)):
        here.copies(60 << 20, 1)
    del card.L2_cache_size
    assert Bench.of_card(0).cache_bytes == 64 << 20


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    series = take_turns(WallTimer(), {name: [lambda name=name: order.append(name)] for name in "ab"}, 3)  # type: ignore[misc]
    assert order[-6:] == ["a", "b"] * 3
    assert len(order) == 2 * (3 + timer._WARM_UP)
    assert series["a"].to_dict()["samples"] == 3


@pytest.mark.parametrize(
    ("seconds", "least"),
    [
        ([(1, 2), (2, 2), (3, 2), (4, 2)], 3),
        ([(3, 2), (1, 2), (3, 2), (4, 2)], 3),
        ([(3, 2)] * 4, 1),
        ([(1, 2)] * 4, 0),
        ([(3, 2), (3, 2), (3, 2), (1, 2)], 0),
    ],
)
def test_the_crossover_is_where_it_stays(seconds: list[tuple[float, float]], least: int) -> None:
    assert first_win((1, 2, 3, 4), seconds) == least


def bench(cache_bytes: int = 0, sizes: Sizes = SMOKE) -> Bench:
    return Bench(CPU, HostKernels(), WallTimer(), sizes, (8, 0), 2, cache_bytes)


def test_calls_go_beyond_the_cache() -> None:
    here, shape = bench(cache_bytes=40_000), SMOKE.shapes[0]
    experts = Experts.make(here, shape, "int4")
    nbytes = experts.record.nbytes
    assert len(experts.slots) * nbytes >= 5 * 40_000
    calls = here.calls(shape.top_k * experts.record.weight_bytes)
    assert calls * shape.top_k * experts.record.weight_bytes >= 5 * 40_000
    routed = route(experts, 1, 4 * calls, torch.float32, shape.top_k)
    for first in range(0, len(routed) - len(experts.slots) // shape.top_k, len(experts.slots) // shape.top_k):
        some = routed[first : first + len(experts.slots) // shape.top_k]
        used = [e for each in some for e in each.experts]
        assert len(set(used)) == len(used)  # nobody twice before all others


@needs_compiler
def test_nothing_is_timed_that_is_wrong() -> None:
    here, shape = bench(), SMOKE.shapes[0]
    experts = Experts.make(here, shape, "int4")
    routed = route(experts, 2, 1, torch.bfloat16, shape.top_k)[0]
    assert routed.most_rows == int(torch.bincount(routed.index.flatten()).max())
    out = torch.empty_like(routed.hidden)
    FusedLayer(here, experts, 2, shape.top_k).call(routed, out)()
    check(experts, routed, out, 2e-2, "the fused layer")
    with pytest.raises(RuntimeError, match="off by .*tiny, int4, 2 tokens"):
        check(experts, routed, out * 1.1, 2e-2, "the fused layer")
    with pytest.raises(RuntimeError, match="off by nan"):
        check(experts, routed, torch.full_like(out, float("nan")), 2e-2, "the fused layer")


def test_what_does_not_fit_is_left_out() -> None:
    here = bench()
    with here.within_memory("large experts"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")
    assert here.left_out == ["large experts: CUDA out of memory. Tried to allocate 3 GiB"]
    with pytest.raises(RuntimeError, match="else"), here.within_memory("large experts"):
        raise RuntimeError("something else")


def test_the_gpu_tests_are_counted() -> None:
    report = """<testsuites><testsuite><testcase classname="a" name="x"/>
      <testcase classname="a" name="y"><failure message="off"/></testcase>
      <testcase classname="a" name="z"><skipped/></testcase>
      <testcase classname="b" name="w"><error/></testcase></testsuite></testsuites>"""
    assert numerics.counted(report) == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["a::y", "b::w"]}


@pytest.mark.parametrize(
    ("script", "verdict"),
    [("exit 0", "clean"), ("echo '2 errors'; exit 9", "errors: 2 errors"), ("echo no; exit 3", "exit code 3: no")],
)
def test_verdicts_of_the_sanitizer(script: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\n[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 1\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(program))
    assert numerics.sanitized() == {"memcheck": verdict, "racecheck": verdict}


def test_no_sanitizer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert all(verdict.startswith("not available") for verdict in numerics.sanitized().values())


def run(*arguments: str) -> Any:
    app = Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, arguments)


@pytest.mark.skipif(PROBLEM is None, reason="there is a card")
def test_without_a_card_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    found = run("--json", str(tmp_path / "gpu.json"))
    assert found.exit_code == 1
    assert "needs an NVIDIA card" in found.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--only", "fast"], "'fast'"), (["--json", "gpu.txt"], "gpu.txt"), (["--device", "-1"], "equal to 0")],
)
def test_bad_options_are_errors(arguments: list[str], word: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2 and word in found.output


@needs_compiler
def test_a_card_s_run_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the shim; one section fails, and the others are there."""
    here = bench()
    monkeypatch.setattr(command, "cuda_problem", lambda facts, index: None)
    monkeypatch.setattr(command, "cupy_problem", lambda: None)
    monkeypatch.setattr(Bench, "of_card", lambda index: here)
    monkeypatch.setitem(command.SECTIONS, "crossover", ("fails", lambda bench, rate: 1 / 0))
    target = tmp_path / "gpu.json"
    monkeypatch.setattr(command, "gpu_tests", lambda: {"passed": 3})
    found = run("--json", str(target), "--only", "few_tokens,crossover,numerics")
    assert found.exit_code == 1, found.output
    written = json.loads(target.read_text())
    assert written["machine"]["torch"] and written["sections"] == ["few_tokens", "crossover", "numerics"]
    assert written["gpu_tests"] == {"passed": 3} and set(written["compute_sanitizer"]) == {"memcheck", "racecheck"}
    assert written["crossover"] == [] and "ZeroDivisionError" in written["left_out"][0]
    assert {"gb_per_s", "percent_of_copy", "us_median"} <= set(written["few_tokens"][0])
