"""A model larger than the memory allowed: every engine in a control group of its own, which counts its page cache too.

Engines load without a limit (accelerate needs more than the whole model for that, and loading is not the question),
then their files are dropped from the page cache, the groups are limited, and the engines decode in turns. llama.cpp
maps its file and does not repack it: a second copy would not fit. transformers is accelerate's disk offload, in bf16
beside every row. Where no group can be made the budget is only told to accelerate, and the result says so.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.control_group import ControlGroup, evict
from benchmarks.peers.client import Worker
from benchmarks.peers.comparison import ACCELERATE, LLAMA, OURS, Row
from benchmarks.peers.protocol import MissingError
from benchmarks.peers.turns import Series, Test
from benchmarks.reporting import progress

_BODY_SHARE = 0.5  # of the budget for accelerate's resident weights: Python and torch take 0.3 GB, page cache the rest
_PROMPT = 8


@dataclass(frozen=True, slots=True)
class Budget:
    """What is allowed, and the work: new tokens after a short prompt, the first of them not counted."""

    nbytes: int
    new_tokens: int = 6

    @property
    def name(self) -> str:
        """Of the test."""
        return f"tg{self.new_tokens - 1} in {self.nbytes / 1e9:g} GB"


@dataclass(slots=True)
class Budgeted:
    """series: of the rows, tokens/s by engine and round. missing: engines that could not be had, by row and name.
    unlimited: why nothing was enforced; empty where it was. peaks: bytes in use by row and engine, at most.
    """

    series: dict[str, Series] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    unlimited: str = ""
    peaks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Runner:
    """A process with its engine open. row: None for the one that is compared in all rows."""

    row: str | None
    engine: str
    worker: Worker
    group: ControlGroup | None

    @property
    def name(self) -> str:
        return f"{self.row} {self.engine}" if self.row else self.engine


def decode_within(
    budget: Budget, folder: Path, rows: Sequence[Row], rounds: int, threads: int, llama_python: str
) -> Budgeted:
    """Tokens/s of all rows' engines within the budget; a round before the first warms up."""
    found = Budgeted(missing={row.name: {} for row in rows})
    offload = folder.parent / "offload"
    shutil.rmtree(offload, ignore_errors=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, offload, ignore_errors=True)
        runners = list(_open_all(stack, budget, folder, rows, threads, llama_python, found))
        evict(folder.parent)  # checkpoint, packs, GGUF files, what accelerate wrote
        limited = [runner for runner in runners if _limit(runner, budget.nbytes, rows, found)]
        samples: dict[str, list[float]] = {runner.name: [] for runner in limited}
        for number in range(rounds + 1):
            progress(f"{budget.name}: round {number} of {rounds}")
            for runner in list(limited):
                test = Test("decode", _PROMPT, 1, budget.new_tokens)
                try:
                    steps = runner.worker.call("decode", prompts=test.prompts(number), new_tokens=test.new)
                except RuntimeError as error:  # a group of the second version ends what needs more
                    limited.remove(runner)
                    samples.pop(runner.name)
                    _note_missing(runner, str(error).splitlines()[0], rows, found)
                    continue
                if number:
                    samples[runner.name].append(
                        len(steps) / sum(steps)
                    )  # a mean: a step that waits for the disk counts
        found.peaks = {runner.name: runner.group.peak() for runner in limited if runner.group is not None}
    for row in rows:
        of_row = {runner.engine: samples[runner.name] for runner in limited if runner.row in (row.name, None)}
        found.series[row.name] = {budget.name: of_row}
    return found


def _open_all(
    stack: ExitStack, budget: Budget, folder: Path, rows: Sequence[Row], threads: int, llama_python: str,
    found: Budgeted,
) -> Iterator[_Runner]:  # fmt: skip
    """Processes with their models, not limited yet."""
    common = {"folder": str(folder), "threads": threads}
    placement = {"offload_folder": str(folder.parent / "offload"), "cpu_bytes": int(budget.nbytes * _BODY_SHARE)}
    wanted: list[tuple[str | None, str, dict[str, Any]]] = [
        (row.name, OURS, {**common, "weights": row.weights, "dense": row.dense}) for row in rows
    ]
    wanted += [(row.name, LLAMA, {"kind": row.gguf}) for row in rows]
    wanted.append((None, ACCELERATE, {**common, **placement}))
    for number, (row, engine, options) in enumerate(wanted):
        progress(f"{budget.name}: opening {row or ''} {engine}")
        group = None
        try:
            group = stack.enter_context(ControlGroup(f"moe-offload-peers-{number}"))
        except OSError as error:
            found.unlimited = str(error)
        try:
            worker = stack.enter_context(Worker(engine, llama_python) if engine == LLAMA else Worker(engine))
            if group is not None:
                group.add(worker.pid)
            if engine == LLAMA:
                file = worker.call("make_file", folder=str(folder), threads=threads, **options)
                options = {"file": file, "threads": threads, "repack": False}
            evict(folder.parent)  # what is cached already counts for nobody, and stays once this engine has mapped it
            worker.call("open", **options)
        except MissingError as error:
            for each in rows:
                if row in (each.name, None):
                    found.missing[each.name][engine] = str(error)
            continue
        yield _Runner(row, engine, worker, group)


def _limit(runner: _Runner, nbytes: int, rows: Sequence[Row], found: Budgeted) -> bool:
    """Whether it runs within the limit, or without one where there are no groups."""
    if runner.group is None:
        return True
    try:
        runner.group.limit(nbytes)
        runner.group.reset_peak()
    except OSError as error:
        _note_missing(runner, f"it holds more than {nbytes / 1e9:g} GB ({error})", rows, found)
        return False
    return True


def _note_missing(runner: _Runner, reason: str, rows: Sequence[Row], found: Budgeted) -> None:
    for row in rows:
        if runner.row in (row.name, None):
            found.missing[row.name][f"{runner.engine} within the budget"] = reason
