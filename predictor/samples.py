"""Which tokens of a trace a predictor is measured on, and which of them come together.

*Decode* is tokens that come one at a time: a sequence's generated ones; where it has none, all but its first, as if it
had been given token by token (routing does not depend on that). Batches are sequences in lockstep. *Prefill* is the
tokens of prompts; batches are pieces of 16 tokens of a prompt, and whole prompts (batch 0).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.trace import Trace

BATCHES = (1, 4, 16)  # sequences in lockstep
PIECE = 16  # tokens of a prompt


class Batch(NamedTuple):
    """Groups of tokens that are one batch each. size: tokens, 0 for whole prompts."""

    size: int
    rows: NDArray[np.int64]  # positions in the sample's tokens, group behind group
    starts: NDArray[np.int64]  # [G + 1]
    unit: NDArray[np.int64]  # [G] what is drawn as one: sequences, or the sequences in lockstep
    units: int


class Sample(NamedTuple):
    """The tokens that are looked at, and the batches made of them."""

    decode: bool
    tokens: NDArray[np.int64]
    unit: NDArray[np.int64]  # [n] which sequence
    units: int
    batches: tuple[Batch, ...]


def sample_of(trace: Trace, sequences: Sequence[int] | NDArray[np.int64], *, decode: bool) -> Sample:
    """The tokens of sequences that are decoded, or those of their prompts."""
    spans = [_span(trace, int(each), decode) for each in sequences]
    spans = [span for span in spans if len(span)]
    lengths = np.array([len(span) for span in spans], np.int64)
    first = np.concatenate([[0], np.cumsum(lengths)])
    unit = np.repeat(np.arange(len(spans)), lengths)
    tokens = np.concatenate(spans) if spans else np.empty(0, np.int64)
    if decode:
        batches = tuple(_lockstep(size, first) for size in BATCHES)
    else:
        batches = (_pieces(PIECE, first), Batch(0, np.arange(first[-1]), first, np.arange(len(spans)), len(spans)))
    return Sample(decode, tokens, unit, len(spans), batches)


def _span(trace: Trace, sequence: int, decode: bool) -> NDArray[np.int64]:
    start, end = int(trace.starts[sequence]), int(trace.starts[sequence + 1])
    given = start + int(trace.prompt_tokens[sequence])
    if not decode:
        return np.arange(start, given)
    return np.arange(given if given < end else start + 1, end)


def _lockstep(size: int, first: NDArray[np.int64]) -> Batch:
    """Sequences of similar length together, each as far as the shortest goes; what is left over stays out."""
    lengths = np.diff(first)
    order = np.random.default_rng(0).permutation(len(lengths))  # neighbours in a trace may be of one text
    order = order[np.argsort(lengths[order], kind="stable")]
    groups = order[len(order) % size :].reshape(-1, size)
    rows, unit = [], []
    for number, group in enumerate(groups):
        steps = int(lengths[group].min())
        rows.append((first[group][None, :] + np.arange(steps)[:, None]).ravel())
        unit.append(np.full(steps, number))
    together = np.concatenate(rows) if rows else np.empty(0, np.int64)
    units = np.concatenate(unit) if unit else np.empty(0, np.int64)
    return Batch(size, together, np.arange(0, len(together) + 1, size), units, len(groups))


def _pieces(size: int, first: NDArray[np.int64]) -> Batch:
    """Each sequence cut into pieces; what is left over stays out."""
    counts = np.diff(first) // size
    rows = [np.arange(begin, begin + count * size) for begin, count in zip(first[:-1], counts, strict=True)]
    together = np.concatenate(rows) if rows else np.empty(0, np.int64)
    unit = np.repeat(np.arange(len(counts)), counts)
    return Batch(size, together, np.arange(0, len(together) + 1, size), unit, len(counts))
