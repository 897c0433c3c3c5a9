"""Seconds of an expert by its rows on one device: measured at some sizes, corrected while the program works."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.correction import Correction

ROWS = 1024  # the last row of a table
BANDS = (1, 2, 5, 17, 65)  # the first number of rows of each band that has a correction of its own
_BAND = np.searchsorted(BANDS, np.arange(ROWS + 1), side="right") - 1
_BAND[0] = 0
_TOLERANCE = 0.01  # tables are made anew when a correction has moved by more
SHORTEST = 1e-9  # seconds: what is less was not measured
_SHARE = 0.2  # a band with less of a job's time learns nothing from it
_WEIGHT_OF_REST = 0.1  # of a job's time: what is left for the experts where the start seems to have taken all


class CostCurve:
    """The time of one expert, by rows; `start` seconds come on top for each job.

    points: {rows: seconds}, at least one, rows ascending from 1 on or above. Noise in them is smoothed upwards: more
    rows never cost less. Between the points times are linear, beyond the last one they follow the last slope.
    """

    def __init__(self, points: Mapping[int, float], start: float = 0.0) -> None:
        if not points:
            raise ValueError("no measured point: give seconds for at least one number of rows")
        for rows, seconds in points.items():
            if not 1 <= rows <= 1 << 20:
                raise ValueError(f"a measured point at {rows} rows: rows are from 1 to {1 << 20}")
            if not (math.isfinite(seconds) and 0 < seconds < 1e6):
                raise ValueError(f"{seconds} seconds at {rows} rows: seconds are positive, finite and below 1e6")
        self.points = dict(sorted(points.items()))
        self.start = start
        self.version = 0
        self._base = _interpolated(self.points)
        self.correction = Correction(len(BANDS))
        self._rebuild()

    @property
    def table(self) -> NDArray[np.float64]:
        """[ROWS + 1] seconds, never falling; read-only, replaced and not changed when there is news."""
        return self._table

    def observe(self, rows: NDArray[np.int64], seconds: float) -> None:
        """A job over several experts, with `rows` each, took `seconds` in all."""
        if len(rows) == 0 or not SHORTEST <= seconds < math.inf:
            return
        try:
            parts, bands = self._raw.take(rows), _BAND.take(rows)
        except IndexError:  # beyond the table
            capped = np.clip(rows, 0, ROWS)
            parts, bands = self._raw[capped] * np.maximum(rows / ROWS, 1.0), _BAND[capped]
        by_band: list[float] = np.bincount(bands, parts, len(BANDS)).tolist()
        expected = sum(by_band)
        if expected <= 0:
            return
        missed = math.log(max(seconds - self.start, _WEIGHT_OF_REST * seconds) / expected)
        least = _SHARE * expected
        for band, part in enumerate(by_band):
            if part >= least:
                self.correction.observe(band, self._applied[band] + missed)
        self._refresh()

    def tick(self) -> None:
        """A measurement of the other device."""
        self.correction.tick()
        self._refresh()

    def restore(self, logs: list[float]) -> None:
        """Go on with corrections that were learned before."""
        self.correction.restore(logs)
        self._rebuild()

    def _refresh(self) -> None:
        for log, applied in zip(self.correction.logs, self._applied, strict=True):
            if abs(log - applied) > _TOLERANCE:
                self._rebuild()
                return

    def _rebuild(self) -> None:
        self._applied = list(self.correction.logs)
        # What is learned from is the curve as it is corrected; what is shown never falls. Learning from the latter, a
        # band that lies below its neighbour would be corrected further and further down.
        self._raw = self._base * np.exp(self._applied)[_BAND]
        self._table = np.maximum.accumulate(self._raw)
        self._table.setflags(write=False)
        self.version += 1


def _interpolated(points: Mapping[int, float]) -> NDArray[np.float64]:
    at = np.array(list(points), np.float64)
    seconds = np.maximum.accumulate(np.array(list(points.values()), np.float64))
    proportion = seconds[-1] / at[-1]
    slope = proportion
    if len(at) > 1:  # a last step that noise made flat or steep says nothing about a thousand rows
        slope = np.clip((seconds[-1] - seconds[-2]) / (at[-1] - at[-2]), 0.5 * proportion, proportion)
    rows = np.arange(ROWS + 1, dtype=np.float64)
    table = np.interp(rows, at, seconds) + slope * np.maximum(rows - at[-1], 0)
    table[0] = 0
    return np.asarray(table)
