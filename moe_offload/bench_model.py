"""How fast a loaded model reads prompts and writes text: `moe-offload bench`, and benchmarks.

The protocol, test by test: warm-ups that count for nothing, then the repeats, each with sequences that no run before it
had, lest a cache know them (`bench_generation.py` has the protocol of a run). What memory gives is sampled between the
repeats, because neighbours move it.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_offload.bench_generation import Sample, timed_generation
from moe_offload.bench_resources import Limits, Meter, Resource
from moe_offload.bench_text import RandomTokens, Tokens, standard_library
from moe_offload.cpu_kernels.bandwidth import ReadLimit
from moe_offload.memory import detect_memory
from moe_offload.models.errors import OptionError
from moe_offload.prompts import max_context

DEPTH = 32  # tokens before the first that is generated, where nothing else is said
_FROM_DISK = 0.01  # of the weights read, below which the disk does not matter
LIMIT_MIB = 512  # of memory to measure the read limit with; less where less is free

# report(test, runs done, runs in all): called between runs, never in one
Report = Callable[["Test", int, int], None]


@dataclass(frozen=True, slots=True)
class Test:
    """A prompt of `prompt_tokens` in each of `batch` sequences, and `new_tokens` steps behind it; 0: the prompt alone.

    Raises OptionError for values out of bounds.
    """

    __test__: ClassVar[bool] = False  # for pytest, which takes the name for its own

    prompt_tokens: int
    new_tokens: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("tokens of the prompt", self.prompt_tokens, 1), ("new tokens", self.new_tokens, 0),
            ("sequences in a batch", self.batch, 1),
        ):  # fmt: skip
            if value < least:
                raise OptionError(f"{value} {name}: {least} is the least")

    @property
    def name(self) -> str:
        """As llama-bench calls it, @ before the sequences: pp512, tg128, tg128@16; d512: generation behind 512."""
        batch = f"@{self.batch}" if self.batch > 1 else ""
        if not self.new_tokens:
            return f"pp{self.prompt_tokens}{batch}"
        return f"tg{self.new_tokens}{batch}" + (f" d{self.prompt_tokens}" if self.prompt_tokens != DEPTH else "")

    @property
    def length(self) -> int:
        """Tokens of a sequence, the first generated one among them."""
        return self.prompt_tokens + 1 + self.new_tokens


@dataclass(frozen=True, slots=True)
class TestResult:
    """What a test's repeats gave. `limits` are of the time in which it ran."""

    __test__: ClassVar[bool] = False

    test: Test
    samples: tuple[Sample, ...]
    limits: Limits

    @property
    def name(self) -> str:
        return self.test.name

    @property
    def prompt_tokens(self) -> int:
        return self.test.prompt_tokens

    @property
    def new_tokens(self) -> int:
        """Steps behind the first token; 0 in tests of a prompt."""
        return self.test.new_tokens

    @property
    def batch(self) -> int:
        return self.test.batch

    @property
    def tokens(self) -> int:
        """That a repeat is timed for, over all sequences."""
        return self.batch * (self.new_tokens or self.prompt_tokens)

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each repeat."""
        return tuple(sample.seconds for sample in self.samples)

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """Of each repeat."""
        return tuple(self.tokens / seconds for seconds in self.seconds)

    @property
    def median(self) -> float:
        """Tokens a second."""
        return median(self.tokens_per_second)

    @property
    def mean(self) -> float:
        """Tokens a second, as llama-bench gives them."""
        return mean(self.tokens_per_second)

    @property
    def deviation(self) -> float:
        """Standard deviation of the repeats' tokens a second, as of a sample; 0 with one repeat."""
        return stdev(self.tokens_per_second) if len(self.samples) > 1 else 0.0

    @property
    def first_seconds(self) -> float:
        """Median time to the first token."""
        return median(sample.first_seconds for sample in self.samples)

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step of generation; None in tests of a prompt."""
        return median(self.seconds) / self.new_tokens if self.new_tokens else None

    @property
    def hit_rate(self) -> float | None:
        """Share of the wanted experts that were on the device; None without one."""
        wanted = sum(sample.traffic.wanted for sample in self.samples)
        return sum(sample.traffic.found for sample in self.samples) / wanted if wanted else None

    @property
    def resources(self) -> tuple[Resource, ...]:
        """Median rates of reading weights and copying them; link and device only where there is one, the disk only
        where a part of the weights came from it.
        """
        traffic = [sample.traffic for sample in self.samples]
        named = [("CPU memory", "cpu")]
        if any(each.device for each in traffic):
            named += [("link", "link"), ("device memory", "device")]
        if sum(each.disk for each in traffic) > _FROM_DISK * sum(each.cpu + each.device for each in traffic):
            named.append(("disk", "disk"))
        return tuple(
            Resource(
                name,
                median(getattr(sample.traffic, key) / sample.seconds / 1e9 for sample in self.samples),
                getattr(self.limits, key),
            )
            for name, key in named
        )


class ModelBench:
    """Runs tests on a loaded model (`model.offload` is its engine), one after the other; what there is stays."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        repeats: int = 5,
        *,
        warm_ups: int = 1,
        limit_mib: int = LIMIT_MIB,
        report: Report | None = None,
    ) -> None:
        """limit_mib: memory to measure the CPU's read limit with, at most; 0: it is not measured.

        Raises OptionError for values out of bounds.
        """
        for name, value, least in (("repeats", repeats, 1), ("warm-ups", warm_ups, 0)):
            if value < least:
                raise OptionError(f"{value} {name}: {least} is the least")
        self.model, self.meter = model, Meter(model)
        self._tokens, self._repeats, self._warm_ups, self._report = tokens, repeats, warm_ups, report
        free = detect_memory().available >> 20
        self._limit_mib = 0 if self.meter.simulated else min(limit_mib, free // 4)
        self._samples: dict[Test, list[Sample]] = {}
        self._limits: dict[Test, Limits] = {}

    def run(self, tests: Sequence[Test]) -> None:
        """All of them; may be interrupted. Raises OptionError where one does not fit in the model's context."""
        for test in tests:
            require_context(test, max_context(self.model.config))
        for test in tests:
            self._run(test)

    def results(self) -> list[TestResult]:
        """Of the tests that have a sample."""
        return [
            TestResult(test, tuple(samples), self._limits.get(test, Limits()))
            for test, samples in self._samples.items()
            if samples
        ]

    def _run(self, test: Test) -> None:
        engine: Any = self.model.offload
        samples = self._samples[test] = []
        runs = self._warm_ups + self._repeats
        with contextlib.ExitStack() as stack:
            limit = stack.enter_context(ReadLimit(engine.team, self._limit_mib)) if self._limit_mib >= 16 else None
            for number in range(runs):
                if self._report is not None:
                    self._report(test, number, runs)
                sample = self._once(test)
                if number >= self._warm_ups:
                    samples.append(sample)
                    if limit is not None:
                        limit.sample()
                    self._limits[test] = self.meter.limits(None if limit is None else limit.gb_per_s())
        if self._report is not None:
            self._report(test, runs, runs)

    def _once(self, test: Test) -> Sample:
        return timed_generation(self.model, self.meter, self._tokens.take(test.batch, test.length), test.prompt_tokens)


def require_context(test: Test, context: int | None) -> None:
    """Raise OptionError for a test that does not fit in the model's context."""
    if context is not None and test.length > context:
        raise OptionError(
            f"{test.name} needs {test.length} tokens of context, and the model's holds {context}: take fewer tokens"
        )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tests: Sequence[Test],
    repeats: int = 5,
    *,
    warm_ups: int = 1,
    limit_mib: int = LIMIT_MIB,
    report: Report | None = None,
) -> list[TestResult]:
    """Run tests on a loaded model, with text of Python's standard library; without a tokenizer with random tokens.

    Raises OptionError for values out of bounds and tests longer than the model's context.
    """
    tokens = RandomTokens(model.config) if tokenizer is None else standard_library(tokenizer, model.config)
    bench = ModelBench(model, tokens, repeats, warm_ups=warm_ups, limit_mib=limit_mib, report=report)
    bench.run(tests)
    return bench.results()
