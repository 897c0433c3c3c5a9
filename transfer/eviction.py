"""Which expert leaves the device when another one needs its slot.

An eviction knows experts, not slots: each expert of the model has one id, layer after layer. Time is counted in turns:
layer l of step s is turn s * L + l, since the layers of a model run in a cycle. The cache tells what was wanted and
what was filled, and asks for the victim among the experts that may go.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_LARGE = 1e200  # where the growing weights of LFU are scaled back
_FAR = 1 << 44  # more than the turns of any life


@dataclass(frozen=True, slots=True)
class ExpertIds:
    """Ids of the experts of L layers: expert e of layer l is first[l] + e. layer_of: [ids]."""

    first: tuple[int, ...]  # [L + 1]
    layer_of: NDArray[np.int64]

    @staticmethod
    def of(experts: tuple[int, ...]) -> "ExpertIds":
        """`experts`: how many each layer has."""
        layers = np.repeat(np.arange(len(experts)), experts)
        return ExpertIds((0, *(int(end) for end in np.cumsum(experts))), layers.astype(np.int64))

    @property
    def layers(self) -> int:
        """L"""
        return len(self.first) - 1

    def __len__(self) -> int:
        return len(self.layer_of)


class Eviction(Protocol):
    """A way to choose. `start` comes first, and once."""

    name: str

    def start(self, ids: ExpertIds) -> None:
        """Begin with nothing known."""

    def wanted(self, ids: NDArray[np.int64], turn: int) -> None:
        """These experts (no one twice) have tokens in the layer of this turn, in a slot or not."""

    def filled(self, expert: int, turn: int) -> None:
        """This expert gets a slot."""

    def victim(self, candidates: NDArray[np.int64], turn: int) -> int:
        """The position in `candidates` (ids, at least one) of the expert to go."""

    def score(self, expert: int, turn: int) -> float:
        """How much the expert is worth keeping, on this way's own scale: the victim has the least."""


class Lru:
    """Least recently wanted, or filled."""

    name = "lru"

    def start(self, ids: ExpertIds) -> None:
        self._last = np.full(len(ids), -1, np.int64)

    def wanted(self, ids: NDArray[np.int64], turn: int) -> None:
        self._last[ids] = turn

    def filled(self, expert: int, turn: int) -> None:
        self._last[expert] = turn

    def victim(self, candidates: NDArray[np.int64], turn: int) -> int:
        return int(self._last.take(candidates).argmin())

    def score(self, expert: int, turn: int) -> float:
        return float(self._last[expert])


class Lfu:
    """Least frequently wanted, where a time counts half after `half_life` steps. Remembers experts without a slot, too.

    Rather than shrinking all counts at each step, a new time counts more than the ones before it.
    """

    name = "lfu"

    def __init__(self, half_life: float = 64.0) -> None:
        if not half_life > 0:
            raise ValueError(f"half_life is {half_life} steps; it must be above 0")
        self._half_life = half_life

    def start(self, ids: ExpertIds) -> None:
        self._count = np.zeros(len(ids))
        self._turns = self._half_life * ids.layers
        self._origin = 0  # the turn whose times count 1

    def _weight(self, turn: int) -> float:
        return float(2.0 ** min((turn - self._origin) / self._turns, 1000.0))

    def wanted(self, ids: NDArray[np.int64], turn: int) -> None:
        weight = self._weight(turn)
        if weight > _LARGE:
            self._count /= weight
            self._origin, weight = turn, 1.0
        self._count[ids] += weight

    def filled(self, expert: int, turn: int) -> None:
        pass

    def victim(self, candidates: NDArray[np.int64], turn: int) -> int:
        return int(self._count.take(candidates).argmin())

    def score(self, expert: int, turn: int) -> float:
        return float(self._count[expert]) / self._weight(turn)


class LeastStale:
    """What belongs to the layer whose turn is the furthest away, that is the one that ran last.

    Within it, the least recently wanted.
    """

    name = "least-stale"

    def start(self, ids: ExpertIds) -> None:
        self._ids = ids
        self._last = np.full(len(ids), -1, np.int64)
        # Turns from a layer's turn until layer m's next: a window of this.
        # Far above all turns, so that one sum orders by both.
        self._distances = np.tile(np.arange(ids.layers, dtype=np.int64), 2) * _FAR

    def wanted(self, ids: NDArray[np.int64], turn: int) -> None:
        self._last[ids] = turn

    def filled(self, expert: int, turn: int) -> None:
        self._last[expert] = turn

    def victim(self, candidates: NDArray[np.int64], turn: int) -> int:
        layers = self._ids.layers
        at = layers - 1 - turn % layers
        distance = self._distances[at : at + layers].take(self._ids.layer_of.take(candidates))
        return int((self._last.take(candidates) - distance).argmin())

    def score(self, expert: int, turn: int) -> float:
        layers = self._ids.layers
        return -float((self._ids.layer_of[expert] - turn - 1) % layers)


class Score:
    """The least benefit per slot, as the scheduler says: it knows frequency, recency and what is predicted.

    Equal scores: least stale.
    """

    name = "score"

    def start(self, ids: ExpertIds) -> None:
        self._ids = ids
        self._score = np.zeros(len(ids))
        self._ties = LeastStale()
        self._ties.start(ids)

    def set_scores(self, layer: int, scores: NDArray[np.float64]) -> None:
        """Seconds per step that a slot of each expert of the layer is expected to save, [E]. Copied."""
        row = self._score[self._ids.first[layer] : self._ids.first[layer + 1]]
        if scores.shape != row.shape:
            raise ValueError(f"scores of layer {layer} have the shape {scores.shape}; it has {len(row)} experts")
        if np.isnan(scores).any():
            raise ValueError(f"the score of expert {int(np.isnan(scores).argmax())} of layer {layer} is not a number")
        row[:] = scores

    def scores(self, layer: int) -> NDArray[np.float64]:
        """A copy of what was set last, 0 before that."""
        return self._score[self._ids.first[layer] : self._ids.first[layer + 1]].copy()

    def wanted(self, ids: NDArray[np.int64], turn: int) -> None:
        self._ties.wanted(ids, turn)

    def filled(self, expert: int, turn: int) -> None:
        self._ties.filled(expert, turn)

    def victim(self, candidates: NDArray[np.int64], turn: int) -> int:
        scores = self._score.take(candidates)
        lowest = (scores == scores.min()).nonzero()[0]
        if len(lowest) == 1:
            return int(lowest[0])
        return int(lowest[self._ties.victim(candidates.take(lowest), turn)])

    def score(self, expert: int, turn: int) -> float:
        return float(self._score[expert])


EVICTIONS: dict[str, type[Lru] | type[Lfu] | type[LeastStale] | type[Score]] = {
    kind.name: kind for kind in (Lru, Lfu, LeastStale, Score)
}


def make_eviction(name: str) -> Eviction:
    """An eviction by its name, with its usual settings."""
    if name not in EVICTIONS:
        raise ValueError(f"no eviction is called {name!r}; there are {', '.join(EVICTIONS)}")
    return EVICTIONS[name]()
