"""Which experts to copy before anybody asks for them: what the link can carry in time, most seconds saved first.

An expert that is on the device when its layer runs saves what the CPU takes for it more than the device, times the
probability that it has any token at all. A copy is worth its place in the queue when it can arrive in time and saves
more than the slot's present content is expected to save over the same stretch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.layer_plan import LayerCosts


@dataclass(frozen=True, slots=True)
class Candidate:
    """An expert worth copying. `saves`: expected seconds for its layer's next run; `keep`: for every run from then."""

    layer: int
    expert: int
    saves: float
    keep: float


def savings(presence: NDArray[np.float64], rows: NDArray[np.float64], costs: LayerCosts) -> NDArray[np.float64]:
    """Seconds that each expert [E] saves per step when it is on the device; never negative.

    presence: probability of at least one token. rows: expected tokens (of all, so rows / presence is that of an active
    expert).
    """
    active = np.rint(rows / np.maximum(presence, 1e-9)).astype(np.int64)
    last = len(costs.cpu) - 1
    index = np.clip(active, 1, last)
    beyond = np.maximum(active / last, 1.0)
    gained = (costs.cpu[index] - costs.gpu[index]) * beyond
    return np.asarray(presence * np.maximum(gained, 0.0))


def choose(
    layer: int,
    saved: NDArray[np.float64],
    keep: NDArray[np.float64],
    absent: NDArray[np.bool_],
    seconds: float,
    copy: float,
    least: float,
) -> list[Candidate]:
    """The absent experts of one layer that are worth a copy, best first: as many as `seconds` of the link carry.

    saved, keep [E]: expected seconds as of `Candidate`. copy: seconds of one copy. least: saving below which a copy is
    not worth it.
    """
    most = int(seconds / copy) if copy > 0 else len(saved)
    if most < 1:
        return []
    worth = np.flatnonzero(absent & (saved > least))
    if len(worth) > most:
        best = np.argpartition(saved[worth], len(worth) - most)[len(worth) - most :]
        worth = worth[best]
    worth = worth[np.argsort(-saved[worth], kind="stable")]
    return [Candidate(layer, int(e), float(saved[e]), float(keep[e])) for e in worth]


_TRUST = 16.0  # prefetches: what the forecast's word weighs before any was seen
_FORGET = 0.97  # of what prefetches came to, at each
_RETRY = 0.0005  # of it, at each layer
_LEAST = 0.01


class Yield:
    """Which share of what forecasts promise prefetches bring: some come late, and the best of guesses are too high."""

    def __init__(self) -> None:
        self._came = self._promised = _TRUST

    @property
    def share(self) -> float:
        """Above 0, at most 1."""
        return min(max(self._came / self._promised, _LEAST), 1.0)

    def observe(self, promised: float, came: bool) -> None:
        """A prefetched expert was there and wanted, or not, where the forecast had said so with this probability."""
        self._came = self._came * _FORGET + came
        self._promised = self._promised * _FORGET + promised

    def tick(self) -> None:
        """A layer has run: what did not pay once may pay later."""
        self._came += _RETRY * (_TRUST - self._came)
        self._promised += _RETRY * (_TRUST - self._promised)


class Booking:
    """What the link may be given ahead of time at one layer: until the next one, when more is known, and no further.

    pace: seconds from layer to layer. busy: of the link, for what was submitted or waits. slots: for copies ahead.
    """

    def __init__(self, pace: float, busy: float, slots: int) -> None:
        self._pace, self._free, self._slots = pace, pace - busy, slots

    def seconds(self, distance: int, copy: float) -> float:
        """For copies of an expert of the layer that runs so many layers later, which arrive in time.

        The last one of those for layers beyond the next may take longer than until then, so that the link has work.
        """
        in_time = self._free + (distance - 1) * self._pace
        return max(min(self._slots * copy, self._free + copy, in_time), 0.0)

    def take(self, copy: float) -> None:
        """One copy is queued."""
        self._free -= copy
        self._slots -= 1


_NEWEST = 0.1  # how much the newest measurement of the host's time counts


class CopyEffort:
    """Seconds of the host for one copy ahead, which the CPU's experts wait for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._without = 0.0  # of looking ahead without any

    def observe(self, seconds: float, copies: float) -> None:
        """Looking ahead at one layer took so long, and gave the link so many copies."""
        if copies > 0:
            self.seconds = _follow(self.seconds, max(seconds - self._without, 0.0) / copies)
        else:
            self._without = _follow(self._without, seconds)


def _follow(known: float, newest: float) -> float:
    return known + _NEWEST * (newest - known) if known else newest
