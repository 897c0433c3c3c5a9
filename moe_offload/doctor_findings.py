"""A finding of `moe-offload doctor`, and the commands and versions that several findings need."""

from dataclasses import dataclass
from typing import Literal

from moe_offload.doctor_facts import MachineFacts
from moe_offload.transfer.card_facts import CardFacts
from moe_offload.transfer.find_device import ANOTHER_TORCH, NEW_CARDS, OLD_CARDS, cuda_problem

Severity = Literal["problem", "advice", "note"]
Section = Literal["CPU", "memory", "disk", "GPU", "software"]
Build = Literal["cu126", "cu130"]
Capability = tuple[int, int]

PASCAL, VOLTA, TURING, AMPERE, HOPPER = (6, 0), (7, 0), (7, 5), (8, 0), (9, 0)
LAST_FOR_VOLTA = 580  # the last driver branch for Maxwell, Pascal and Volta
_DRIVER_OF_CUDA = {13: (580,), 12: (525, 60, 13), 11: (450, 80, 2)}
# pip takes a torch of another build for the one that is asked for, and changes nothing: so it has to go first
_TORCH = {build: f"{ANOTHER_TORCH} && {command}" for build, command in (("cu126", OLD_CARDS), ("cu130", NEW_CARDS))}
INSTALL_DRIVER = (
    f"install NVIDIA's driver {LAST_FOR_VOLTA}, the last that drives Pascal and Volta, and restart; on Ubuntu: "
    f"sudo apt install nvidia-driver-{LAST_FOR_VOLTA} (not -open, which drives no card before Turing)"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, and what mends it: a command for the shell, or an instruction where no command can do it.

    A "problem" keeps a card, or everything, from being used; "advice" makes it better; a "note" is worth knowing.
    `card`: torch's number of the card that it is about, None for all of the machine.
    `section`: of the report, where it belongs to.
    """

    severity: Severity
    text: str
    command: str | None = None
    instruction: str | None = None
    card: int | None = None
    section: Section = "GPU"

    def __post_init__(self) -> None:
        mends = sum(each is not None for each in (self.command, self.instruction))
        if mends > 1 or (mends == 0 and self.severity != "note"):
            raise ValueError(f"{self.severity} {self.text!r} has {mends} ways to mend it: it needs one")


def is_supported(card: CardFacts) -> bool:
    """Also true where nobody knows the card's compute capability."""
    return card.capability is None or card.capability >= PASCAL


def is_usable(facts: MachineFacts, card: CardFacts) -> bool:
    """Whether models run on it as the machine is."""
    return card.index is not None and is_supported(card) and cuda_problem(facts.cuda, card.index) is None


def capabilities(facts: MachineFacts) -> list[Capability]:
    """Of the cards that are supported, the oldest first."""
    return sorted(card.capability for card in facts.cards if card.capability is not None and is_supported(card))


def torch_build(facts: MachineFacts) -> Build:
    """The build of torch for these cards and this driver. The oldest card decides; where nobody knows the cards, it is
    the build that serves most of them, from Maxwell to Hopper.
    """
    known = capabilities(facts)
    if not known or known[0] < TURING:
        return "cu126"
    if known[-1] > HOPPER:
        return "cu130"
    old_driver = facts.driver.version is not None and facts.driver.version < driver_of_cuda("13.0")
    return "cu126" if old_driver else "cu130"


def torch_command(build: Build) -> str:
    """Puts this build in the place of the torch that is there."""
    return _TORCH[build]


def driver_of_cuda(cuda: str) -> tuple[int, ...]:
    """The oldest driver for programs built with CUDA '12.6'; () where nobody knows."""
    major = cuda.partition(".")[0]
    return _DRIVER_OF_CUDA.get(int(major), ()) if major.isascii() and major.isdigit() else ()


def label(card: CardFacts) -> str:
    """'NVIDIA GeForce GTX 1080 Ti (cuda:0)'."""
    place = f"cuda:{card.index}" if card.index is not None else card.bus
    return card.name if place is None else f"{card.name} ({place})"


def dotted(version: tuple[int, ...] | None) -> str:
    """(535, 183, 1) -> '535.183.01', as NVIDIA writes it; 'unknown' for none."""
    if not version:
        return "unknown"
    return ".".join([str(version[0]), *(f"{part:02d}" for part in version[1:])])
