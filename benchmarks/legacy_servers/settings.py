"""What is compared: models, weights, servers, batches, caches, and how many steps each cell has.

The card of the paper has every model, weight, batch and cache; the other servers have 4-bit weights and the largest
cache that they hold. A cache is a share of the experts; where the card does not hold it, what it holds takes its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks.servers.shapes import Shape, deepseek, gpt_oss, gpt_oss_120b, mixtral, moonlight, qwen3
from benchmarks.servers.simulation import CONTEXT, WORKSPACE, Steps
from moe_offload.transfer.server_profile import PROFILES, ServerProfile

PAPER_SERVER = "v100-6230r"
WEIGHTS = ("bf16", "int8", "int4", "mxfp4")
PAPER_WEIGHTS = "bf16"
BATCHES = (1, 4, 16, 64)
PAPER_BATCHES = (1, 4, 8, 16, 32, 64)
OTHER_BATCHES = (1, 16)
CACHES = (0.10, 0.35, 0.70)
# What is known before the first step that is run: a part of a prompt (the paper's have 512 tokens), or of what was
# written since. With fewer, the forecast's want of history weighs more than what policies do with it.
_SEEN = 96
# More tokens in a step, fewer steps.
_STEPS = {
    1: Steps(_SEEN, 8, 16), 4: Steps(_SEEN, 6, 5), 8: Steps(_SEEN, 5, 4), 16: Steps(_SEEN, 5, 4),
    32: Steps(_SEEN, 4, 3),
}  # fmt: skip
_MANY = Steps(_SEEN, 3, 2)
SMOKE_STEPS = Steps(3, 2, 2)


@cache
def _models() -> dict[str, dict[str, Shape]]:
    made: dict[str, dict[str, Shape]] = {}
    for build in (mixtral, qwen3, deepseek, moonlight):
        shapes = {"bf16": build("bf16"), "int8": build("int8"), "int4": build("int4")}
        made[shapes["bf16"].name] = shapes
    for shape in (gpt_oss(), gpt_oss_120b()):
        made[shape.name] = {"mxfp4": shape}
    return made


MODELS = tuple(_models())


def shape_of(model: str, weights: str) -> Shape:
    """A model with its experts in a format."""
    formats = _models()[model]
    if weights not in formats:
        raise ValueError(f"{model} has no {weights} experts here: it has {', '.join(formats)}")
    return formats[weights]


@dataclass(frozen=True, slots=True)
class Cell:
    """One server, model, format and batch with a cache of `slots` experts."""

    server: str
    model: str
    weights: str
    batch: int
    slots: int
    steps: Steps

    @property
    def shape(self) -> Shape:
        return shape_of(self.model, self.weights)

    @property
    def share(self) -> float:
        """Of the experts that the cache holds."""
        return self.slots / (self.shape.layers * self.shape.experts)

    @property
    def key(self) -> str:
        """Names it, in the journal of what is done."""
        steps = f"{self.steps.seen}+{self.steps.warm}+{self.steps.counted}"
        return f"{self.server}/{self.model}/{self.weights}/batch {self.batch}/{self.slots} slots/{steps} steps"

    @property
    def effort(self) -> float:
        """What it takes to simulate, on a scale of its own."""
        active = min(self.batch * self.shape.top_k, self.shape.experts)
        return self.shape.layers * (10 + active) * (self.steps.warm + self.steps.counted)


def held(profile: ServerProfile, shape: Shape, batch: int) -> int:
    """How many experts a card holds beside everything else; 0 or less where the model does not fit."""
    left = profile.memory_bytes - shape.dense_bytes - WORKSPACE - batch * CONTEXT * shape.kv_bytes
    return left // (-(-shape.expert_bytes // 256) * 256) - 1


def cache_sizes(profile: ServerProfile, shape: Shape, batch: int, shares: Sequence[float]) -> list[int]:
    """Slots of the caches that the card holds, the least first; none where it holds less than one layer's share."""
    most, experts = held(profile, shape, batch), shape.layers * shape.experts
    if most < shape.layers or not fits_host(profile, shape):
        return []
    return sorted({min(int(share * experts), most) for share in shares})


def fits_host(profile: ServerProfile, shape: Shape) -> bool:
    """Whether host memory holds all experts: policies are compared without a disk."""
    return shape.layers * shape.experts * shape.expert_bytes < 0.85 * profile.host_memory_bytes


def cells(servers: Sequence[str], models: Sequence[str], weights: Sequence[str], *, quick: bool = False) -> list[Cell]:
    """Every cell of a selection. quick: batches 4 and 64 of it, one cache each."""
    found = []
    for server in servers:
        profile, paper = PROFILES[server], server == PAPER_SERVER
        for model in models:
            for dtype, shape in _models()[model].items():
                if dtype not in weights or not (paper or dtype in ("int4", "mxfp4")):
                    continue
                batches: tuple[int, ...] = (
                    (PAPER_BATCHES if dtype == PAPER_WEIGHTS else BATCHES) if paper else OTHER_BATCHES
                )
                if quick:
                    batches = (4, 64) if paper else (16,)
                for batch in batches:
                    shares = CACHES[1:2] if quick else CACHES if paper else CACHES[2:]
                    for slots in cache_sizes(profile, shape, batch, shares):
                        found.append(Cell(server, model, dtype, batch, slots, _STEPS.get(batch, _MANY)))
    return found
