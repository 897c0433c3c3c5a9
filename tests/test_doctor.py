"""Judgement on machines that need not exist: what is usable, what is wrong, and that every command can be run."""

import platform
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload import doctor_facts
from moe_offload.doctor import Verdict, judge
from moe_offload.doctor_cards import numeric_paths
from moe_offload.doctor_driver import hides_all
from moe_offload.doctor_facts import MachineFacts, detect_machine
from moe_offload.doctor_findings import Finding, torch_build
from moe_offload.doctor_software import TRANSFORMERS
from moe_offload.doctor_software_facts import PACKAGES
from moe_offload.transfer.card_facts import CardFacts, DriverFacts, Link
from moe_offload.transfer.cupy_check import CupyFacts
from moe_offload.transfer.find_device import NEW_CARDS, OLD_CARDS, Card, CudaFacts, DeviceChoice, cuda_problem
from tests import doctor_cases
from tests.doctor_cases import CPU, DISK, GIB, MEMORY, SOFTWARE

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
OLD_TORCH, NEW_TORCH = ("2.13.0+cu126", "12.6", CU126), ("2.13.0+cu130", "13.0", CU130)
TORCH12, TORCH13 = f"pip uninstall -y torch && {OLD_CARDS}", f"pip uninstall -y torch && {NEW_CARDS}"
INSTALL12, INSTALL13 = "pip install 'moe-offload[cuda12]'", "pip install 'moe-offload[cuda13]'"
NO_CUPY = CupyFacts()
CUPY12 = CupyFacts((("cupy-cuda12x", "14.2.0"),), (12,), compiler=(12, 6))
CUPY13 = CupyFacts((("cupy-cuda13x", "14.2.0"),), (13,), compiler=(13, 0))


def card(name: str, capability: tuple[int, int], gib: int, number: int = 0, **more: Any) -> CardFacts:
    known: dict[str, Any] = dict(
        memory_bytes=gib * GIB, free_bytes=gib * GIB, uuid=f"uuid-{number}", bus=f"0000:{number + 1:02x}:00.0",
        link=Link(1, 16, 3, 16), copy_rate=12e9,
    )  # fmt: skip
    return CardFacts(name, number, capability, **{**known, **more})


MAXWELL, GTX1080TI = card("GeForce GTX 980", (5, 2), 4), card("GeForce GTX 1080 Ti", (6, 1), 11)
P100, V100, T4 = card("Tesla P100", (6, 0), 16), card("Tesla V100", (7, 0), 32), card("Tesla T4", (7, 5), 15)
A100, H200, BLACKWELL = card("A100", (8, 0), 40), card("H200", (9, 0), 139), card("RTX 5090", (12, 0), 32)


def machine(
    *cards: CardFacts,
    torch: tuple[str, str | None, tuple[str, ...]] = OLD_TORCH,
    cupy: CupyFacts = CUPY12,
    driver: tuple[int, ...] | None = (580, 65, 6),
    seen: bool = True,
    trouble: str | None = None,
    **more: Any,
) -> MachineFacts:
    """`seen`: torch sees the cards."""
    cards = tuple(replace(each, index=number if seen else None) for number, each in enumerate(cards))
    of_torch = tuple(Card(each.name, each.capability or (0, 0), each.memory_bytes or 0) for each in cards)
    cuda = CudaFacts(*torch, cards=of_torch if seen else (), trouble=trouble)
    facts = DriverFacts(driver, (13, 0) if driver else None, False, driver is not None, nvml=True)
    host: dict[str, Any] = dict(cpu=CPU, memory=MEMORY, disks=(DISK,), software=SOFTWARE)
    return replace(MachineFacts(CPU, cuda, cupy, facts, cards, "5.23.0"), **{**host, **more})


def told(verdict: Verdict, *severities: str) -> list[str | None]:
    """What mends the findings, the worst first."""
    return [each.command or each.instruction for each in verdict.findings if each.severity in (severities or "problem")]


def with_driver(facts: MachineFacts, **changes: Any) -> MachineFacts:
    return replace(facts, driver=replace(facts.driver, **changes))


