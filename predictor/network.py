"""The learned predictor: gate look-ahead, and a small network for each source that corrects it.

Letters as in trace.py, M units of a network, U its inputs. A network sees, for one token (`Known`):

    look      [D, E]   the source's scores from the next routers: gate look-ahead
    chosen    [E]      1 for experts that the layer before the source's was routed to (none before layer 0)
    before    [D, E]   the same of the token before, in the layers that are predicted; zeros where it is not known
    known     [1]      whether it is
    state     [P]      the source's projected hidden state, each direction with variance 1
    recent    [P]      what came before: r' = DECAY r + (1 - DECAY) state, from zeros at a sequence's first token on

and gives scores [D, E]:

    u = all of these, one behind the other
    g = silu(gate u + gate_bias) * (up u + up_bias)                      [M]
    g = g + down_b (silu(inner_b g + inner_bias_b))      for every block b: a depth by group of layers
    z = look + out g + out_bias

Before training `out` and `out_bias` are zero: the predictor *is* gate look-ahead. Probabilities come from how far a
score lies above the middle between the K-th and the next: p = sigmoid(slope * margin + shift), fitted on validation
sequences for every distance, with and without knowledge of the token before.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.calibration import margins
from moe_offload.predictor.errors import PredictorError
from moe_offload.predictor.trace import DISTANCES, Trace

Floats = NDArray[np.float32]

DECAY = 0.7  # of what came before, a token


class Block(NamedTuple):
    """A residual block."""

    inner: Floats  # [M, M]
    inner_bias: Floats  # [M]
    down: Floats  # [M, M]


class SourceNetwork(NamedTuple):
    """What predicts layers s, s + 1, s + 2 from source s."""

    projection: Floats  # [P, H] of unit variance
    offset: Floats  # [P]
    gate: Floats  # [M, U]
    gate_bias: Floats  # [M]
    up: Floats  # [M, U]
    up_bias: Floats  # [M]
    blocks: tuple[Block, ...]
    out: Floats  # [D, E, M]
    out_bias: Floats  # [D, E]
    slope: Floats  # [2, D]: without and with knowledge of the token before
    shift: Floats  # [2, D]


class Known(NamedTuple):
    """What is known of n tokens, as described above."""

    look: Floats  # [n, D, E]
    chosen: Floats  # [n, E]
    before: Floats  # [n, D, E]
    known: Floats  # [n]
    state: Floats  # [n, P]
    recent: Floats  # [n, P]

    def inputs(self) -> Floats:
        """[n, U]"""
        n = len(self.look)
        parts = (self.look, self.chosen, self.before, self.known, self.state, self.recent)
        return np.concatenate([part.reshape(n, -1) for part in parts], axis=1, dtype=np.float32)


def input_size(experts: int, projected: int) -> int:
    """U"""
    return (2 * DISTANCES + 1) * experts + 1 + 2 * projected


def silu(x: Floats) -> Floats:
    """x * sigmoid(x)"""
    return np.asarray(x / (1.0 + np.exp(-np.clip(x, -80.0, 80.0))), np.float32)


def units(network: SourceNetwork, inputs: Floats) -> Floats:
    """[n, M] what the last linear stage sees."""
    g = silu(inputs @ network.gate.T + network.gate_bias) * (inputs @ network.up.T + network.up_bias)
    for block in network.blocks:
        g = g + silu(g @ block.inner.T + block.inner_bias) @ block.down.T
    return np.asarray(g)


def corrected(network: SourceNetwork, known: Known) -> Floats:
    """[n, D, E] scores."""
    g = units(network, known.inputs())
    return np.asarray(known.look + np.einsum("nm,dem->nde", g, network.out, optimize=True) + network.out_bias)


def to_probabilities(network: SourceNetwork, scores: Floats, top_k: int, *, known: bool) -> Floats:
    """[n, D, E] of scores [n, D, E]."""
    slope, shift = network.slope[int(known), :, None], network.shift[int(known), :, None]
    m = np.clip(slope * margins(scores, top_k) + shift, -30.0, 30.0)
    return np.asarray(1.0 / (1.0 + np.exp(-m)), np.float32)


class SourceView:
    """What a source knows, token by token, of a trace."""

    def __init__(self, trace: Trace, source: int) -> None:
        self._trace, self._source = trace, source
        self._deviation = np.sqrt(np.maximum(trace.variance[source], 1e-12))
        self._recent = np.zeros((trace.experts.shape[1], trace.info.projected), np.float16)
        starts, lengths = trace.starts[:-1], np.diff(trace.starts)
        recent = np.zeros((len(starts), trace.info.projected), np.float32)
        for position in range(int(lengths.max()) - 1):
            going = np.flatnonzero(lengths > position + 1)
            tokens = starts[going] + position
            recent[going] = DECAY * recent[going] + (1 - DECAY) * self._state(tokens)
            self._recent[tokens + 1] = recent[going]

    def _state(self, tokens: NDArray[np.int64]) -> Floats:
        return np.asarray(self._trace.state(self._source, tokens) / self._deviation)

    def known(self, tokens: NDArray[np.int64], *, decode: bool) -> Known:
        """decode: as of `Predictor`."""
        trace, source = self._trace, self._source
        experts, layers = trace.info.experts, trace.info.layers
        chosen = np.zeros((len(tokens), experts), np.float32)
        if source:
            chosen = trace.chosen(source - 1, tokens).astype(np.float32)
        before = np.zeros((len(tokens), DISTANCES, experts), np.float32)
        known = np.zeros(len(tokens), np.float32)
        if decode:
            last = trace.before(tokens)
            known = (last >= 0).astype(np.float32)
            for each in range(min(DISTANCES, layers - source)):
                before[:, each] = trace.chosen(source + each, np.maximum(last, 0))
            before[last < 0] = 0.0
        look = trace.look[source, tokens].astype(np.float32)
        return Known(look, chosen, before, known, self._state(tokens), self._recent[tokens].astype(np.float32))


class LearnedPredictor:
    """A `Predictor` of one network for each source, in f32."""

    def __init__(self, networks: Sequence[SourceNetwork], name: str = "learned") -> None:
        self._networks, self._name = tuple(networks), name

    @property
    def name(self) -> str:
        """For tables."""
        return self._name

    def probabilities(
        self, trace: Trace, layer: int, distance: int, tokens: NDArray[np.int64], *, decode: bool
    ) -> Floats:
        """As of `Predictor`. Raises PredictorError for a trace whose states are projected otherwise."""
        source = layer - distance + 1
        network = self._networks[source]
        deviation = np.sqrt(np.maximum(trace.variance[source], 1e-12))
        mine = trace.projection[source] / deviation[:, None]
        if mine.shape != network.projection.shape or not np.allclose(mine, network.projection, rtol=1e-4, atol=1e-5):
            raise PredictorError(
                "the trace's hidden states are projected otherwise than this predictor's: trace with --like the trace "
                "that it was trained on"
            )
        view = SourceView(trace, source)
        found = np.empty((len(tokens), trace.info.experts), np.float32)
        for start in range(0, len(tokens), 8192):
            part = tokens[start : start + 8192]
            known = view.known(part, decode=decode)
            scores = corrected(network, known)
            both = [
                to_probabilities(network, scores, trace.info.top_k, known=flag)[:, distance - 1]
                for flag in (False, True)
            ]
            found[start : start + 8192] = np.where(known.known[:, None] > 0, both[1], both[0])
        return found
