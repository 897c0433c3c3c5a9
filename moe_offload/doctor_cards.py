"""Judgement of `moe-offload doctor` on a card: whether torch runs on it, how it is connected, what it computes with."""

from dataclasses import dataclass

from moe_offload.doctor_facts import MachineFacts
from moe_offload.doctor_findings import (
    AMPERE,
    HOPPER,
    TURING,
    VOLTA,
    Capability,
    Finding,
    capabilities,
    is_supported,
    is_usable,
    label,
    torch_build,
    torch_command,
)
from moe_offload.memory import format_bytes
from moe_offload.transfer.card_facts import CardFacts
from moe_offload.transfer.find_device import NEW_CARDS, runs_on

_SLOW = 0.6  # of the link's rate; page-locked copies reach 0.7 to 0.9 where nothing is wrong
_DP4A = (6, 1)


@dataclass(frozen=True, slots=True)
class NumericPaths:
    """What a card computes with. `byte_dot`: dp4a, for int4 and int8 experts. `tensor_f16`, `bf16`: tensor cores for
    f16, and bf16 at all.
    """

    byte_dot: bool
    tensor_f16: bool
    bf16: bool

    @property
    def quantised(self) -> str:
        """How int4 and int8 experts run."""
        return "byte dot products (dp4a)" if self.byte_dot else "byte products one by one (no dp4a)"

    @property
    def sixteen_bits(self) -> str:
        """How 16-bit weights run."""
        if self.bf16:
            return "tensor cores, bf16 and f16"
        return "tensor cores, f16" if self.tensor_f16 else "f32 arithmetic"

    @property
    def bf16_checkpoints(self) -> str:
        """What becomes of weights stored in bf16."""
        return "as stored" if self.bf16 else "experts as stored; the rest in f16, or f32 if out of range"


def numeric_paths(capability: Capability, name: str = "") -> NumericPaths:
    """By compute capability; the GTX 16 series is Turing without tensor cores."""
    return NumericPaths(capability >= _DP4A, capability >= VOLTA and "GTX 16" not in name, capability >= AMPERE)


def card_findings(facts: MachineFacts, card: CardFacts) -> list[Finding]:
    """What is wrong with this one, on a machine whose driver and torch are there."""
    problem = _torch_problem(facts, card)
    found: list[Finding] = [] if problem is None else [problem]
    if card.index is None:
        return found
    if is_usable(facts, card):
        found += [each for each in (_copy(card), _memory(card)) if each is not None]
    link = card.link
    if link.width and link.most_width and link.width < link.most_width:
        text = f"{label(card)} is connected by {link.width} of {link.most_width} lanes"
        help_ = "a slot with more lanes, or another riser, makes fetching experts faster"
        found.append(Finding("advice", text, instruction=help_, card=card.index))
    return found


def _torch_problem(facts: MachineFacts, card: CardFacts) -> Finding | None:
    if not is_supported(card):
        return Finding(
            "problem",
            f"{label(card)} has compute capability {spoken(card.capability)}: Pascal (6.0) is the oldest that is "
            "supported",
            instruction="use --device cpu, or --device cuda:N with another card",
            card=card.index,
        )
    if card.index is None:
        if not any(each.index is not None for each in facts.cards):  # said of the whole machine
            return None
        if facts.visible is not None:
            return Finding("note", f"{label(card)} is hidden by CUDA_VISIBLE_DEVICES={facts.visible!r}")
        return Finding("advice", f"torch does not see {label(card)}", command="nvidia-smi")
    if card.capability is None or facts.cuda.cuda is None or runs_on(facts.cuda.architectures, card.capability):
        return None
    text = (
        f"{label(card)} has compute capability {spoken(card.capability)}, and torch {facts.cuda.torch} has code for "
        f"{' '.join(facts.cuda.architectures) or 'none'} only"
    )
    build = torch_build(facts)
    if build == "cu126" and card.capability > HOPPER and capabilities(facts)[0] < TURING:
        help_ = f"no torch serves it and the older cards: give it a virtual environment of its own, with {NEW_CARDS}"
        return Finding("problem", text, instruction=help_, card=card.index)
    return Finding("problem", text, command=torch_command(build), card=card.index)


def _copy(card: CardFacts) -> Finding | None:
    if card.copy_error is not None:
        text = f"a copy to {label(card)} could not be measured: {card.copy_error}"
        return Finding("advice", text, instruction="close other programs on the card, and try again", card=card.index)
    rate = card.link.rate
    if card.copy_rate is None or rate is None or card.copy_rate >= _SLOW * rate:
        return None
    return Finding(
        "advice",
        f"copies to {label(card)} reach {card.copy_rate / 1e9:.1f} of {rate / 1e9:.1f} GB/s",
        instruction="look for a riser or a slot that is slower than the card, for programs that copy meanwhile, and "
        "for memory on another NUMA node",
        card=card.index,
    )


def _memory(card: CardFacts) -> Finding | None:
    free, total = card.free_bytes, card.memory_bytes
    if free is None or total is None or 2 * free >= total:
        return None
    text = f"{format_bytes(free)} of {format_bytes(total)} of {label(card)} are free: other programs hold the rest"
    return Finding("advice", text, command="nvidia-smi", card=card.index)


def spoken(capability: Capability | None) -> str:
    """(6, 1) -> '6.1'."""
    return "unknown" if capability is None else f"{capability[0]}.{capability[1]}"