@pytest.mark.parametrize(
    ("facts", "usable"),
    [
        (machine(GTX1080TI), (0,)),
        (machine(P100), (0,)),
        (machine(V100), (0,)),
        (machine(T4, torch=NEW_TORCH, cupy=CUPY13), (0,)),
        (machine(A100, torch=NEW_TORCH, cupy=CUPY13), (0,)),
        (machine(A100, torch=NEW_TORCH, cupy=CUPY12), (0,)),  # works for newer cards too
        (machine(A100, driver=(535, 183, 1)), (0,)),
        (machine(H200, torch=NEW_TORCH, cupy=CUPY13), (0,)),
        (machine(GTX1080TI, T4, A100), (0, 1, 2)),
    ],
)
def test_machines_that_are_all_right(facts: MachineFacts, usable: tuple[int, ...]) -> None:
    verdict = judge(facts)
    assert verdict.good and verdict.usable == usable
    assert [each for each in verdict.findings if each.severity != "note"] == []


@pytest.mark.parametrize(
    ("facts", "usable", "problems", "advice"),
    [
        # what pip installs by itself has no code for Pascal and Volta
        (machine(GTX1080TI, torch=NEW_TORCH), (), [TORCH12], []),
        (machine(V100, torch=NEW_TORCH, cupy=NO_CUPY), (), [TORCH12], [INSTALL12]),
        (machine(GTX1080TI, cupy=CUPY13), (0,), [], [f"pip uninstall -y cupy-cuda13x && {INSTALL12}"]),
        (machine(P100, cupy=NO_CUPY), (0,), [], [INSTALL12]),
        (machine(T4, torch=NEW_TORCH, cupy=NO_CUPY), (0,), [], [INSTALL13]),
        (
            machine(V100, cupy=replace(CUPY12, compilers=(12, 13), compiler=(13, 5))),
            (0,), [], ["pip uninstall -y nvidia-cuda-nvrtc"],
        ),
        (
            machine(GTX1080TI, cupy=replace(CUPY12, compilers=(), compiler=(13, 0), compiler_file="/usr/lib/x.so.13")),
            (0,), [], [INSTALL12],
        ),
        (
            machine(A100, cupy=replace(CUPY12, wheels=(*CUPY12.wheels, *CUPY13.wheels))),
            (0,), [], [f"pip uninstall -y cupy-cuda12x cupy-cuda13x && {INSTALL12}"],
        ),
        (machine(T4, GTX1080TI, cupy=CUPY13), (0, 1), [], [f"pip uninstall -y cupy-cuda13x && {INSTALL12}"]),
        (
            machine(A100, cupy=CUPY13, driver=(535, 183, 1)),
            (0,), [], [f"pip uninstall -y cupy-cuda13x && {INSTALL12}"],
        ),
        # which of them is not driven nobody can say
        (with_driver(machine(A100, replace(T4, bus=None)), on_bus=("0000:01:00.0", "0000:02:00.0")), (0, 1), [], []),
        # torch for the CPU alone: the build that fits card and driver, and CuPy for that build
        (machine(GTX1080TI, torch=("2.13.0+cpu", None, ()), seen=False), (), [TORCH12], []),
        (machine(A100, torch=("2.13.0+cpu", None, ()), seen=False, cupy=NO_CUPY), (), [TORCH13], [INSTALL13]),
        (
            machine(A100, torch=("2.13.0+cpu", None, ()), seen=False, cupy=NO_CUPY, driver=(535, 183, 1)),
            (), [TORCH12], [INSTALL12],
        ),
        # drivers
        (machine(A100, torch=NEW_TORCH, seen=False, driver=(535, 183, 1), trouble="too old"), (), [TORCH12], []),
        (machine(GTX1080TI, torch=NEW_TORCH, seen=False, driver=(535, 183, 1), trouble="x"), (), [TORCH12], []),
        # hidden
        (machine(A100, seen=False, visible="", trouble="No CUDA GPUs are available"), (),
         ["unset CUDA_VISIBLE_DEVICES"], []),
        (machine(A100, seen=False, visible="-1"), (), ["unset CUDA_VISIBLE_DEVICES"], []),
        (with_driver(machine(A100), nvml=False), (0,), [], ["pip install nvidia-ml-py"]),
        (machine(replace(A100, free_bytes=GIB)), (0,), [], ["nvidia-smi"]),
        (machine(A100, transformers="4.57.1"), (0,), [f'pip install "{TRANSFORMERS}"'], []),
        (machine(A100, transformers=None), (0,), [f'pip install "{TRANSFORMERS}"'], []),
        (machine(A100, transformers="6.0"), (0,), [f'pip install "{TRANSFORMERS}"'], []),
    ],
)  # fmt: skip
def test_commands(facts: MachineFacts, usable: tuple[int, ...], problems: list[str], advice: list[str]) -> None:
    verdict = judge(facts)
    assert verdict.usable == usable
    assert (told(verdict, "problem"), told(verdict, "advice")) == (problems, advice)


