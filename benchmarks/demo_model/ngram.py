"""The yardstick: an interpolated modified Kneser-Ney n-gram model over the same tokens.

Chen and Goodman's 1998 model: the highest order counts occurrences, lower orders count the
different tokens seen before an n-gram; three discounts per order (for counts 1, 2, 3 and more)
come from the counts of counts; what they free goes to the next lower order.
All counts live in sorted arrays, so that a few million tokens take seconds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
BITS = 12  # per token: five tokens fit an int64


@dataclass(frozen=True, slots=True)
class Level:
    """One order n: n-grams with counts, their contexts with totals and freed mass."""

    grams: Ints  # sorted, packed
    counts: Ints
    contexts: Ints  # sorted, packed n-1 tokens
    totals: Floats  # sum of the counts below a context
    freed: Floats  # probability left to the lower order
    discounts: Floats  # for counts 0, 1, 2, 3 and more

    @classmethod
    def of(cls, grams: Ints, counts: Ints) -> "Level":
        n1, n2, n3, n4 = (max(int((counts == n).sum()), 1) for n in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        raw = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        discounts = np.clip(raw, 0, [0, 1, 2, 3])
        contexts, starts = np.unique(grams >> BITS, return_index=True)
        totals = np.add.reduceat(counts, starts).astype(np.float64)
        freed = np.add.reduceat(discounts[np.minimum(counts, 3)], starts) / totals
        return cls(grams, counts, contexts, totals, freed, discounts)

    def mix(self, grams: Ints, lower: Floats) -> Floats:
        """The probability of each gram's last token, given the lower order's answer."""
        context, known = _find(self.contexts, grams >> BITS)
        gram, seen = _find(self.grams, grams)
        count = np.where(seen, self.counts[gram], 0)
        own = (count - self.discounts[np.minimum(count, 3)]) / self.totals[context]
        return np.where(known, own + self.freed[context] * lower, lower)


class KneserNey:
    """Counts of a training stream; `log_probabilities` scores another stream."""

    def __init__(self, stream: Ints, vocabulary: int, order: int = 5) -> None:
        if not 0 < vocabulary <= 1 << BITS or not 1 <= order <= 5:
            raise ValueError(f"vocabulary {vocabulary} and order {order} must be at most {1 << BITS} and 5")
        self.vocabulary = vocabulary
        self.order = order
        self.levels: list[Level] = []  # orders 1, 2, ... order
        grams, counts = np.unique(_pack(stream, order), return_counts=True)
        for length in range(order, 0, -1):
            self.levels.insert(0, Level.of(grams, counts))
            # distinct grams with the same tail: each stands for one token before that tail
            tails = grams & ((1 << BITS * (length - 1)) - 1)
            grams, counts = np.unique(tails, return_counts=True)

    def log_probabilities(self, stream: Ints) -> Floats:
        """Natural log of the probability of every token but the first."""
        probability = np.full(len(stream) - 1, 1 / self.vocabulary)
        for length, level in enumerate(self.levels, start=1):
            grams = _pack(stream, length)
            # the first tokens have shorter histories and stop at the order that fits
            grams = grams[1:] if length == 1 else grams
            place = slice(len(probability) - len(grams), None)
            probability[place] = level.mix(grams, probability[place])
        return np.asarray(np.log(probability))


def _pack(stream: Ints, length: int) -> Ints:
    """All n-grams of a stream, each in one integer, the last token in the lowest bits."""
    count = len(stream) - length + 1
    packed = np.zeros(count, dtype=np.int64)
    for offset in range(length):
        packed = packed << BITS | stream[offset : offset + count]
    return packed


def _find(table: Ints, keys: Ints) -> tuple[Ints, np.ndarray[Any, np.dtype[np.bool_]]]:
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return index, table[index] == keys
