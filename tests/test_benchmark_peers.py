"""The comparison with peers: contestants, turns, the budget and the one table, on engines that are made up."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import benchmarks.peers.budget as budget_test
from benchmarks.peers.__main__ import table
from benchmarks.peers.budget import Budget, decode_within
from benchmarks.peers.client import Implementation, Worker
from benchmarks.peers.comparison import ACCELERATE, IMPLEMENTATIONS, LLAMA, OURS, RIVALS, ROWS
from benchmarks.peers.protocol import MissingError
from benchmarks.peers.torch_engine import TransformersEngine
from benchmarks.peers.turns import Test as Work
from benchmarks.peers.turns import measure, summary
from benchmarks.random_checkpoint import make_checkpoint


class Made:
    """A contestant that takes `seconds` for everything."""

    def __init__(self, seconds: float, most_tokens: float = math.inf) -> None:
        self.seconds, self.most_tokens = seconds, most_tokens
        self.calls: list[tuple[str, Any]] = []

    def call(self, method: str, **arguments: Any) -> Any:
        self.calls.append((method, arguments))
        return self.seconds if method == "prefill" else [self.seconds] * (arguments.get("new_tokens", 1) - 1)

    def logits(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        self.calls.append(("logits", prompts))
        return np.zeros((len(prompts), len(prompts[0]), 4), np.float32)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.turns.PAUSE", 0.0)


@pytest.mark.usefixtures("no_pause")
def test_tests_that_an_engine_has_no_memory_for_are_left_out() -> None:
    contestants = {OURS: Made(0.5), "small": Made(0.25, most_tokens=4)}
    tests = (Work("pp8", 8), Work("pp4", 4), Work("batch 2", 8, 2, 3), Work("batch 8", 8, 8, 3))
    series = measure(contestants, tests, 2, lambda number: None)
    assert {name: list(engines) for name, engines in series.items()} == {
        "pp8": [OURS], "pp4": [OURS, "small"], "batch 2": [OURS, "small"], "batch 8": [OURS],
    }  # fmt: skip
    found = summary(series, OURS)
    assert found["pp4"]["ratio_to"]["small"]["median"] == 0.5 and found["pp8"]["ratio_to"] == {}
    assert found["batch 2"]["tokens_per_s"]["small"] == {"median": 8.0, "min": 8.0, "max": 8.0, "n": 2}


def test_an_implementation_is_chosen_before_every_call() -> None:
    made: Any = Made(1.0)
    one, other = Implementation(made, "eager"), Implementation(made, "batched_mm", 3)
    one.call("prefill", prompt=[1])
    other.logits([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    chosen = {"implementation": "eager"}, {"implementation": "batched_mm"}
    assert made.calls == [
        ("choose", chosen[0]), ("prefill", {"prompt": [1]}), ("choose", chosen[1]),
        ("logits", [[1, 2, 3], [5, 4, 3]]),
    ]  # fmt: skip
    assert other.most_tokens == 3 and one.most_tokens == math.inf


def test_transformers_implementations_run_as_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts of batched_mm excepted: these would need a copy of the experts for every token."""
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    engine = TransformersEngine(str(make_checkpoint(tmp_path, "small", 1)), 1)
    model = engine._model
    seen: list[tuple[str, int]] = []
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, inputs: seen.append((model.config._experts_implementation, inputs[0].shape[-2]))
    )
    logits = {}
    for name in IMPLEMENTATIONS:
        engine.choose(name)
        assert engine.describe()["experts_implementation"] == name
        logits[name] = torch.from_numpy(engine.logits([[3, 4, 5, 6]]))
        assert seen.pop()[0] == name and not seen
        assert len(engine.decode([[3, 4, 5, 6]], 3)) == 2
        prompt, *steps = seen
        assert prompt == ("grouped_mm" if name == "batched_mm" else name, 4)
        assert steps and set(steps) == {(name, 1)}
        seen.clear()
    torch.testing.assert_close(logits["eager"], logits["batched_mm"], atol=0.02, rtol=0.05)
    assert float(logits["eager"].abs().max()) > 0.05


class Group:
    """Stands for a control group; engines in `full` hold more than any limit."""

    made: list["Group"] = []
    full: set[int] = set()

    def __init__(self, name: str) -> None:
        self.pid, self.allowed, self.ended = 0, 0, False
        Group.made.append(self)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True

    def add(self, pid: int) -> None:
        self.pid = pid

    def limit(self, count: int) -> None:
        if self.pid in Group.full:
            raise OSError(16, "Device or resource busy")
        self.allowed = count

    def reset_peak(self) -> None:
        pass

    def peak(self) -> int:
        return self.allowed - 1