@pytest.mark.parametrize(
    ("facts", "severity", "text", "instruction"),
    [
        (machine(driver=None), "note", "no NVIDIA card was found", "lspci -d 10de:"),
        (machine(driver=None, container=True), "note", "in this container", "--gpus all"),
        (machine(driver=None, wsl=True), "note", "from WSL", "in Windows"),
        (with_driver(machine(driver=None, wsl=True, torch=("2.13.0+cpu", None, ())), nvml=False), "note",
         "could see an NVIDIA card from WSL", "pip install nvidia-ml-py"),
        (machine(driver=(580, 65, 6), container=True), "problem", "does not see it", "--gpus all"),
        (with_driver(machine(driver=None), on_bus=("0000:65:00.0",)), "problem", "0000:65:00.0), but NVIDIA's driver",
         "nvidia-driver-580"),
        (with_driver(machine(), on_bus=("0000:65:00.0",), open_module=True), "problem", "open kernel module it drives "
         "no Pascal", "not -open"),
        (with_driver(machine(driver=(590, 44, 1)), on_bus=("0000:65:00.0",)), "problem", "drives no Pascal",
         "nvidia-driver-580"),
        (with_driver(machine(), device_nodes=False), "problem", "/dev has no", "sudo nvidia-modprobe"),
        (machine(), "problem", "has no card", "dmesg"),
        (with_driver(machine(), nvml_error="Driver/library version mismatch"), "problem", "was updated", "restart"),
        (with_driver(machine(T4), nvml_error="Driver/library version mismatch"), "problem", "was updated", "restart"),
        (machine(GTX1080TI, driver=(470, 256, 2), seen=False), "problem", "470.256.02 is too old", "nvidia-driver-580"),
        (machine(BLACKWELL, driver=(570, 1), torch=NEW_TORCH), "problem", "need at least 580", "nvidia-driver-580"),
        (machine(MAXWELL), "problem", "compute capability 5.2: Pascal (6.0) is the oldest", "--device cpu"),
        (machine(A100, seen=False, trouble="unknown error"), "problem", "does not start (unknown error)", "nvidia-smi"),
        (with_driver(machine(A100, seen=False, container=True), device_nodes=False), "problem", "does not start",
         "--gpus all"),
        (machine(GTX1080TI, BLACKWELL), "problem", "compute capability 12.0", "virtual environment of its own"),
        (with_driver(machine(A100), on_bus=("0000:01:00.0", "0000:99:00.0")), "advice", "the NVIDIA card at 0000:99",
         "dmesg"),
        (machine(A100, replace(T4, bus="0000:02:00.0")), "note", None, None),
        (machine(replace(GTX1080TI, link=Link(1, 4, 3, 16), copy_rate=3.2e9)), "advice", "by 4 of 16 lanes", "riser"),
        (machine(replace(GTX1080TI, copy_rate=3.2e9)), "advice", "reach 3.2 of 15.8 GB/s", "NUMA"),
        (machine(replace(A100, copy_error="out of memory")), "advice", "out of memory", "try again"),
        (machine(A100, wsl=True), "note", "WSL locks less", "--ram"),
        (with_driver(machine(A100), nvml_error="Not Supported"), "note", "NVML does not answer (Not Supported)", None),
        (machine(GTX1080TI), "note", "driver branch 580 is the last", None),
        (machine(GTX1080TI, cupy=replace(CUPY12, compilers=(12, 13))), "note", "moe-offload takes 12",
         "pip uninstall -y nvidia-cuda-nvrtc"),
    ],
)  # fmt: skip
def test_findings(facts: MachineFacts, severity: str, text: str | None, instruction: str | None) -> None:
    findings = [each for each in judge(facts).findings if each.severity == severity]
    if text is None:
        assert findings == []
        return
    found = [each for each in findings if text in each.text]
    assert len(found) == 1, findings
    mend = found[0].command or found[0].instruction
    assert mend is None if instruction is None else mend is not None and instruction in mend
    if severity == "problem":
        assert findings == found  # one cause, said once


