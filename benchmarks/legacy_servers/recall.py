"""A predictor that is made up: it names the truth with a stated probability, and says no more than it knows.

For each token it names K experts of a later layer, each true one with probability `recall` and a random wrong one in
its place where not. Its probabilities are right: a named expert has `recall`, any other an equal share of the rest.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.servers.routing import Choices


class MadeUp(NamedTuple):
    """recall: one layer ahead; farther: less for each further layer."""

    choices: Choices
    experts: int
    recall: float
    farther: float
    seed: int = 0

    def say(self, step: int, layer: int, distance: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[E] presence and rows of a layer in a step, predicted so many layers before. The same each time."""
        recall = max(self.recall - self.farther * (distance - 1), 0.0)
        chosen = self.choices[step, layer]  # [T, K]
        random = np.random.default_rng((self.seed, step, layer, distance))
        named = name(chosen, self.experts, recall, random)
        tokens, top_k = chosen.shape
        other = (1 - recall) * top_k / max(self.experts - top_k, 1)
        said = np.where(named, recall, min(other, 1.0))
        doubt = np.log1p(-np.minimum(said, 1 - 1e-9)).sum(axis=0)
        return -np.expm1(doubt), said.sum(axis=0)


def name(chosen: NDArray[np.int64], experts: int, recall: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """[T, E]: K experts of each token, a true one [T, K] with probability `recall`."""
    tokens, top_k = chosen.shape
    named = np.zeros((tokens, experts), np.bool_)
    kept = random.random(chosen.shape) < recall
    np.put_along_axis(named, chosen, kept, axis=1)
    # wrong ones: of those that were not chosen, as many as are missing, at random
    order = random.random((tokens, experts))
    np.put_along_axis(order, chosen, 2.0, axis=1)
    ranks = order.argsort(axis=1).argsort(axis=1)
    missing = top_k - kept.sum(axis=1, keepdims=True)
    wrong: NDArray[np.bool_] = (ranks < missing) & (order < 1.0)
    return named | wrong
