"""Who is compared: each is a policy of the product behind the same engine, with what it knows of the routing.

The engine (grouped launches, two streams, measured costs, our prefetcher) is the same for all, so a rival here is what
its decisions are worth, not its published software. All predictions cost the host what ours do. Who copies ahead runs
with copies ahead and without; its figure is the faster one: there our gate settles, and rivals are given the same.
"""

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.servers.simulation import FORESEEN
from moe_offload.scheduling.policies import POLICIES, Policy

Ahead = Literal["never", "usual", "recall", "perfect"]

STALE_GATE = 0.886  # the next layer's router on this layer's state, Qwen3-30B; 0.788 on DeepSeek-V2-Lite (published)
LEARNED = 0.94  # the best learned predictors, Qwen3-30B (published)
FARTHER = 0.04  # less recall for each further layer ahead (published: 3.5 to 4 points)
# Seconds of the host for a layer's predictions, and for each token more: as benchmarks/prefetch has it.
PREDICTION = 60e-6, 4e-6


@dataclass(frozen=True, slots=True)
class Contestant:
    """label: for people. runs: ways it looks ahead; the fastest counts. recall: of its predictions for the next layer.
    whole_layers: its static placement is of layers. foreseen: steps that an oracle knows.
    """

    name: str
    label: str
    policy: Policy
    runs: tuple[Ahead, ...] = ("never",)
    recall: float = 0.0
    whole_layers: bool = False
    foreseen: int = FORESEEN


_LAYERSCOPE = replace(POLICIES["tokens"], name="layerscope", eviction="score", prefetch=True)

CONTESTANTS = (
    Contestant("static", "static, hottest experts; CPU the rest", POLICIES["static"]),
    Contestant("static-offload32", "the same, batches from 32 on fetch", POLICIES["static-offload32"]),
    Contestant("n-cpu-moe", "llama.cpp --n-cpu-moe: whole layers", POLICIES["static-offload32"], whole_layers=True),
    Contestant("fiddler", "Fiddler's rule", POLICIES["fiddler"]),
    Contestant("lru", "LRU, misses fetched: mixtral-offloading, llama.cpp --moe-cache-mib", POLICIES["lru"]),
    Contestant("qstar", "FreeToken's q*", POLICIES["qstar"]),
    Contestant("hybrimoe", "HybriMoE, stale gate", POLICIES["makespan-greedy"], ("never", "recall"), recall=STALE_GATE),
    Contestant("layerscope", "LayerScope, predictor", _LAYERSCOPE, ("never", "recall"), recall=LEARNED),
    Contestant("ours-never", "ours, nothing ahead", POLICIES["ours"]),
    Contestant("ours-popularity", "ours, popularity", POLICIES["ours"], ("never", "usual")),
    Contestant("ours-predictor", "ours, predictor", POLICIES["ours"], ("never", "recall"), recall=LEARNED),
    Contestant(
        "oracle-next",
        "ours, next call of each layer known",
        replace(POLICIES["oracle"], name="oracle-next"),
        ("never", "perfect"),
        foreseen=1,
    ),
    Contestant("oracle", "ours, next 8 steps known", POLICIES["oracle"], ("never", "perfect")),
)
NAMES = tuple(each.name for each in CONTESTANTS)
ORACLE, HYBRIMOE = "oracle", "hybrimoe"
NEXT = "oracle-next"
KNOWING = (ORACLE, NEXT)
OURS = ("ours-never", "ours-popularity", "ours-predictor")
STATICS = ("static", "static-offload32", "n-cpu-moe", "fiddler")  # whose placement never changes
