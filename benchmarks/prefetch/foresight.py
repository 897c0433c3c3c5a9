"""What predictors say about a batch, step by step: presence and rows of every expert, of tokens that decode together.

A predictor gives probabilities per token; a batch wants an expert as soon as one of its tokens does. Tokens are taken
as independent given what the predictor knows of each: presence = 1 - prod(1 - p), rows = sum p.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.servers.routing import Choices
from moe_offload.predictor.interface import Predictor
from moe_offload.predictor.trace import DISTANCES, Trace


class Foresight(NamedTuple):
    """[steps, L, D, E]: of a layer, predicted 1, 2, 3 layers before; nothing (0) where there is no layer before that.

    seconds: of the host for one layer's predictions of the next layers.
    """

    presence: NDArray[np.float32]
    rows: NDArray[np.float32]
    seconds: float


def of_predictor(predictor: Predictor, trace: Trace, tokens: NDArray[np.int64], seconds: float) -> Foresight:
    """What it says of tokens [steps, T] of a trace."""
    steps, batch = tokens.shape
    made = _empty(steps, trace.info.layers, trace.info.experts, seconds)
    for layer in range(trace.info.layers):
        for distance in range(1, min(DISTANCES, layer) + 1):
            said = predictor.probabilities(trace, layer, distance, tokens.reshape(-1), decode=True)
            _unite(made, layer, distance, said.reshape(steps, batch, -1))
    return made


def perfect(choices: Choices, experts: int) -> Foresight:
    """Knows, and takes no time to say it: the ceiling of every predictor that looks as far."""
    steps, layers, _, _ = choices.shape
    made = _empty(steps, layers, experts, 0.0)
    for layer in range(layers):
        for distance in range(1, min(DISTANCES, layer) + 1):
            _unite(made, layer, distance, chosen(choices[:, layer], experts))
    return made


def chosen(choices: NDArray[np.int64], experts: int) -> NDArray[np.float32]:
    """[..., K] as [..., E]: 1 for those chosen."""
    found = np.zeros((*choices.shape[:-1], experts), np.float32)
    np.put_along_axis(found, choices, 1.0, axis=-1)
    return found


def _empty(steps: int, layers: int, experts: int, seconds: float) -> Foresight:
    presence, rows = (np.zeros((steps, layers, DISTANCES, experts), np.float32) for _ in range(2))
    return Foresight(presence, rows, seconds)


def _unite(made: Foresight, layer: int, distance: int, said: NDArray[np.float32]) -> None:
    """said [steps, T, E]."""
    doubt = np.log1p(-np.clip(said, 0.0, 1.0 - 1e-7)).sum(axis=1)
    made.presence[:, layer, distance - 1] = -np.expm1(doubt)
    made.rows[:, layer, distance - 1] = said.sum(axis=1)
