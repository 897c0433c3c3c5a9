"""Factors on calibrated times that follow what is measured while the program works.

A factor belongs to a band of sizes and is kept as a logarithm. Every measurement says which factor would have been
right. The median of the last few of those is where the factor goes, by a bounded share of the way: one hiccup of any
size leaves the median where it was, and a lasting change has it after half a window. Factors begin at 1, which is the
calibration.
"""

import math

WINDOW = 7  # measurements behind a median
STALE = 512  # measurements of the curve after which a band without any of its own is forgotten by degrees
_GAIN = 0.2  # share of the way to the median, per measurement
_STEP = 0.1  # the most that a measurement moves the logarithm
_LIMIT = math.log(64)  # calibration and truth are never further apart than this
_FORGET = 0.8  # what is left of a stale factor's logarithm after STALE measurements


class Correction:
    """Logarithms of factors, one per band.

    A band that was never measured has the factor of the nearest one that was. One that is not measured any more goes
    back to the calibration slowly: where a device looked slow for a while, it would otherwise never be tried again.
    """

    def __init__(self, bands: int) -> None:
        self.logs = [0.0] * bands
        self._recent = [[0.0] * WINDOW for _ in range(bands)]
        self._next = [0] * bands
        self._seen = [False] * bands  # ever
        self._fresh = [False] * bands  # since the last look for stale ones
        self._since_look = 0

    def observe(self, band: int, log_factor: float) -> None:
        """A measurement in `band` that a factor of exp(log_factor) would have explained."""
        recent = self._recent[band]
        place = self._next[band]
        recent[place] = min(max(log_factor, -_LIMIT), _LIMIT)
        self._next[band] = place + 1 if place + 1 < WINDOW else 0
        way = _GAIN * (sorted(recent)[WINDOW // 2] - self.logs[band])
        self.logs[band] += min(max(way, -_STEP), _STEP)
        self._fresh[band] = True
        if not self._seen[band]:
            self._seen[band] = True
        if not all(self._seen):
            self._spread()
        self.tick()

    def tick(self) -> None:
        """A measurement elsewhere, by which the bands here grow old."""
        self._since_look += 1
        if self._since_look >= STALE:
            self._since_look = 0
            self._forget()

    def restore(self, logs: list[float]) -> None:
        """Go on from what another correction had come to."""
        self.logs = [min(max(log, -_LIMIT), _LIMIT) for log in logs]
        self._recent = [[log] * WINDOW for log in self.logs]
        self._seen = [True] * len(logs)

    def _spread(self) -> None:
        known = [band for band, seen in enumerate(self._seen) if seen]
        for band, seen in enumerate(self._seen):
            if not seen:
                nearest = min(known, key=lambda other: abs(other - band))
                self.logs[band] = self.logs[nearest]
                self._recent[band] = [self.logs[nearest]] * WINDOW

    def _forget(self) -> None:
        for band, fresh in enumerate(self._fresh):
            if not fresh:
                self.logs[band] *= _FORGET
                self._recent[band] = [_FORGET * log for log in self._recent[band]]
        self._fresh = [False] * len(self._fresh)
