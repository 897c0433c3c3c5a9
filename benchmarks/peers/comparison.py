"""One row of the comparison: formats of one size in each engine, checked against exact logits, then timed in turns."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.peers.agreement import Agreement, Logits, distance, from_other_rounding, from_same_weights
from benchmarks.peers.client import Implementation, Worker
from benchmarks.peers.gguf_file import ARCHITECTURES
from benchmarks.peers.protocol import Contestant, MissingError
from benchmarks.peers.reference import exact_logits
from benchmarks.peers.stored import read_config
from benchmarks.peers.turns import Test, measure, summary
from benchmarks.reporting import progress
from moe_offload.cpu_kernels.bandwidth import ReadLimit
from moe_offload.options import Dense, Weights

OURS, LLAMA, TRANSFORMERS, ACCELERATE = "moe_offload", "llama.cpp", "transformers", "accelerate"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Columns, in their order; accelerate runs only where memory is limited (budget.py).
RIVALS = (LLAMA, *(f"{TRANSFORMERS} {name}" for name in IMPLEMENTATIONS), ACCELERATE)
_BATCHED_BYTES = 3 << 30  # for copies of weights: batched_mm makes one of every token's experts
_MEMORY_SHARE = 0.75  # mapped files that push each other out of memory would be timed as disks


@dataclass(frozen=True, slots=True)
class Row:
    """weights, dense: moe_offload's formats of experts and of all other linears. gguf: llama.cpp's type."""

    name: str
    weights: Weights
    dense: Dense
    gguf: str


ROWS = (
    Row("bf16", "auto", "auto", "BF16"),
    Row("int8", "int8", "int8", "Q8_0"),
    Row("int4", "int4", "int4", "Q4_0"),
)


class DisagreementError(Exception):
    """Engines do not compute the same model: their speeds must not be compared."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all rows share.

    folder: the checkpoint. llama_python: the interpreter with llama-cpp-python. prompts: for the check of agreement.
    exact: logits from the unrounded weights. noise: transformers' distance from them in bf16, with eager experts.
    """

    folder: Path
    threads: int
    llama_python: str
    prompts: list[list[int]]
    exact: Logits
    noise: float

    @classmethod
    def prepare(cls, folder: Path, threads: int, llama_python: str, prompts: list[list[int]]) -> "Bench":
        """Compute the exact logits, and how far transformers' bf16 is from them."""
        progress("exact logits in f32, layer by layer")
        torch.set_num_threads(threads)
        exact = exact_logits(folder, prompts, "BF16")
        progress("transformers' distance from them")
        with Worker(TRANSFORMERS) as worker:
            worker.call("open", folder=str(folder), threads=threads)
            noise = distance(Implementation(worker, "eager").logits(prompts), exact)
        return cls(folder, threads, llama_python, prompts, exact, noise)

    def run(self, row: Row, tests: tuple[Test, ...], rounds: int, limit: ReadLimit) -> dict[str, Any]:
        """Agreement, engines and figures of a row. Raises DisagreementError before anything is timed."""
        missing: dict[str, str] = {}
        with ExitStack() as stack:
            workers: dict[str, Contestant] = {OURS: self._open_ours(row, stack)}
            size = _stored_bytes(self.folder)
            try:
                workers[LLAMA], llama_size = self._open_llama(row, stack)
            except MissingError as error:
                missing[LLAMA], llama_size = str(error), 0
            if _fits(2 * max(llama_size, 1) + size + _BATCHED_BYTES):
                workers.update(self._open_transformers(stack))
            else:
                missing[TRANSFORMERS] = f"{size / 1e9:.1f} GB do not fit in memory beside the other engines"
            agreement = self._agreement(row, workers)
            for name, text in missing.items():
                progress(f"{row.name}: without {name}: {text}")

            def between(number: int) -> None:
                progress(f"{row.name}: round {number} of {rounds}")
                limit.sample()

            series = measure(workers, tests, rounds, between)
            engines = {name: worker.call("describe") for name, worker in workers.items()}
        return {
            "gguf": row.gguf,
            "missing": missing,
            "engines": engines,
            "agreement": {
                name: {"distance": one.distance, "bound": one.bound, "greedy_equal": one.greedy}
                for name, one in agreement.items()
            },
            "tests": summary(series, OURS),
        }

    def _agreement(self, row: Row, workers: dict[str, Contestant]) -> dict[str, Agreement]:
        progress(f"{row.name}: do the engines agree?")
        rounded = self.exact if row.gguf == "BF16" else exact_logits(self.folder, self.prompts, row.gguf)
        found = {}
        for name, worker in workers.items():
            logits = worker.logits(self.prompts)
            if name == LLAMA:
                found[name] = from_same_weights(logits, rounded, row.gguf, self.noise)
            elif name != OURS:  # transformers, in bf16; its answer may end before the prompts do
                exact = self.exact[:, : logits.shape[1]]
                found[name] = from_same_weights(logits, exact, "BF16", self.noise)
            else:
                found[name] = from_other_rounding(logits, self.exact, rounded, row.gguf, self.noise)
            progress(f"{row.name}: {name}: {found[name]}")
        for name, one in found.items():
            if not one.holds:
                raise DisagreementError(f"{row.name}: {name} computes another model: {one}")
        return found

    def _open_ours(self, row: Row, stack: ExitStack) -> Worker:
        progress(f"{row.name}: opening {OURS}")
        worker = stack.enter_context(Worker(OURS))
        worker.call("open", folder=str(self.folder), weights=row.weights, dense=row.dense, threads=self.threads)
        return worker

    def _open_llama(self, row: Row, stack: ExitStack) -> tuple[Worker, int]:
        """The worker, and the bytes of its file."""
        progress(f"{row.name}: writing and opening {row.gguf}")
        worker = stack.enter_context(Worker(LLAMA, self.llama_python))
        file = worker.call("make_file", folder=str(self.folder), kind=row.gguf, threads=self.threads)
        worker.call("open", file=file, threads=self.threads)
        return worker, Path(file).stat().st_size

    def _open_transformers(self, stack: ExitStack) -> dict[str, Contestant]:
        """One model in memory, a contestant for each of its experts implementations."""
        progress(f"opening {TRANSFORMERS}")
        worker = stack.enter_context(Worker(TRANSFORMERS))
        worker.call("open", folder=str(self.folder), threads=self.threads)
        most = {"batched_mm": _BATCHED_BYTES // _bytes_per_token(self.folder)}
        return {
            f"{TRANSFORMERS} {name}": Implementation(worker, name, most.get(name, math.inf)) for name in IMPLEMENTATIONS
        }


def _bytes_per_token(folder: Path) -> int:
    """bf16 weights of one token's experts in a layer."""
    config = read_config(folder)
    inner = config[ARCHITECTURES[config["model_type"]].inner]
    return 2 * 3 * int(config["num_experts_per_tok"]) * int(config["hidden_size"]) * int(inner)


def _stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _fits(needed: int) -> bool:
    return needed < _MEMORY_SHARE * int(psutil.virtual_memory().total)
