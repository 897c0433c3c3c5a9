"""The learned predictor at run time: all sources of a model, int8, on the engine's threads, microseconds a layer.

It computes what predictor/network.py defines, from the hidden states that went into a layer's experts, and says for a
batch which experts of the next layers get a token at all and how many to expect. One chain of stages does it
(fast_plan.py). Of more than 64 tokens some, evenly spaced, stand for all.

What is known of the token before is kept here: while every sequence gets one token per step, row t of a call is the
token behind row t of the call before. Of a prompt's tokens the one before is the row above, and what it was routed to
in later layers is not known yet.
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
MOST_PLANS = 6
_NOBODY: NDArray[np.int64] = np.empty((0, 0), np.int64)


class Batch(NamedTuple):
    """What a source says of a batch: [D, E] the probability of at least one token, and how many are expected."""

    presence: NDArray[np.float64]
    rows: NDArray[np.float64]


class Seen(NamedTuple):
    """What the last call of a source computed, until the next call of any: for learning."""

    plan: Plan
    rows: NDArray[np.int64]  # [R] the tokens of the batch that stand for it


class FastNetwork:
    """Networks [L], one for each source, and the routers that they see [L]. Not for several threads at once."""

    def __init__(self, looks: Sequence[Look], networks: Sequence[SourceNetwork], top_k: int, team: Team) -> None:
        if len(looks) != len(networks):
            raise ValueError(f"{len(networks)} networks for {len(looks)} layers")
        self.layers, self.top_k = len(looks), top_k
        self.experts = looks[0].rows.shape[1]
        self.sources = [SourceWeights(look, network) for look, network in zip(looks, networks, strict=True)]
        self._forms = [Form.of(each, self.experts, top_k) for each in self.sources]
        self._team, self._kernels = team, Kernels()
        self._plans: dict[tuple[Form, int], Plan] = {}
        self._addresses: list[NDArray[np.int64]] = []
        for at in range(self.layers):
            self._addresses.append(np.empty(0, np.int64))
            self.refresh(at)
        self.step = 0
        self._length = 0
        self._tokens = 0
        self._routed = np.zeros((self.layers, 0, top_k), np.int32)  # in the last call of each layer
        self._routed_at = np.full(self.layers, -2)
        self._states = np.zeros((self.layers, 0, 0), np.float32)
        self._states_at = np.full(self.layers, -2)
        self.seen: Seen | None = None

    @property
    def nbytes(self) -> int:
        """Memory of all sources."""
        return sum(each.nbytes for each in self.sources)

    def refresh(self, source: int) -> None:
        """The source's tail is another one now."""
        self._addresses[source] = np.array([*self.sources[source].addresses(), 0, 0, 0], np.int64)

    def begin_step(self, tokens: int, length: int) -> None:
        """A forward pass with `length` tokens of each sequence, `tokens` in all. 1: the token before is known."""
        self.step += 1
        if tokens != self._tokens or length != 1 or self._length != 1:
            self._routed_at[:] = self._states_at[:] = -2
        rows = tokens if length == 1 and tokens <= MOST_ROWS else 0
        if rows != self._routed.shape[1]:
            projected = max(each.projected for each in self.sources)
            self._routed = np.zeros((self.layers, rows, self.top_k), np.int32)
            self._states = np.zeros((self.layers, rows, projected), np.float32)
        self._tokens, self._length = tokens, length

    def observe(self, layer: int, chosen: NDArray[Any]) -> None:
        """What the layer's router chose [T, K] in this step."""
        if len(chosen) == self._routed.shape[1] and chosen.shape[1] == self.top_k:
            self._routed[layer] = chosen
            self._routed_at[layer] = self.step

    def predict(self, source: int, hidden: NDArray[np.float32], chosen: NDArray[np.int64] | None) -> Batch:
        """From the states [T, H] that went into the experts of layer source - 1, and what they were routed to [T, K].

        Source 0: from embeddings, normalised; nothing was chosen.
        """
        tokens = len(hidden)
        if not tokens:
            raise ValueError("there are no tokens to predict anything for")
        stride = -(-tokens // MOST_ROWS)
        rows = tokens // stride
        plan = self._plan(self._forms[source], rows)
        weights, addresses = self.sources[source], self._addresses[source]
        kept = len(self._states[source]) == tokens and weights.projected > 0
        addresses[-3:] = hidden.ctypes.data, hidden.strides[0] * stride, self._keep(source, plan) if kept else 0
        if weights.projected and not kept:
            self._rows_above(plan, stride)
        until = min(source + DISTANCES, self.layers)
        known = bool(self._routed.shape[1] == tokens and (self._routed_at[source:until] == self.step - 1).all())
        who = _NOBODY if chosen is None else chosen[: rows * stride : stride]
        with self._team.lock:
            point(plan.places, addresses)
            prepare(plan.inputs, plan.known, self.experts, who, self._routed[source:until], int(known))
            plan.chain.run(self._team)
        presence, expected = np.empty((2, DISTANCES * self.experts))
        unite(plan.probabilities, tokens / rows, presence, expected)
        self.seen = Seen(plan, np.arange(rows) * stride)
        shape = DISTANCES, self.experts
        return Batch(presence.reshape(shape), expected.reshape(shape))

    def _keep(self, source: int, plan: Plan) -> int:
        """Have the states of the token before read from where those of this one are kept."""
        states = self._states[source]
        at = int(states.ctypes.data)
        if self._states_at[source] == self.step - 1:
            plan.earlier[:] = at + int(states.strides[0]) * np.arange(len(states))
        else:
            plan.earlier[:] = 0
        self._states_at[source] = self.step
        return at

    def _rows_above(self, plan: Plan, stride: int) -> None:
        rows = len(plan.earlier)
        plan.earlier[:] = 0
        if stride == 1 and self._length > 1:
            above = int(plan.inputs.ctypes.data) + 4 * plan.state_at + int(plan.inputs.strides[0]) * np.arange(rows - 1)
            plan.earlier[1:] = np.where(np.arange(1, rows) % self._length, above, 0)

    def _plan(self, form: Form, rows: int) -> Plan:
        found = self._plans.get((form, rows))
        if found is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))
            found = self._plans[form, rows] = Plan(form, rows, self._team.threads, self._kernels)
        return found
