"""All figures of some predictors on a held-out trace, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reporting import progress
from moe_offload.predictor.baselines import Frequency, LookAhead, Perfect, PreviousToken, Transition
from moe_offload.predictor.hit_rates import HitRates, hit_rates
from moe_offload.predictor.interface import Predictor
from moe_offload.predictor.metrics import Evaluation, evaluate
from moe_offload.predictor.presence import prompt_overlaps
from moe_offload.predictor.samples import sample_of
from moe_offload.predictor.trace import Trace

Sequences = NDArray[np.int64]
MODES = {"decode": True, "prefill": False}
CACHES = (0.1, 0.35, 0.7)  # of all experts
COST = 0.5  # of loading an expert ahead, in units of what a hit saves
CACHE_SEQUENCES = 32  # that run through the caches
LOOK_AHEAD = LookAhead.name


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found: figures by predictor and mode, and caches by predictor."""

    evaluations: dict[str, dict[str, Evaluation]]
    overlaps: dict[str, dict[int, float]]
    caches: dict[str, list[HitRates]]

    def to_dict(self) -> dict[str, Any]:
        """For the result's file."""
        return {
            "predictors": {
                name: {mode: evaluation.to_dict() for mode, evaluation in modes.items()}
                for name, modes in self.evaluations.items()
            },
            "above_look_ahead": {name: self.against(name) for name in self.evaluations if name != LOOK_AHEAD},
            "prompt_overlaps": {
                name: {str(distance): overlap for distance, overlap in each.items()}
                for name, each in self.overlaps.items()
            },
            "caches": {name: [each.to_dict() for each in rates] for name, rates in self.caches.items()},
        }

    def against(self, name: str) -> dict[str, Any]:
        """Recall above look-ahead's, paired by sequence, and the share of look-ahead's gap to 1 that is closed."""
        found: dict[str, Any] = {}
        for mode, mine in self.evaluations[name].items():
            theirs = self.evaluations[LOOK_AHEAD][mode]
            found[mode] = {}
            for distance in distances(mine):
                parts = {"all": slice(None), "from_layers": slice(1, None)}
                found[mode][str(distance)] = {
                    part: {
                        "difference": a.above(b).to_list(),
                        "gap_closed": a.gap_closed(b).to_list(),
                    }
                    for part, some in parts.items()
                    for a, b in [(mine.at(distance, sources=some).recall, theirs.at(distance, sources=some).recall)]
                }
        return found


def distances(evaluation: Evaluation) -> list[int]:
    """Those with at least one layer that is predicted from a layer."""
    far = [distance for _, distance in evaluation.figures]
    return sorted({distance for distance in far if far.count(distance) > 1})


def baselines(trace: Trace, sequences: Sequences) -> list[Predictor]:
    """What needs no training worth the name."""
    return [kind.fit(trace, sequences) for kind in (Frequency, PreviousToken, Transition, LookAhead)]


def measure(
    predictors: Sequence[Predictor],
    trace: Trace,
    sequences: Sequences,
    fitting: tuple[Trace, Sequences],
    threshold: float,
) -> Measured:
    """Every predictor on these sequences. fitting: others, to fit what tokens of a prompt have in common."""
    evaluations: dict[str, dict[str, Evaluation]] = {}
    overlaps: dict[str, dict[int, float]] = {}
    caches: dict[str, list[HitRates]] = {}
    samples = {mode: sample_of(trace, sequences, decode=decode) for mode, decode in MODES.items()}
    for predictor in predictors:
        progress(f"{predictor.name}: {len(sequences)} sequences")
        mine = overlaps[predictor.name] = prompt_overlaps(predictor, *fitting)
        evaluations[predictor.name] = {
            mode: evaluate(predictor, trace, sample, threshold=threshold, overlaps=mine)
            for mode, sample in samples.items()
        }
    for predictor in (*predictors, Perfect()):
        progress(f"{predictor.name}: caches")
        caches[predictor.name] = [
            hit_rates(
                predictor, trace, sequences[:CACHE_SEQUENCES], capacity=capacity, copies=trace.info.top_k, cost=COST
            )
            for capacity in capacities(trace)
        ]
    return Measured(evaluations, overlaps, caches)


def capacities(trace: Trace) -> list[int]:
    """Experts that the caches hold."""
    every = trace.info.layers * trace.info.experts
    return sorted({max(round(share * every), trace.info.top_k) for share in CACHES})
