"""What LayerScope's paper and artifact say, as facts: absolute figures, and constants that its scheduler computes by.

Figures: arXiv 2509.23638, 512 tokens in and 64 out, ShareGPT, bf16, through a summary of its tables; its full text was
not read. Constants: repository nezha-Anonymous/LayerScope, commit f85e627. The CPU's times of the same artifact are in
`transfer/measured_experts.py`.
"""

from dataclasses import dataclass
from typing import Literal

Card = Literal["V100", "A100"]
System = Literal["LayerScope", "HybriMoE", "Fiddler", "Fate", "Klotski"]

V100_LINK, A100_LINK = 12.0, 25.0  # GB/s, page-locked: the A100's copies are the V100's by this ratio


@dataclass(frozen=True, slots=True)
class Figure:
    """A decode time of the paper, `given` as it stands there: seconds of a step, or tokens per second of the batch."""

    card: Card
    model: str
    batch: int
    system: System
    given: float
    unit: Literal["s/step", "tok/s"]

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.given if self.unit == "s/step" else self.batch / self.given


@dataclass(frozen=True, slots=True)
class Constants:
    """Seconds of one bf16 expert: its copy to the V100 and its computation there, whatever the tokens."""

    copy: float
    device: float


FIGURES = (
    Figure("V100", "DeepSeek-V2-Lite", 4, "LayerScope", 0.37, "s/step"),
    Figure("V100", "DeepSeek-V2-Lite", 4, "HybriMoE", 0.64, "s/step"),
    Figure("V100", "DeepSeek-V2-Lite", 4, "Fiddler", 1.34, "s/step"),
    Figure("V100", "Qwen3-30B-A3B", 64, "LayerScope", 5.05, "s/step"),
    Figure("V100", "Qwen3-30B-A3B", 64, "Fate", 9.48, "s/step"),
    Figure("V100", "Qwen3-30B-A3B", 64, "Klotski", 19.9, "s/step"),
    Figure("A100", "DeepSeek-V2-Lite", 64, "LayerScope", 37.4, "tok/s"),
    Figure("A100", "Qwen3-30B-A3B", 64, "LayerScope", 13.3, "tok/s"),
    Figure("A100", "Moonlight-16B-A3B", 64, "LayerScope", 47.6, "tok/s"),
)
CONSTANTS = {
    "Mixtral-8x7B": Constants(27e-3, 4.22e-3),
    "DeepSeek-V2-Lite": Constants(1.39e-3, 0.95e-3),
    "Moonlight-16B-A3B": Constants(1.39e-3, 0.95e-3),
    "Qwen3-30B-A3B": Constants(0.55e-3, 0.85e-3),
}
# Experts on the card: hard-coded in the artifact, the first for the smallest batch and the last for the largest; what
# batches lie between is not said. Qwen3's is not known: what the card holds.
SLOTS = {
    "Mixtral-8x7B": (74, 70, 62),
    "DeepSeek-V2-Lite": (993, 893, 693),
    "Moonlight-16B-A3B": (840,),
}
GAIN_OVER_HYBRIMOE = 1.708  # LayerScope's throughput over HybriMoE's, the paper's headline
SMALL_BATCH = 4  # up to here the first of SLOTS


def slots_of(model: str, batch: int) -> int | None:
    """How many experts the artifact keeps on the card; None: not known."""
    sizes = SLOTS.get(model)
    return None if sizes is None else sizes[0 if batch <= SMALL_BATCH else -1]