def test_a_card_that_is_hidden_beside_one_that_is_not() -> None:
    facts = machine(A100, visible="0")
    facts = replace(facts, cards=(*facts.cards, replace(T4, index=None, uuid="uuid-1", bus="0000:02:00.0")))
    verdict = judge(facts)
    assert verdict.usable == (0,)
    assert [each.text for each in verdict.findings] == ["Tesla T4 (0000:02:00.0) is hidden by CUDA_VISIBLE_DEVICES='0'"]
    assert told(judge(replace(facts, visible=None)), "advice") == ["nvidia-smi"]


@pytest.mark.parametrize(
    ("visible", "hidden"),
    [("", True), ("-1", True), ("2", True), (" ", True), ("none", True), ("NoDevFiles", True), ("0", False),
     ("1,0", False), ("GPU-uuid-1", False), ("GPU-zzz", True), ("MIG-GPU-x/1/0", False), ("-1,0", True)],
)  # fmt: skip
def test_what_hides_all_cards(visible: str, hidden: bool) -> None:
    two = machine(A100, replace(A100, uuid="uuid-1", bus="0000:02:00.0"), seen=False, visible=visible)
    assert hides_all(two) is hidden


@pytest.mark.parametrize(
    ("facts", "choice", "refused"),
    [
        (machine(A100), DeviceChoice("cuda", 0), None),
        (machine(A100), DeviceChoice("cuda", 1), "there is no cuda:1: cuda:0 is the only card"),
        (machine(driver=None), DeviceChoice("cuda", 0), "no NVIDIA card was found"),
        (machine(driver=None), DeviceChoice("cpu"), None),
        (machine(driver=None), DeviceChoice("auto"), None),
        (machine(GTX1080TI, A100, torch=NEW_TORCH), DeviceChoice("cuda", 1), None),
        (machine(GTX1080TI, A100, torch=NEW_TORCH), DeviceChoice("cuda", 0), "has code for sm_75"),
        (machine(A100, MAXWELL), DeviceChoice("cuda", 1), "5.2"),
        (machine(A100, seen=False, visible="-1"), DeviceChoice("cuda", 0), "hides every card"),
        (machine(A100, torch=("2.13.0+cpu", None, ()), seen=False), DeviceChoice("cuda", 0), "has no CUDA"),
        (machine(T4, driver=(470, 1), seen=False, transformers=None), DeviceChoice("cuda", 0), "470.01 is too old"),
    ],
)
def test_a_device_that_is_demanded(facts: MachineFacts, choice: DeviceChoice, refused: str | None) -> None:
    verdict = judge(facts, choice)
    assert verdict.good is (refused is None)
    assert verdict.refused is None if refused is None else refused in str(verdict.refused)


@pytest.mark.parametrize(
    ("capability", "name", "paths"),
    [
        ((6, 0), "Tesla P100", (False, False, False)),
        ((6, 1), "GeForce GTX 1080 Ti", (True, False, False)),
        ((7, 0), "Tesla V100", (True, True, False)),
        ((7, 5), "Tesla T4", (True, True, False)),
        ((7, 5), "NVIDIA GeForce GTX 1660 Ti", (True, False, False)),
        ((8, 6), "RTX 3090", (True, True, True)),
        ((9, 0), "H200", (True, True, True)),
    ],
)
def test_what_a_card_computes_with(capability: tuple[int, int], name: str, paths: tuple[bool, ...]) -> None:
    found = numeric_paths(capability, name)
    assert (found.byte_dot, found.tensor_f16, found.bf16) == paths
    assert ("as stored" == found.bf16_checkpoints) is found.bf16


