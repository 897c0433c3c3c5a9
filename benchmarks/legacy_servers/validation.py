"""Validation: the paper's absolute decode times beside what its constants say, and beside the simulated engine.

Only figures whose rule is known are held against something: Fiddler's and LayerScope's artifact's are, HybriMoE's as
far as it is described; Fate and Klotski fetch what they miss, Klotski without a cache. What is not known is told with
it.
"""

from dataclasses import asdict, dataclass, replace

from benchmarks.legacy_servers.contestants import CONTESTANTS
from benchmarks.legacy_servers.published import (
    A100_LINK,
    CONSTANTS,
    FIGURES,
    V100_LINK,
    Card,
    Constants,
    Figure,
    System,
    slots_of,
)
from benchmarks.legacy_servers.rule_times import step_time
from benchmarks.legacy_servers.settings import PAPER_SERVER, PAPER_WEIGHTS, held, shape_of
from benchmarks.legacy_servers.simulated import run
from benchmarks.servers.routing import generate
from benchmarks.servers.simulation import Steps
from moe_offload.scheduling.policies import plan_fiddler, plan_greedy, plan_lru, plan_tokens
from moe_offload.transfer.server_profile import ServerProfile, find_profile

PLANNERS = {
    "LayerScope": plan_tokens, "HybriMoE": plan_greedy, "Fiddler": plan_fiddler, "Fate": plan_lru, "Klotski": plan_lru,
}  # fmt: skip
_ENGINE: dict[System, str] = {"LayerScope": "layerscope", "HybriMoE": "hybrimoe", "Fiddler": "fiddler"}
STEPS = Steps(24, 4, 4)
UNKNOWN = (
    "The experts that each system kept on the card: the artifact hard-codes 993/893/693 for DeepSeek-V2-Lite and its"
    " list for Moonlight has 840; which batch had which, and Qwen3's number, are not said (here: what 32 GB hold).",
    "The routing of ShareGPT: here it is synthetic, and how many experts are wanted and found on the card follows"
    " from it.",
    "What stands around the experts: Hugging Face modules with a synchronisation after attention, gate and every"
    " expert. It is not in the constants, and no share of it was published.",
    "The effect of predictor and prefetch: the artifact sleeps instead of copying ahead and computes another expert in"
    " the place of a prefetched one; with batches up to 16 it does not prefetch at all.",
    "The A100: its constants were not published. The V100's are taken, copies at 12/25 of the time; the host is the"
    " V100's, as in the paper, and the memory 32 GB.",
    "HybriMoE, Fate and Klotski: their code was not run here; their rules are taken as described.",
    "Batch 1, Mixtral, int8 and int4: no absolute figure was read.",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One figure. seconds of a step: published; by the constants, at once and in turn; of the simulated engine."""

    card: Card
    model: str
    batch: int
    system: System
    slots: int
    slots_known: bool
    hits: float
    published: float
    at_once: float
    in_turn: float
    engine: float | None

    @property
    def error(self) -> float:
        """Of the closer of the constants' two sums, relative to what was published; 0 in between."""
        if self.at_once <= self.published <= self.in_turn:
            return 0.0
        nearest = self.in_turn if self.published > self.in_turn else self.at_once
        return nearest / self.published - 1

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "error": self.error}


def server_of(card: Card) -> ServerProfile:
    """The paper's machine: the V100's host under either card."""
    host = find_profile(PAPER_SERVER)
    if card == "V100":
        return host
    device = find_profile("a100")
    return replace(
        host, name="paper-a100", description="A100, 32 GB of it, Xeon Gold 6230R", device=device.device,
        precision=device.precision, memory_bytes=host.memory_bytes, memory_gbs=device.memory_gbs, flops=device.flops,
        link_gbs=device.link_gbs, launch_seconds=device.launch_seconds, kernel_seconds=device.kernel_seconds,
        wait_seconds=device.wait_seconds,
    )  # fmt: skip


def constants_of(card: Card, model: str) -> Constants:
    """Published for the V100."""
    found = CONSTANTS[model]
    return found if card == "V100" else replace(found, copy=found.copy * V100_LINK / A100_LINK)


def check(figure: Figure, steps: Steps = STEPS) -> Check:
    """A published figure beside ours."""
    shape, server = shape_of(figure.model, PAPER_WEIGHTS), server_of(figure.card)
    known = slots_of(figure.model, figure.batch)
    slots = held(server, shape, figure.batch) if known is None else known
    choices = generate(shape, figure.batch, steps.total)
    resident = 0 if figure.system == "Klotski" else slots
    by_rule = step_time(
        server, shape, constants_of(figure.card, figure.model), PLANNERS[figure.system], choices,
        steps.seen + steps.warm, resident,
    )  # fmt: skip
    engine = None
    if figure.system in _ENGINE:
        contestant = next(each for each in CONTESTANTS if each.name == _ENGINE[figure.system])
        engine = min(
            run(server, shape, contestant, ahead, choices, steps, slots).seconds_per_step for ahead in contestant.runs
        )
    return Check(
        figure.card, figure.model, figure.batch, figure.system, resident, known is not None, by_rule.hits,
        figure.seconds, by_rule.at_once, by_rule.in_turn, engine,
    )  # fmt: skip


def validate(steps: Steps = STEPS) -> list[Check]:
    """Every figure."""
    return [check(figure, steps) for figure in FIGURES]


def describe(check: Check) -> str:
    """One line for people."""
    engine = "" if check.engine is None else f"; simulated engine {check.engine:.3f} s"
    return (
        f"{check.card} {check.model} batch {check.batch} {check.system}: published {check.published:.2f} s/step,"
        f" by the constants {check.at_once:.2f} (at once) to {check.in_turn:.2f} s (in turn), error {check.error:+.0%}"
        f"{engine}"
    )
