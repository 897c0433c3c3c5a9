"""Factors on calibrated times that follow what is measured while the program works.

A factor belongs to a band of sizes and is kept as a logarithm. Every measurement says which factor would have been
right. The median of the last few of those is where the factor goes, by a bounded share of the way: one hiccup of any
size leaves the median where it was, and a lasting change has it after half a window. Factors begin at 1, which is the
calibration.
"""

import math

WINDOW = 7  # measurements behind a median
STALE = 1 << 14  # measurements after which a band without any of its own begins to be forgotten: some hundred tokens
_MIDDLE = WINDOW // 2
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
        self._followers: list[list[int]] = [[] for _ in range(bands)]  # bands never seen, with the one nearest to them
        self._fresh = [False] * bands  # since the last look for stale ones
        self._since_look = 0

    def observe(self, band: int, log_factor: float) -> None:
        """A measurement in `band` that a factor of exp(log_factor) would have explained."""
        if not self._seen[band]:
            self._begin(band)
        recent, place = self._recent[band], self._next[band]
        recent[place] = min(max(log_factor, -_LIMIT), _LIMIT)
        self._next[band] = place + 1 if place + 1 < WINDOW else 0
        log = self.logs[band]
        log += min(max(_GAIN * (sorted(recent)[_MIDDLE] - log), -_STEP), _STEP)
        self.logs[band] = log
        for follower in self._followers[band]:
            self.logs[follower] = log
        self._fresh[band] = True
        self.tick()

    def tick(self) -> None:
        """A measurement elsewhere, by which the bands here grow old."""
        self._since_look += 1
        if self._since_look >= STALE:
            self._forget()

    def restore(self, logs: list[float]) -> None:
        """Go on from what another correction had come to."""
        self.logs = [min(max(log, -_LIMIT), _LIMIT) for log in logs]
        self._recent = [[log] * WINDOW for log in self.logs]

    def _begin(self, band: int) -> None:
        self._seen[band] = True
        self._recent[band] = [self.logs[band]] * WINDOW
        known = [other for other, seen in enumerate(self._seen) if seen]
        self._followers = [[] for _ in self._seen]
        for other, seen in enumerate(self._seen):
            if not seen:
                self._followers[min(known, key=lambda near: abs(near - other))].append(other)

    def _forget(self) -> None:
        self._since_look = 0
        for band, fresh in enumerate(self._fresh):
            if not fresh:
                self.logs[band] *= _FORGET
                self._recent[band] = [_FORGET * log for log in self._recent[band]]
        for band, followers in enumerate(self._followers):
            for follower in followers:
                self.logs[follower] = self.logs[band]
        self._fresh = [False] * len(self._fresh)
