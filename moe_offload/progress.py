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
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from moe_offload import terminal

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
        if self._ended.wait(_DELAY):
            return
        with _bars() as bars:
            shown, task = "", bars.add_task("")
            while not self._ended.wait(_PERIOD):
                what, (done, total, unit) = (
                    self._what,
                    self._measure() if self._measure else self._amount,
                )
                if what != shown:  # another piece of work has a rate and an end of its own
                    bars.remove_task(task)
                    shown, task = what, bars.add_task(what, total=total, unit=unit)
                bars.update(task, completed=done, total=total, unit=unit)


def _bars() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        _BarWhenKnown(bar_width=24),
        _Rate(),
        TimeElapsedColumn(),
        _TimeLeft(),
        console=terminal.console(),
        transient=True,
    )


class _BarWhenKnown(BarColumn):
    def render(self, task: Task) -> "Text":  # type: ignore[override]
        return super().render(task) if task.total else Text()  # type: ignore[return-value]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit")
        if not unit or not task.total:
            return Text()
        speed = task.speed or 0
        digits = 0 if speed >= 100 else 1
        return Text(f"{task.completed:.0f}/{task.total:.0f} {unit}, {speed:.{digits}f}/s", style="cyan")


class _TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        if not task.total:
            return Text()
        return Text.assemble("left ", super().render(task))


def seconds_since(started: float) -> float:
    """Seconds since `started`, a time.perf_counter()."""
    return time.perf_counter() - started
