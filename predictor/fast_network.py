"""The learned predictor at run time: all sources of a model, int8, on the engine's threads, microseconds a layer.

It computes what predictor/network.py defines, from the hidden states that went into a layer's experts, and says for a
batch which experts of the next layers get a token at all and how many to expect. One chain of stages does it
(fast_plan.py). Of more than 64 tokens some, evenly spaced, stand for all.

What came before is kept here for each sequence: what its last token was routed to, and the moving average of its
states. So the caller says what a forward pass consists of: `begin_step`. Sources may be left out; their averages then
go on without that token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.team import Team
from moe_offload.predictor.fast_inputs import point, prepare, unite
from moe_offload.predictor.fast_plan import Form, Kernels, Plan
from moe_offload.predictor.fast_weights import Look, SourceWeights
from moe_offload.predictor.network import SourceNetwork
from moe_offload.predictor.trace import DISTANCES

MOST_ROWS = 64
MOST_PLANS = 8
_NEVER = -2
_NOBODY: NDArray[np.int64] = np.empty((0, 0), np.int64)


class Batch(NamedTuple):
    """What a source says of a batch: [D, E] the probability of at least one token, and how many are expected."""

    presence: NDArray[np.float64]
    rows: NDArray[np.float64]


class Seen(NamedTuple):
    """What the last call computed, until the next one: rows of the plan's buffers."""

    plan: Plan
    stride: int  # row r is token r * stride


class FastNetwork:
    """Networks [L], one for each source, and the routers that they see [L]. Not for several threads at once."""

    def __init__(self, looks: Sequence[Look], networks: Sequence[SourceNetwork], top_k: int, team: Team) -> None:
        if len(looks) != len(networks) or not looks:
            raise ValueError(f"{len(networks)} networks for {len(looks)} layers")
        self.layers, self.top_k = len(looks), top_k
        self.experts = looks[0].rows.shape[1]
        self.sources = [SourceWeights(look, network) for look, network in zip(looks, networks, strict=True)]
        self._projected = self.sources[0].projected
        if {each.projected for each in self.sources} != {self._projected}:
            raise ValueError("networks with different numbers of projections")
        self._forms = [Form.of(each, self.experts, top_k) for each in self.sources]
        self._team, self._kernels = team, Kernels()
        self._plans: dict[tuple[Form, int], Plan] = {}
        self._addresses = [np.array([*each.addresses(), 0, 0, 0, 0], np.int64) for each in self.sources]
        self.step = self._sequences = 0
        self._length = 1
        self._routed_at = np.full(self.layers, _NEVER)
        self._make_room(0)
        self.seen: Seen | None = None

    @property
    def nbytes(self) -> int:
        """Memory of all sources."""
        return sum(each.nbytes for each in self.sources)

    def refresh(self, source: int) -> None:
        """The source's tail is another one now."""
        addresses = self.sources[source].addresses()
        self._addresses[source][: len(addresses)] = addresses

    def begin_step(self, sequences: int, length: int, *, anew: bool = False) -> None:
        """A forward pass with the next `length` tokens of each sequence; anew: the first ones."""
        self.step += 1
        self._length = length
        if sequences != self._sequences:
            self._sequences = sequences
            self._make_room(sequences if sequences <= MOST_ROWS else 0)
            anew = True
        if anew:
            self._routed_at[:] = _NEVER
            self._recent[:] = 0.0

    def _make_room(self, sequences: int) -> None:
        self._routed = np.zeros((self.layers, sequences, self.top_k), np.int32)  # of the last token
        self._recent = np.zeros((self.layers, sequences, self._projected), np.float32)

    def observe(self, layer: int, chosen: NDArray[Any]) -> None:
        """What the layer's router chose [T, K] in this step."""
        routed = self._routed[layer]
        last = chosen[self._length - 1 :: self._length]
        if last.shape == routed.shape and len(chosen) == len(routed) * self._length:
            routed[...] = last
            self._routed_at[layer] = self.step

    def predict(self, source: int, hidden: NDArray[np.float32], chosen: NDArray[np.int64] | None) -> Batch:
        """From the states [T, H] that went into the experts of layer source - 1, and what they were routed to [T, K].

        Source 0: from embeddings, normalised; nothing was chosen.
        """
        tokens = len(hidden)
        if not tokens or hidden.shape[1] != self.sources[source].hidden_size or hidden.strides[1] != 4:
            raise ValueError(f"hidden states {hidden.shape} {hidden.dtype} of no use")
        stride = -(-tokens // MOST_ROWS)
        rows = tokens // stride
        plan, addresses, recent = self._plan(self._forms[source], rows), self._addresses[source], self._recent[source]
        goes_on = stride == 1 and len(recent) * self._length == tokens and bool(recent.size)
        addresses[-4:] = (
            hidden.ctypes.data, hidden.strides[0] * stride, self._length, recent.ctypes.data if goes_on else 0
        )  # fmt: skip
        before = self._routed[source : source + DISTANCES]
        known = self._length == 1 and before.shape[1] == tokens
        known = known and bool((self._routed_at[source : source + DISTANCES] == self.step - 1).all())
        who = _NOBODY if chosen is None else chosen[: rows * stride : stride]
        with self._team.lock:
            point(plan.places, addresses)
            prepare(plan.inputs, plan.known, self.experts, who, before, known)
            plan.chain.run(self._team)
        presence, expected = np.empty((2, DISTANCES * self.experts))
        unite(plan.probabilities, tokens / rows, presence, expected)
        if goes_on and not np.isfinite(expected.sum()):
            recent[...] = 0.0  # what is no number would stay in the average
        self.seen = Seen(plan, stride)
        shape = DISTANCES, self.experts
        return Batch(presence.reshape(shape), expected.reshape(shape))

    def _plan(self, form: Form, rows: int) -> Plan:
        found = self._plans.get((form, rows))
        if found is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))
            found = self._plans[form, rows] = Plan(form, rows, self._team.threads, self._kernels)
        return found
