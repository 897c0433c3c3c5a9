"""Engines in turns: every test by every engine in each round, so that a drifting machine drifts for all."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Contestant
from benchmarks.reporting import spread

PAUSE = 0.2  # seconds: an engine's idle threads spin for milliseconds and hold the cores of the next


@dataclass(frozen=True, slots=True)
class Test:
    """`sequences` random prompts of `prompt` tokens each, then `new` tokens of each; prefill alone where new is 0."""

    name: str
    prompt: int
    sequences: int = 1
    new: int = 0

    @property
    def step_tokens(self) -> int:
        """Of one forward that is timed."""
        return self.sequences if self.new else self.prompt

    def prompts(self, seed: int) -> list[list[int]]:
        """Random token ids of the random checkpoints' vocabulary."""
        return np.random.default_rng(seed).integers(3, 8000, (self.sequences, self.prompt)).tolist()  # type: ignore[no-any-return]

    def tokens_per_second(self, worker: Contestant, seed: int) -> float:
        """One measurement: of a prompt, or by the median step of decoding."""
        prompts = self.prompts(seed)
        if self.new == 0:
            return self.prompt / float(worker.call("prefill", prompt=prompts[0]))
        return self.sequences / float(median(worker.call("decode", prompts=prompts, new_tokens=self.new)))


FULL = (
    Test("pp128", 128), Test("pp512", 512), Test("tg64", 128, 1, 64),
    *(Test(f"batch {sequences}", 32, sequences, 20) for sequences in (1, 4, 8, 16, 32)),
)  # fmt: skip
SMOKE = (Test("pp16", 16), Test("tg4", 8, 1, 4), Test("batch 2", 8, 2, 4))

Series = dict[str, dict[str, list[float]]]  # test -> engine -> tokens/s by round


def measure(
    workers: Mapping[str, Contestant], tests: tuple[Test, ...], rounds: int, between: Callable[[int], None]
) -> Series:
    """Tokens/s of every test and engine that has memory for it. A round before the first warms up; `between` is called
    before each.
    """
    able = {
        test.name: [name for name, worker in workers.items() if test.step_tokens <= worker.most_tokens]
        for test in tests
    }
    series: Series = {test.name: {name: [] for name in able[test.name]} for test in tests}
    for number in range(rounds + 1):
        between(number)
        for test in tests:
            for name in able[test.name]:
                rate = test.tokens_per_second(workers[name], seed=number)
                time.sleep(PAUSE)
                if number:
                    series[test.name][name].append(rate)
    return series


def summary(series: Series, subject: str) -> dict[str, Any]:
    """For each test: every engine's spread, and the subject's ratio to each other one, round by round."""
    found: dict[str, Any] = {}
    for test, engines in series.items():
        found[test] = {"tokens_per_s": {name: spread(rates) for name, rates in engines.items()}}
        if subject in engines:
            found[test]["ratio_to"] = {
                name: spread([ours / theirs for ours, theirs in zip(engines[subject], rates, strict=True)])
                for name, rates in engines.items()
                if name != subject
            }
    return found