def test_the_build_of_torch() -> None:
    for cards, build in [((GTX1080TI,), "cu126"), ((V100, H200), "cu126"), ((T4,), "cu130"), ((MAXWELL, T4), "cu130"),
                         ((BLACKWELL,), "cu130"), ((), "cu126")]:  # fmt: skip
        assert torch_build(machine(*cards)) == build
    assert torch_build(machine(T4, driver=(550, 1))) == "cu126"
    assert torch_build(machine(BLACKWELL, driver=(570, 1))) == "cu130"  # another build would not serve it
    assert torch_build(machine(replace(T4, capability=None))) == "cu126"


def test_a_finding_has_one_way_to_mend_it() -> None:
    Finding("note", "x")
    for arguments in (("problem", "x"), ("advice", "x"), ("note", "x", "y", "z")):
        with pytest.raises(ValueError, match="ways to mend it"):
            Finding(*arguments)


def test_our_own_requirements_are_those_of_the_package() -> None:
    assert TRANSFORMERS in PYPROJECT["project"]["dependencies"]


COMMANDS = (
    "nvidia-smi",
    "sudo nvidia-modprobe -c 0 -u",
    "sudo dmesg | grep -iE 'nvrm|xid'",
    "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
    "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    "ps -eo rss,pid,args --sort=-rss | head",
    "sudo sysctl vm.nr_hugepages=0",
)


