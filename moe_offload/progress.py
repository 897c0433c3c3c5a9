"""A line on the terminal for work that lasts: what is done, how much of it, its rate and the time
left.

It appears when the work has lasted a second, and is gone when the work is done. Where stderr is no
terminal there is none.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from moe_offload import terminal
from moe_offload.memory import format_bytes

BYTES = "bytes"  # the unit that is shown as MB or GB

_DELAY = 1.0  # seconds before a line appears: nobody wants a flicker
_PERIOD = 0.1

# How far: (done, total, unit); total None where nobody knows.
Amount = tuple[float, float | None, str]


class Activity:
    """Shows one piece of work: `with Activity("loading demo") as activity: ...`.

    Either the work says how far it is (`update`), or `measure` is asked, from a thread of this
    class.
    """

    def __init__(self, what: str, *, enabled: bool = True, measure: Callable[[], Amount] | None = None) -> None:
        self._what = what
        self._measure = measure
        self._amount: Amount = (0, None, "")
        self._enabled = enabled and terminal.console().is_terminal
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def update(self, what: str, done: float, total: float | None, unit: str = "") -> None:
        """Say what is being done and how far it is."""
        self._what = what
        self._amount = (done, total, unit)

    def __enter__(self) -> Self:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Take the line away. Harmless when done twice."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _show(self) -> None:
        kind, since = "", time.perf_counter()
        if self._ended.wait(_DELAY):
            return
        with _line() as line:
            task = line.add_task("", pace="")
            while not self._ended.wait(_PERIOD):
                done, total, unit = self._measure() if self._measure else self._amount
                if kind and unit != kind:  # other work has a rate of its own
                    since = time.perf_counter()
                kind = unit
                pace = _pace(done, total, unit, time.perf_counter() - since)
                line.update(task, description=self._what, completed=done, total=total, pace=pace)


def _pace(done: float, total: float | None, unit: str, seconds: float) -> str:
    """How much of how much, how fast on the whole, and how long that leaves."""
    if not total:
        return ""
    text = f"{format_bytes(done)} of {format_bytes(total)}" if unit == BYTES else f"{done:.0f}/{total:.0f} {unit}"
    if done and seconds:
        rate = f"{done / seconds / 1e9:.3g} GB" if unit == BYTES else f"{done / seconds:.3g}"
        text += f", {rate}/s, {(total - done) * seconds / done:.0f} s left"
    return text


def _line() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        _BarWhenKnown(bar_width=24),
        TextColumn("{task.fields[pace]}", style="cyan"),
        TimeElapsedColumn(),
        console=terminal.console(),
        transient=True,
    )


class _BarWhenKnown(BarColumn):
    def render(self, task: Task) -> "ProgressBar | Text":  # type: ignore[override]
        return super().render(task) if task.total else Text()
