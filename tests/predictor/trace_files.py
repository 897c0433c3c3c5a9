"""Random traces, whole and as sequences, of a model that does not exist."""

from dataclasses import replace

import numpy as np

from moe_offload.predictor.projection import Projection
from moe_offload.predictor.tensor_file import DTYPES
from moe_offload.predictor.trace import FORMAT, Trace, TraceInfo, shapes
from moe_offload.predictor.trace_writer import TracedSequence

INFO = TraceInfo(FORMAT, "ab" * 32, "nobody", layers=3, experts=6, top_k=2, hidden_size=5, projected=4, note="random")


def make_trace(lengths: list[int], seed: int = 0, **info: int) -> Trace:
    """One sequence of each length."""
    heading = replace(INFO, **info)  # type: ignore[arg-type]
    random = np.random.default_rng(seed)
    arrays = {
        name: random.integers(0, 6, shape).astype(DTYPES[kind])
        for name, (kind, shape) in shapes(heading, len(lengths), sum(lengths)).items()
    }
    arrays["starts"] = np.cumsum([0, *lengths])
    arrays["prompt_tokens"] = np.array([max(1, length - 2) for length in lengths])
    arrays["split"] = np.arange(len(lengths), dtype=np.uint8) % 3
    return Trace(heading, **arrays)


def sequences_of(trace: Trace) -> list[TracedSequence]:
    """What a trace was put together from."""
    found = []
    for number, (first, last) in enumerate(zip(trace.starts, trace.starts[1:], strict=False)):
        arrays = (getattr(trace, name)[:, first:last] for name in TracedSequence._fields[2:])
        found.append(TracedSequence(int(trace.prompt_tokens[number]), int(trace.split[number]), *arrays))
    return found


def projections_of(trace: Trace) -> tuple[Projection, ...]:
    """One for each source."""
    return tuple(map(Projection, trace.projection, trace.offset, trace.variance))


def same(one: Trace, other: Trace) -> bool:
    """Whether heading and all arrays are equal."""
    return one.info == other.info and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in Trace._fields[1:]
    )
