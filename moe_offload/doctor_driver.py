"""Judgement of `moe-offload doctor` on what comes before any card: the driver, torch as a whole, what hides cards."""

import re

from moe_offload.doctor_facts import MachineFacts
from moe_offload.doctor_findings import (
    HOPPER,
    INSTALL_DRIVER,
    LAST_FOR_VOLTA,
    TURING,
    Finding,
    capabilities,
    dotted,
    driver_of_cuda,
    torch_build,
    torch_command,
)

_ALL_GPUS = "start the container with --gpus all; the host needs NVIDIA's driver and its container toolkit"
_AGAIN = "; then run moe-offload doctor again"


def no_card(facts: MachineFacts) -> Finding:
    """Why there is no card to speak of, and what to do if there should be one."""
    driver = facts.driver
    if driver.nvml_error is not None and "mismatch" in driver.nvml_error.lower():
        return _restart(facts)
    if facts.wsl and facts.cuda.cuda is None and not driver.nvml:
        text = "nothing that is installed here could see an NVIDIA card from WSL"
        return Finding("note", text, command="pip install nvidia-ml-py")
    if facts.wsl:
        text = "no NVIDIA card is seen from WSL"
        return Finding(
            "note",
            text,
            instruction="if there is one, install NVIDIA's driver in Windows, then run wsl --shutdown there" + _AGAIN,
        )
    if facts.container and (driver.version is not None or driver.on_bus):
        return Finding("problem", "there is an NVIDIA card, but this container does not see it", instruction=_ALL_GPUS)
    if driver.version is None and driver.on_bus:
        text = f"an NVIDIA card is on the bus ({', '.join(driver.on_bus)}), but NVIDIA's driver is not loaded"
        return Finding("problem", text, instruction=INSTALL_DRIVER)
    if driver.version is not None and driver.on_bus and _drives_no_old_card(facts):
        return _not_driven(facts, driver.on_bus)
    if driver.version is not None and not driver.device_nodes:
        text = f"driver {dotted(driver.version)} is loaded, but /dev has no NVIDIA devices"
        return Finding("problem", text, command="sudo nvidia-modprobe -c 0 -u")
    if driver.version is not None:
        text = f"driver {dotted(driver.version)} is loaded, but has no card"
        return Finding("problem", text, command="sudo dmesg | grep -iE 'nvrm|xid'")
    if facts.container:
        return Finding(
            "note", "no NVIDIA card is seen in this container", instruction=f"if there is one, {_ALL_GPUS}{_AGAIN}"
        )
    return Finding(
        "note",
        "no NVIDIA card was found",
        instruction="if there is one, lspci -d 10de: must list it; if it does not, look at its seat, its power and the "
        f"firmware's settings, or at what this virtual machine was given{_AGAIN}",
    )


def driver_findings(facts: MachineFacts) -> list[Finding]:
    """Of a machine with cards: what is wrong with the driver, with torch as a whole, and what hides the cards."""
    problem = _old_driver(facts)
    findings: list[Finding] = [] if problem is None else [problem]
    driver, cuda = facts.driver, facts.cuda
    if driver.nvml_error is not None and "mismatch" in driver.nvml_error.lower():
        findings.append(_restart(facts))
    if cuda.cuda is None:
        findings.append(
            Finding("problem", f"torch {cuda.torch} has no CUDA", command=torch_command(torch_build(facts)))
        )
    seen = any(card.index is not None for card in facts.cards)
    if not seen and facts.visible is not None and hides_all(facts):
        text = f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides every card"
        findings.append(Finding("problem", text, command="unset CUDA_VISIBLE_DEVICES"))
    if not seen and not findings:
        said = f" ({cuda.trouble})" if cuda.trouble else ""
        if facts.container and not driver.device_nodes:
            findings.append(Finding("problem", f"CUDA does not start{said}", instruction=_ALL_GPUS))
        else:
            help_ = f"run nvidia-smi: if it fails, {INSTALL_DRIVER}; if it works, restart the machine"
            findings.append(Finding("problem", f"CUDA does not start{said}", instruction=help_))
    if driver.version is not None:
        known = {card.bus for card in facts.cards}
        missing = tuple(bus for bus in driver.on_bus if bus not in known)
        if missing and None not in known:
            findings.append(_not_driven(facts, missing))
    return findings


def hides_all(facts: MachineFacts) -> bool:
    """Whether CUDA_VISIBLE_DEVICES names no card: CUDA stops at the first name that it does not know."""
    first = (facts.visible or "").partition(",")[0].strip()
    if re.fullmatch(r"\d{1,9}", first, re.ASCII):
        return int(first) >= len(facts.cards)
    if first.upper().startswith("MIG"):
        return False
    name = first.lower().removeprefix("gpu-")
    return not name or not any(card.uuid is None or card.uuid.startswith(name) for card in facts.cards)


def _old_driver(facts: MachineFacts) -> Finding | None:
    """For the torch that this machine should have, else for the one that it has."""
    version, build = facts.driver.version, torch_build(facts)
    if version is None:
        return None
    needed = driver_of_cuda("12.6" if build == "cu126" else "13.0")
    if version < needed:
        cards = capabilities(facts)
        why = "cards newer than Hopper" if cards and cards[-1] > HOPPER else "every torch that can be used"
        text = f"driver {dotted(version)} is too old: {why} need at least {dotted(needed)}"
        return Finding("problem", text, instruction=INSTALL_DRIVER)
    own = facts.cuda.cuda
    if own is not None and version < driver_of_cuda(own):
        text = (
            f"torch {facts.cuda.torch} is built with CUDA {own}, which needs driver {dotted(driver_of_cuda(own))}, and "
            f"this one is {dotted(version)}"
        )
        return Finding("problem", text, command=torch_command(build))
    return None


def _drives_no_old_card(facts: MachineFacts) -> bool:
    version = facts.driver.version
    return facts.driver.open_module or (version is not None and version[:1] > (LAST_FOR_VOLTA,))


def _not_driven(facts: MachineFacts, buses: tuple[str, ...]) -> Finding:
    version = dotted(facts.driver.version)
    text = f"driver {version} does not drive the NVIDIA card at {', '.join(buses)}"
    if _drives_no_old_card(facts):
        kind = "with the open kernel module " if facts.driver.open_module else ""
        return Finding("problem", f"{text}; {kind}it drives no Pascal and no Volta", instruction=INSTALL_DRIVER)
    return Finding("advice", text, command="sudo dmesg | grep -iE 'nvrm|xid'")


def _restart(facts: MachineFacts) -> Finding:
    text = f"NVIDIA's driver was updated while it ran (NVML: {facts.driver.nvml_error})"
    return Finding("problem", text, instruction="restart the machine")


def last_driver_note(facts: MachineFacts) -> Finding | None:
    """Said where a newer driver would take the cards away."""
    known = capabilities(facts)
    if not known or known[0] >= TURING:
        return None
    return Finding(
        "note",
        f"driver branch {LAST_FOR_VOLTA} is the last for Pascal and Volta: a newer one does not drive "
        + ("them" if known[-1] < TURING else "those of these cards"),
    )
