"""How far a benchmark is: a line on the terminal, written between runs.

Not `Activity`, whose thread draws while the work goes on: that would be measured with it.
"""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from moe_offload import terminal
from moe_offload.bench_model import Test

_TO_LINE_START = "\r\x1b[K"  # and nothing on it


class RunProgress:
    """Told of every run of `tests` (see `bench_model.Report`); where stderr is no terminal it says nothing."""

    def __init__(self, tests: Sequence[Test], *, enabled: bool = True) -> None:
        self._tests = list(tests)
        self._console = terminal.console()
        self._enabled = enabled and self._console.is_terminal
        self._since = 0.0
        # seconds of a token in the last run: of prompts, and of generation
        self._pace: dict[bool, float] = {}

    def __call__(self, test: Test, done: int, total: int) -> None:
        now = time.perf_counter()
        if done:
            self._pace[test.new_tokens > 0] = (now - self._since) / _tokens(test)
        self._since = now
        if self._enabled:
            self._write(self.line(test, done, total))

    def line(self, test: Test, done: int, total: int) -> str:
        """What is said when `done` of a test's runs are over."""
        place = self._tests.index(test)
        said = f"{test.name}: run {min(done + 1, total)} of {total}, test {place + 1} of {len(self._tests)}"
        left, known = 0.0, True
        runs = [(test, total - done), *((each, total) for each in self._tests[place + 1 :])]
        for each, count in runs:
            pace = self._pace.get(each.new_tokens > 0)
            known &= pace is not None
            left += count * _tokens(each) * (pace or 0.0)
        if self._pace:
            last = self._pace.get(test.new_tokens > 0)
            rate = f", {1 / last:.3g} t/s" if last else ""
            said += rate
            if known or left >= 1:
                said += f", {'about' if known else 'more than'} {left:.0f} s left"
        return said

    def _write(self, text: str) -> None:
        self._console.file.write(_TO_LINE_START + text[: self._console.width - 1])
        self._console.file.flush()

    def end(self) -> None:
        """Take the line away. Harmless when done twice."""
        if self._enabled:
            self._write("")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _tokens(test: Test) -> int:
    return test.batch * (test.new_tokens or test.prompt_tokens)
