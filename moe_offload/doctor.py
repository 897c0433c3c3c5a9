"""The judgement of `moe-offload doctor`: what follows from the facts about a machine. Looks at nothing itself."""

from dataclasses import dataclass, replace

from moe_offload.doctor_cards import card_findings
from moe_offload.doctor_cpu import cpu_findings
from moe_offload.doctor_disk import disk_findings
from moe_offload.doctor_driver import driver_findings, last_driver_note, no_card
from moe_offload.doctor_facts import MachineFacts
from moe_offload.doctor_findings import Finding, capabilities, is_supported, is_usable, torch_build
from moe_offload.doctor_memory import memory_findings
from moe_offload.doctor_software import software_findings, transformers_finding
from moe_offload.transfer.cupy_check import CupyFacts, find_cupy_problem, remove_second_compiler
from moe_offload.transfer.find_device import DeviceChoice, cuda_problem

_ORDER = ("problem", "advice", "note")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`runs`: models run here at all. `usable`: torch's numbers of the cards that can be used; the first is what
    --device auto takes. `refused`: why the device that was asked for cannot be used.
    """

    runs: bool
    usable: tuple[int, ...]
    findings: tuple[Finding, ...]
    refused: str | None = None

    @property
    def good(self) -> bool:
        """Models run, and on the device that was asked for."""
        return self.runs and self.refused is None


def judge(facts: MachineFacts, device: DeviceChoice | None = None) -> Verdict:
    """Never raises. The worst findings come first. `device`: what was asked for, None for whatever there is."""
    usable = tuple(card.index for card in facts.cards if card.index is not None and is_usable(facts, card))
    of_cards = _of_cards(facts) if facts.cards else [no_card(facts)]
    if not usable and not of_cards:  # a card of which nobody knows more than its name
        unseen = cuda_problem(facts.cuda, 0) or "no card can be used"
        of_cards = [Finding("problem", unseen, instruction="see what nvidia-smi says")]
    library = transformers_finding(facts.transformers)
    of_software = [*([] if library is None else [library]), *software_findings(facts.software, facts.cpu)]
    of_host = [
        *cpu_findings(facts.cpu, facts.memory.modules),
        *memory_findings(facts.memory, bool(usable)),
        *disk_findings(facts.disks),
    ]
    findings = sorted([*of_software, *of_cards, *of_host], key=lambda each: _ORDER.index(each.severity))
    runs = all(each.severity != "problem" for each in of_software)
    refused = None
    if device is not None and device.kind == "cuda" and device.index not in usable:
        refused = _refused(facts, device.index, of_cards)
    return Verdict(runs, usable, tuple(findings), refused)


def _of_cards(facts: MachineFacts) -> list[Finding]:
    findings = driver_findings(facts)
    for card in facts.cards:
        findings += card_findings(facts, card)
    if any(map(is_supported, facts.cards)):
        findings += _cupy(facts)
        note = last_driver_note(facts)
        findings += [] if note is None else [note]
    driver = facts.driver
    if not driver.nvml:
        text = "nvidia-ml-py is not installed: driver, link and what is hidden are only partly known"
        findings.append(Finding("advice", text, command="pip install nvidia-ml-py"))
    elif driver.nvml_error is not None and "mismatch" not in driver.nvml_error.lower():
        findings.append(Finding("note", f"NVML does not answer ({driver.nvml_error}): the link is only partly known"))
    if facts.wsl:
        text = "WSL locks less memory than there is, and so keeps fewer experts ready for the card"
        findings.append(Finding("note", text, instruction="where loading fails to lock memory, give --ram SIZE"))
    return findings


def _cupy(facts: MachineFacts) -> list[Finding]:
    needs = cupy_needs(facts)
    problem = find_cupy_problem(needs)
    if problem is not None:
        text = f"{problem.text}; until then torch's operations compute experts on the card instead of our kernels"
        return [Finding("advice", text, command=problem.command)]
    command = remove_second_compiler(needs)
    if command is None:
        return []
    text = "compilers (NVRTC) of CUDA 12 and of CUDA 13 are installed; moe-offload takes 12, other programs may not"
    return [Finding("note", text, command=command)]


def cupy_needs(facts: MachineFacts) -> CupyFacts:
    """CuPy for the oldest supported card, and for the torch that is to be installed where this one has to go."""
    known = capabilities(facts)
    serves = any(is_usable(facts, card) for card in facts.cards)
    planned = "12.6" if torch_build(facts) == "cu126" else "13.0"
    return replace(
        facts.cupy,
        capability=known[0] if known else None,
        cuda=facts.cuda.cuda if serves else planned,
        driver=facts.driver.version,
    )


def _refused(facts: MachineFacts, index: int, findings: list[Finding]) -> str:
    """In one line: what is wrong with this card, else with the machine."""
    if 0 < len(facts.cuda.cards) <= index:
        return cuda_problem(facts.cuda, index) or f"there is no cuda:{index}"
    about = [each for card in (index, None) for each in findings if each.card == card]
    return next((each.text for each in about if each.severity == "problem" or not facts.cards), "torch does not see it")
