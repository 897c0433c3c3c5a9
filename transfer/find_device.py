"""From a word of the user to a device: "auto", "cpu", "cuda", "cuda:N" or "virtual:PROFILE".

What this machine has is looked at once (`detect_cuda`); what follows from it is decided by plain functions on those
facts.
"""

import re
import warnings
from dataclasses import dataclass
from typing import Literal, cast

import torch

from moe_offload.transfer.accelerator import Accelerator, DeviceError

# The default wheels have no kernels for Pascal and Volta; those of CUDA 12.6 have, up to torch 2.14.
OLD_CARDS = 'pip install "torch>=2.6,<2.15" --index-url https://download.pytorch.org/whl/cu126'
ANOTHER_TORCH = "pip uninstall -y torch"  # before: pip takes any build of a version for the same
NEW_CARDS = "pip install torch --index-url https://download.pytorch.org/whl/cu130"

OLDEST = (6, 0)  # compute capability that our kernels are made for

_REQUEST = re.compile(r"(auto|cpu|cuda)|cuda:([0-9]{1,3})|virtual:(\S+)")


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """`index`: torch's number of a card, for "cuda". `profile`: a server's name, for "virtual"."""

    kind: Literal["auto", "cpu", "cuda", "virtual"]
    index: int = 0
    profile: str = ""

    def __str__(self) -> str:
        return {"cuda": f"cuda:{self.index}", "virtual": f"virtual:{self.profile}"}.get(self.kind, self.kind)


@dataclass(frozen=True, slots=True)
class Card:
    """A card as CUDA sees it. `capability` (6, 1) is compute capability 6.1."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class CudaFacts:
    """This torch and the cards it sees. `cuda`: what it was built with, None for a CPU build. `architectures`: as of
    torch.cuda.get_arch_list(). `trouble`: what CUDA said when it was asked to start.
    """

    torch: str
    cuda: str | None
    architectures: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    trouble: str | None = None


def parse_device(request: str) -> DeviceChoice:
    """Raises ValueError for what is no device."""
    match = _REQUEST.fullmatch(request) if isinstance(request, str) else None
    if match is None:
        raise ValueError(f"there is no device {request!r}: choose auto, cpu, cuda, cuda:N or virtual:PROFILE")
    word, index, profile = match.groups()
    if profile is not None:
        return DeviceChoice("virtual", profile=profile)
    if index is not None:
        return DeviceChoice("cuda", int(index))
    return DeviceChoice(cast(Literal["auto", "cpu", "cuda"], word))


def detect_cuda() -> CudaFacts:
    """Never raises."""
    version, cuda = str(torch.__version__), torch.version.cuda
    if cuda is None:
        return CudaFacts(version, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own words about cards that it has no kernels for
            torch.cuda.init()  # type: ignore[no-untyped-call]
            found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        cards = tuple(Card(str(card.name), (card.major, card.minor), int(card.total_memory)) for card in found)
        return CudaFacts(version, cuda, tuple(torch.cuda.get_arch_list()), cards)
    except Exception as error:
        return CudaFacts(version, cuda, trouble=str(error).strip().partition("\n")[0] or type(error).__name__)


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a card runs code built for one of `architectures`.

    Code for sm_60 runs on 6.1, but neither on 5.2 nor on 7.0; compute_60 is compiled for any later card; sm_90a and
    sm_100f are for that card, and that family.
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        kind, built, suffix = match[1], (int(match[2]), int(match[3])), match[4]
        if suffix == "a":
            fits = capability == built
        elif kind == "sm" or suffix == "f":
            fits = capability[0] == built[0] and capability[1] >= built[1]
        else:
            fits = capability >= built
        if fits:
            return True
    return False


def cuda_problem(facts: CudaFacts, index: int) -> str | None:
    """Why cuda:`index` cannot be used, and what to do; None when it can."""
    if facts.cuda is None:
        return (
            f"torch {facts.torch} has no CUDA: {ANOTHER_TORCH}, then for Pascal and Volta cards {OLD_CARDS}, for newer "
            f"ones {NEW_CARDS}"
        )
    if facts.trouble is not None:
        return (
            f"CUDA does not start ({facts.trouble}): torch {facts.torch} needs an NVIDIA driver for CUDA {facts.cuda}; "
            "see what nvidia-smi says"
        )
    if not facts.cards:
        return "CUDA sees no card: see what nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides it"
    if index >= len(facts.cards):
        last = len(facts.cards) - 1
        return f"there is no cuda:{index}: " + (
            "cuda:0 is the only card" if last == 0 else f"cuda:0 to cuda:{last} exist"
        )
    card = facts.cards[index]
    if card.capability < OLDEST:
        major, minor = card.capability
        return (
            f"{card.name} (cuda:{index}) has compute capability {major}.{minor}, and Pascal (6.0) is the oldest that "
            "is supported: take device cpu"
        )
    if not runs_on(facts.architectures, card.capability):
        major, minor = card.capability
        mend = OLD_CARDS if card.capability < (7, 5) else NEW_CARDS
        return (
            f"{card.name} (cuda:{index}) has compute capability {major}.{minor}, and torch {facts.torch} has code for "
            f"{' '.join(facts.architectures) or 'none'} only: {ANOTHER_TORCH} && {mend}"
        )
    return None


def resolve_device(choice: DeviceChoice, facts: CudaFacts) -> DeviceChoice:
    """The first usable card, or the CPU, for "auto". Raises DeviceError for a card that cannot be used."""
    if choice.kind == "auto":
        usable = [index for index in range(len(facts.cards)) if cuda_problem(facts, index) is None]
        return DeviceChoice("cuda", usable[0]) if usable else DeviceChoice("cpu")
    if choice.kind == "cuda":
        problem = cuda_problem(facts, choice.index)
        if problem is not None:
            raise DeviceError(problem)
    return choice


def open_accelerator(
    choice: DeviceChoice, budget: int | None = None, *, facts: CudaFacts | None = None
) -> Accelerator | None:
    """The device with `budget` bytes for us (None: all that is free); None for the CPU.

    Raises ValueError for a budget that is larger than the card and for a profile that does not exist, DeviceError for a
    card that cannot be used. `facts`: None to look.
    """
    if choice.kind == "virtual":
        from moe_offload.transfer.server_profile import find_profile
        from moe_offload.transfer.virtual import VirtualAccelerator

        profile = find_profile(choice.profile)
        _check_budget(budget, profile.memory_bytes, f"{choice}")
        return VirtualAccelerator(profile, budget)
    if choice.kind == "cpu":
        return None
    facts = facts or detect_cuda()
    choice = resolve_device(choice, facts)
    if choice.kind == "cpu":
        return None
    from moe_offload.transfer.cuda import CudaAccelerator

    card = facts.cards[choice.index]
    _check_budget(budget, card.memory_bytes, f"{card.name} ({choice})")
    return CudaAccelerator(choice.index, budget)


def _check_budget(budget: int | None, memory_bytes: int, device: str) -> None:
    if budget is not None and not 0 < budget <= memory_bytes:
        raise ValueError(f"a budget of {budget} bytes of device memory: {device} has {memory_bytes}, give 1 to as many")