class Process(Made):
    """Stands for a worker: its seconds by engine; llama.cpp may be missing, and one may be ended by the system."""

    seconds_of = {OURS: 0.1, LLAMA: 0.2, ACCELERATE: 0.8}
    opened: list[tuple[str, dict[str, Any]]] = []
    missing = False
    killed = ""

    def __init__(self, name: str, python: str = "") -> None:
        super().__init__(self.seconds_of[name])
        self.name, self.python = name, python
        self.pid = len(Process.opened) + 1

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, method: str, **arguments: Any) -> Any:
        if self.name == LLAMA and Process.missing:
            raise MissingError("llama.cpp is not here")
        if method == "make_file":
            return f"{arguments['kind']}.gguf"
        if method == "open":
            Process.opened.append((self.name, arguments))
            return None
        if self.name == Process.killed:
            raise RuntimeError(f"the {self.name} worker ended with status -9 in decode\nmore")
        return super().call(method, **arguments)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Groups and processes that are made up."""
    for name, value in dict[str, Any](made=[], full=set()).items():
        monkeypatch.setattr(Group, name, value)
    for name, value in dict[str, Any](opened=[], missing=False, killed="").items():
        monkeypatch.setattr(Process, name, value)
    monkeypatch.setattr(budget_test, "ControlGroup", Group)
    monkeypatch.setattr(budget_test, "Worker", Process)
    return tmp_path / "model"


def within(folder: Path, rounds: int = 2) -> budget_test.Budgeted:
    return decode_within(Budget(10**9, 4), folder, [ROWS[0], ROWS[2]], rounds, 2, "python")


def test_every_row_decodes_within_its_limit_beside_one_accelerate(machine: Path) -> None:
    found = within(machine)
    expected = {"tg3 in 1 GB": {OURS: [10.0, 10.0], LLAMA: [5.0, 5.0], ACCELERATE: [1.25, 1.25]}}
    assert {row: {t: {e: pytest.approx(s) for e, s in one.items()} for t, one in series.items()}
            for row, series in found.series.items()} == {"bf16": expected, "int4": expected}  # fmt: skip
    assert [group.allowed for group in Group.made] == [10**9] * 5 and all(group.ended for group in Group.made)
    assert found.unlimited == "" and set(found.peaks.values()) == {10**9 - 1} and not any(found.missing.values())
    options = dict(Process.opened[-1:])[ACCELERATE]
    assert options["cpu_bytes"] == 5 * 10**8 and options["offload_folder"].endswith("offload")
    assert [o["repack"] for name, o in Process.opened if name == LLAMA] == [False, False]
    assert [(o["weights"], o["dense"]) for name, o in Process.opened if name == OURS] == [
        (ROWS[0].weights, ROWS[0].dense), (ROWS[2].weights, ROWS[2].dense),
    ]  # fmt: skip


def test_engines_that_cannot_be_had_or_need_more_are_named(machine: Path) -> None:
    Process.missing = True
    Group.full = {1}  # ours of the first row
    found = within(machine)
    assert found.missing["bf16"][LLAMA] == "llama.cpp is not here"
    assert "holds more than 1 GB" in found.missing["bf16"][f"{OURS} within the budget"]
    assert list(found.series["bf16"]["tg3 in 1 GB"]) == [ACCELERATE]
    assert list(found.series["int4"]["tg3 in 1 GB"]) == [OURS, ACCELERATE]
    assert "ratio_to" not in summary(found.series["bf16"], OURS)["tg3 in 1 GB"]


def test_a_process_that_the_system_ends_is_named_in_all_rows(machine: Path) -> None:
    Process.killed = ACCELERATE
    found = within(machine)
    for row in ("bf16", "int4"):
        assert list(found.series[row]["tg3 in 1 GB"]) == [OURS, LLAMA]
        assert "ended with status -9 in decode" == found.missing[row][f"{ACCELERATE} within the budget"][-30:]


def test_without_groups_it_says_that_nothing_was_enforced(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> Group:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(budget_test, "ControlGroup", none)
    found = within(machine, 1)
    assert "Permission denied" in found.unlimited and found.peaks == {}
    assert found.series["int4"]["tg3 in 1 GB"][ACCELERATE] == [pytest.approx(1.25)]


def test_one_table_has_all_rivals_and_leaves_out_what_did_not_run() -> None:
    def tests(**rates: list[float]) -> dict[str, Any]:
        return summary({"pp8": {OURS: [10.0], **rates}, "tg3 in 1 GB": {OURS: [4.0], ACCELERATE: [0.5]}}, OURS)

    found = {
        "bf16": {"gguf": "BF16", "tests": tests(**{"transformers eager": [5.0]})},
        "int4": {"gguf": "Q4_0", "tests": tests(**{"transformers batched_mm": [20.0]})},
    }
    made = table("small", found, {"bf16": 30.0, "int4": 31.0})
    heads = [str(column.header) for column in made.columns]
    assert heads == ["", "", OURS, "transformers eager", "transformers batched_mm", ACCELERATE]
    assert heads[3:] == [name for name in RIVALS if name in heads]
    cells = [list(column.cells) for column in made.columns]
    assert cells[3] == ["5.0 (2.00x)", "", "", ""] and cells[4] == ["", "", "20.0 (0.50x)", ""]
    assert cells[5] == ["", "0.5 (8.00x)", "", "0.5 (8.00x)"]
    assert cells[0][0] == "bf16 / BF16\nread limit 30.0 GB/s" and cells[0][1] == ""


def test_a_worker_that_cannot_be_started_is_missing() -> None:
    with pytest.raises(MissingError, match="no-such-python cannot be started"):
        Worker(LLAMA, "no-such-python")