def check_command(command: str) -> None:
    """It names what exists: programs, our extras, packages, indexes."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    for part in command.split(" && "):
        program, *words = shlex.split(part.partition(" | ")[0])
        if program != "pip":
            assert part in COMMANDS or re.fullmatch(r"unset( [A-Z_]+)+|export OMP_NUM_THREADS=\d+", part), part
            continue
        for extra in re.findall(r"moe-offload\[(\w+)\]", part):
            assert extra in extras
        if "--index-url" in words:
            assert part in (OLD_CARDS, NEW_CARDS)
        elif words[0] == "uninstall":
            known = {"torch", "nvidia-cuda-nvrtc", "cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x"}
            assert words[1] == "-y" and words[2:] and set(words[2:]) <= known
        else:
            assert words[0] == "install"
            assert set(words[1:]) <= {
                *PACKAGES,
                "nvidia-ml-py",
                TRANSFORMERS,
                "moe-offload[cuda12]",
                "moe-offload[cuda13]",
            }


maybe_rate = st.none() | st.floats(0, 1e11)
versions = st.none() | st.sampled_from([(470, 256, 2), (525, 60, 13), (535, 183, 1), (580, 65, 6), (590, 1)])
links = st.builds(Link, *[st.none() | st.integers(0, 20)] * 4)
buses = st.none() | st.sampled_from(["0000:01:00.0", "0000:02:00.0"])
capability_of_any = st.none() | st.sampled_from(
    [(3, 5), (5, 2), (6, 0), (6, 1), (7, 0), (7, 5), (8, 6), (9, 0), (12, 0)]
)
cards_of_any = st.builds(
    CardFacts, st.sampled_from(["Tesla T4", "GTX 1660", ""]), st.none() | st.integers(0, 3), capability_of_any,
    st.none() | st.integers(0, 1 << 40), st.none() | st.integers(0, 1 << 40), st.none() | st.text(max_size=3), buses,
    links, st.none() | st.integers(0, 3), maybe_rate, st.none() | st.text(max_size=3),
)  # fmt: skip
cudas_of_any = st.builds(
    CudaFacts, st.sampled_from(["2.13.0", "2.13.0+cpu", ""]), st.sampled_from([None, "11.8", "12.6", "13.0", "", "x"]),
    st.sampled_from([(), CU126, CU130]),
    st.lists(st.sampled_from([Card("a", (6, 1), 1), Card("b", (9, 0), 1)]), max_size=2).map(tuple),
    st.none() | st.text(max_size=3),
)  # fmt: skip
cupys_of_any = st.sampled_from(
    [NO_CUPY, CUPY12, CUPY13, replace(CUPY12, compilers=(12, 13)), replace(CUPY12, compiler=(13, 5)),
     replace(CUPY12, import_error="x"), replace(CUPY12, compiler_error="x"), replace(CUPY12, wheels=(("cupy", ""),))]
)  # fmt: skip
drivers_of_any = st.builds(
    DriverFacts, versions, st.none() | st.just((12, 4)), st.booleans(), st.booleans(), st.booleans(),
    st.none() | st.sampled_from(["Driver/library version mismatch", "x"]), st.lists(buses.filter(bool)).map(tuple),
)  # fmt: skip
machines = st.builds(
    MachineFacts, doctor_cases.cpus, cudas_of_any, cupys_of_any, drivers_of_any,
    st.lists(cards_of_any, max_size=3).map(tuple),
    st.none() | st.sampled_from(["5.14", "5.23.0", "6.0", "4", "", "5.x", "٥.14"]),
    st.none() | st.sampled_from(["", "0", "-1", "7", "GPU-", "\0", "٣"]), st.booleans(), st.booleans(),
    memory=doctor_cases.memories, disks=st.lists(doctor_cases.disks, max_size=2).map(tuple),
    software=doctor_cases.softwares,
)  # fmt: skip
choices = st.sampled_from([None, DeviceChoice("cpu"), DeviceChoice("cuda", 0), DeviceChoice("cuda", 2)])


@given(machines, choices)
@settings(deadline=None, max_examples=150)
def test_judgement_never_raises(facts: MachineFacts, choice: DeviceChoice | None) -> None:
    verdict = judge(facts, choice)
    for index in verdict.usable:
        assert cuda_problem(facts.cuda, index) is None
    order = [("problem", "advice", "note").index(each.severity) for each in verdict.findings]
    assert order == sorted(order)
    assert verdict.runs is all("no model runs" not in each.text for each in verdict.findings)
    for each in verdict.findings:
        if each.command is not None:
            check_command(each.command)
        assert "None" not in each.text and "()" not in each.text
    if choice is not None and choice.kind == "cuda":
        assert (verdict.refused is None) is (choice.index in verdict.usable)
        assert verdict.refused != ""
    if not verdict.usable:
        assert verdict.findings  # the reason is said


@given(machines)
@settings(deadline=None, max_examples=100)
def test_an_old_card_is_never_sent_to_cuda_13(facts: MachineFacts) -> None:
    if any(card.capability is not None and (6, 0) <= card.capability < (7, 5) for card in facts.cards):
        for each in judge(facts).findings:
            assert each.command is None or ("cu130" not in each.command and "[cuda13]" not in each.command)


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = detect_machine(environment={"CUDA_VISIBLE_DEVICES": "x"}, measure=False)
    assert facts.visible == "x" and facts.cpu.cores >= 1 and facts.cpu.tier and facts.transformers
    assert judge(facts).runs

    (tmp_path / ".dockerenv").touch()
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    elsewhere = detect_machine(tmp_path, {}, measure=False)
    assert elsewhere.container and elsewhere.wsl and elsewhere.visible is None


def test_a_copy_that_fails_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_offload.transfer import cuda

    opened: list[int] = []

    def refuse(index: int, budget: int) -> None:
        opened.append(index)
        raise RuntimeError("CUDA error: out of memory\nCompile with")

    facts = machine(T4, GTX1080TI, torch=NEW_TORCH)
    monkeypatch.setattr(cuda, "CudaAccelerator", refuse)
    monkeypatch.setattr(doctor_facts, "detect_cuda", lambda: facts.cuda)
    monkeypatch.setattr(
        doctor_facts,
        "detect_cards",
        lambda *_: (facts.driver, tuple(replace(each, copy_rate=None) for each in facts.cards)),
    )
    monkeypatch.setattr(doctor_facts, "detect_cpu", lambda *_: CPU)
    monkeypatch.setattr(doctor_facts, "detect_disks", lambda *_: (DISK,))
    found = detect_machine(environment={})
    assert opened == [0]  # torch has no code for the other
    assert [card.copy_error for card in found.cards] == ["CUDA error: out of memory", None]
    assert found.cupy.capability == (6, 1) and found.cupy.driver == (580, 65, 6)
