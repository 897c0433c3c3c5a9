"""How fast the link is, from the last copies."""

from collections import deque

import numpy as np


class LinkRate:
    """Running median over the last `window` copies, where each counts as much as its bytes.

    So the many short copies at the ends of records do not hide what a long one shows, and a hiccup moves nothing.
    """

    def __init__(self, guess: float, window: int = 64) -> None:
        if not guess > 0:
            raise ValueError(f"a link of {guess} bytes a second; it must be above 0")
        self._value: float | None = guess
        self._samples: deque[tuple[float, int]] = deque(maxlen=window)

    def add(self, nbytes: int, seconds: float) -> None:
        """A copy of `nbytes` took `seconds`, waiting apart."""
        if seconds > 0:
            self._samples.append((nbytes / seconds, nbytes))
            self._value = None

    @property
    def samples(self) -> int:
        """How many copies the value rests on; 0: it is the guess."""
        return len(self._samples)

    @property
    def value(self) -> float:
        """Bytes a second."""
        if self._value is None:
            rates, weights = np.array(sorted(self._samples)).T
            total = np.cumsum(weights)
            self._value = float(rates[np.searchsorted(total, total[-1] / 2)])
        return self._value
