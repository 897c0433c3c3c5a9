"""`moe-offload plan`: what goes where, whether it fits, what would make it fit, and how fast it would be.

From a model's folder, a server (a profile, or this machine) and what is wanted of both; nothing is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moe_offload.models.errors import OptionError
from moe_offload.plan_placement import Budgets, Placement, place
from moe_offload.plan_predict import Case, Prediction, kv_choices, predict
from moe_offload.plan_rates import HostRates
from moe_offload.plan_sizes import ModelSizes, PlannedModel
from moe_offload.transfer.server_profile import ServerProfile

PROMPT_TOKENS = 512
DEFAULT_CONTEXT = 4096
MOST_SEQUENCES = 4096
MOST_BYTES = 1 << 50

Verdict = Literal["fits", "runs from disk", "does not fit"]


@dataclass(frozen=True, slots=True)
class PlanServer:
    """Where the model is to run. card: its rates, None without one. gpu, ram: bytes for the model. host: the rates of
    the CPU for a model of these sizes. facts: what the figures rest on, a line each.
    """

    name: str
    simulated: bool
    card: ServerProfile | None
    gpu: int
    ram: int
    disk_gbs: float
    host: Callable[[ModelSizes], HostRates]
    facts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Wish:
    """weights: a format, not "auto". context: positions of each of `sequences`."""

    weights: str
    context: int
    sequences: int
    budgets: Budgets


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is printed. changes: each alone would make it fit, smallest first. decode, prompt: None where it does
    not run.
    """

    model: str
    server: PlanServer
    wish: Wish
    sizes: ModelSizes
    placement: Placement
    verdict: Verdict
    reason: str
    changes: tuple[str, ...]
    decode: Prediction | None
    prompt: Prediction | None
    read_gbs: float
    assumptions: tuple[str, ...]


def check_wish(model: PlannedModel, weights: str, context: int | None, sequences: int) -> int:
    """The context that is meant. Raises OptionError or UnsupportedModelError for what cannot be."""
    model.check(weights)
    longest = model.spec.max_context
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if context < 1 or (longest is not None and context > longest):
        bound = f"from 1 to {longest}, the model's own limit" if longest else "at least 1"
        raise OptionError(f"--context {context} is out of bounds: give {bound}")
    if context > 1 << 30:
        raise OptionError(f"--context {context} is out of bounds: give at most {1 << 30}")
    if not 1 <= sequences <= MOST_SEQUENCES:
        raise OptionError(f"--batch {sequences} is out of bounds: give 1 to {MOST_SEQUENCES} sequences")
    return context


def choose_format(model: PlannedModel, weights: str, ram: int) -> str:
    """What weights="auto" takes: as stored if that fits in the host's memory, else int8, else int4, else as stored."""
    if weights != "auto":
        return weights
    for name in model.formats:
        sizes = model.sizes(name)
        if sizes.expert_bytes + sizes.host_bytes <= ram:
            return name
    return model.stored


def make_plan(name: str, model: PlannedModel, server: PlanServer, weights: str, context: int, sequences: int) -> Plan:
    """Decide and predict. Raises what `PlanServer.host` does."""
    from moe_offload.plan_advice import changes_that_fit, say_what_lacks

    budgets = Budgets(server.gpu if server.card else 0, server.ram)
    wish = Wish(choose_format(model, weights, server.ram), context, sequences, budgets)
    sizes = model.sizes(wish.weights)
    verdict = judge(sizes, wish)
    host = server.host(sizes)
    placement, decode = best_placement(sizes, wish, server, host)
    prompt = None
    if decode is not None:
        tokens = min(PROMPT_TOKENS, context)
        prompt = predict(sizes, placement, host, server.disk_gbs, server.card, Case(tokens, tokens, 1, prompt=True))
    changes = () if verdict == "fits" else changes_that_fit(model, wish)
    reason = "" if verdict == "fits" else say_what_lacks(placement, wish)
    return Plan(
        name, server, wish, sizes, placement, verdict, reason, changes, decode, prompt, host.read_gbs,
        _assumptions(sizes, server, wish),
    )  # fmt: skip


def judge(sizes: ModelSizes, wish: Wish) -> Verdict:
    """Whether there is a placement, and whether one keeps all experts in memory."""
    placements = list(all_placements(sizes, wish))
    if any(each.runs and not each.disk for each in placements):
        return "fits"
    return "runs from disk" if any(each.runs for each in placements) else "does not fit"


def all_placements(sizes: ModelSizes, wish: Wish) -> list[Placement]:
    """By how many layers' KV cache are on the card."""
    choices = kv_choices(sizes) if wish.budgets.gpu else range(1)
    return [place(sizes, wish.budgets, wish.context, wish.sequences, layers) for layers in choices]


def best_placement(
    sizes: ModelSizes, wish: Wish, server: PlanServer, host: HostRates
) -> tuple[Placement, Prediction | None]:
    """The quickest that runs; where none does, the one that lacks least, and no prediction."""
    placements = all_placements(sizes, wish)
    case = Case(wish.sequences, wish.context, wish.sequences)
    found = [(each, predict(sizes, each, host, server.disk_gbs, server.card, case)) for each in placements if each.runs]
    if not found:
        return min(placements, key=lambda each: (each.lacking_gpu + each.lacking_ram, each.lacking_gpu)), None
    return min(found, key=lambda pair: pair[1].seconds)


def _assumptions(sizes: ModelSizes, server: PlanServer, wish: Wish) -> tuple[str, ...]:
    said = [
        f"all {wish.context} positions filled" if wish.context > 1 else "one position",
        "experts equally likely: real routing is uneven, which helps caches",
        "no prediction of experts",
    ]
    if sizes.weights == "fp8":
        said.append("fp8 experts run through torch: a guess")
    if server.card is not None and any(not layer.movable for layer in sizes.kv):
        kept = sum(not layer.movable for layer in sizes.kv)
        said.append(f"the KV cache of {kept} of {len(sizes.kv)} layers has to be on the card")
    return (*said, *server.facts)
