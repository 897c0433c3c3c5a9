"""`moe-offload doctor`: what it prints, its exit codes, and what it says of mistakes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload import doctor_facts
from moe_offload.cli import main
from moe_offload.doctor import judge
from moe_offload.doctor_command import to_dict
from moe_offload.doctor_facts import MachineFacts
from moe_offload.doctor_memory_facts import MemoryFacts
from moe_offload.doctor_modules import MemoryModules
from moe_offload.doctor_table import print_verdict
from moe_offload.transfer.card_facts import CardFacts
from tests.doctor_cases import DISK, GIB, MEMORY, SOFTWARE
from tests.test_cli_process import ENVIRONMENT, Terminal, ended_by_interrupt
from tests.test_doctor import CUPY13, GTX1080TI, NEW_TORCH, T4, TORCH12, machine, machines
from tests.test_doctor_host import DUAL, LAPTOP

BROKEN = machine(replace(GTX1080TI, copy_rate=None), torch=NEW_TORCH, cupy=CUPY13)
SECTIONS = ("CPU", "memory", "disk", "GPU", "software", "verdict")
Show = Callable[[MachineFacts], str]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[MachineFacts], None]:
    """Be on another machine."""
    return lambda facts: monkeypatch.setattr(doctor_facts, "detect_machine", lambda **_: facts)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    def printed(facts: MachineFacts) -> str:
        print_verdict(facts, judge(facts))
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "80")
    return printed


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "Models run here, on" in said.out and "GB/s, measured with" in said.out


def test_a_machine_without_a_card(show: Show) -> None:
    said = show(machine(driver=None))
    assert "Models run here, on the CPU alone." in said
    assert "note: no NVIDIA card was found" in said and "lspci -d 10de:" in said
    assert "problem" not in said and "CuPy not" not in said  # nothing to worry about


def test_commands_are_never_wrapped(show: Show) -> None:
    lines = show(BROKEN).splitlines()
    assert f"    {TORCH12}" in lines and len(TORCH12) > 80
    for line in lines:
        assert len(line.rstrip()) <= 80 or line.startswith("    pip ")


def test_a_card_in_full(show: Show) -> None:
    text = " ".join(show(machine(GTX1080TI, T4)).split())
    for words in (
        "cuda:0 GeForce GTX 1080 Ti, compute capability 6.1", "PCIe 3.0 x16, 15.8 GB/s at most (at 1.0 now, as idle",
        "12.0 GB/s from page-locked memory, measured", "byte dot products (dp4a)", "f32 arithmetic",
        "cuda:1 Tesla T4, compute capability 7.5", "tensor cores, f16", "580.65.06, for CUDA up to 13.0",
        "cupy-cuda12x 14.2.0, compiling with NVRTC 12.6",
        "Models run here, on GeForce GTX 1080 Ti (cuda:0) and the CPU together (also usable: cuda:1).",
    ):  # fmt: skip
        assert words in text
    assert "usable no" not in text and "Then run" not in text
    text = " ".join(show(BROKEN).split())
    assert "usable no, see below" in text and text.endswith("Then run moe-offload doctor again.")


def test_sections_in_order_each_with_its_worst_finding(show: Show) -> None:
    software = replace(SOFTWARE, torch_threads=1, environment=(("OMP_NUM_THREADS", "1"),))
    said = show(machine(T4, cpu=DUAL, software=software, memory=replace(MEMORY, huge_pages="never", lock_limit=65536)))
    heads = [line for line in said.splitlines() if line.partition(":")[0] in SECTIONS]
    assert heads == [
        "CPU: advice below", "memory: advice below", "disk: good", "GPU: good", "software: advice below",
        "verdict: Models run here, on Tesla T4 (cuda:0) and the CPU together.",
    ]  # fmt: skip
    assert [line[:7] for line in said.splitlines() if line.startswith(("advice: ", "note: "))] == ["advice:"] * 3 + [
        "note: a"
    ]


def test_the_host_in_full(show: Show) -> None:
    facts = machine(
        driver=None,
        cpu=replace(DUAL, quota=8.5, cores=8, governor="performance", clock_driver="acpi-cpufreq"),
        memory=MemoryFacts(
            4 * GIB,
            3 * GIB,
            128 * GIB,
            "/sys/fs/cgroup/memory.max",
            2 * GIB,
            GIB,
            65536,
            "always",
            GIB,
            MemoryModules("DDR4", 4, 16, 2400, 4),
        ),
        disks=(replace(DISK, filesystem="nfs4", source="nas:/[x]"),),
        software=replace(SOFTWARE, environment=(("OMP_NUM_THREADS", "[8]"),)),
    )
    text = " ".join(show(facts).split())
    for words in (
        "8 used of 28 (quota of 8.5 CPUs), one of 2 hardware threads each",
        "instructions AVX2 newer ones AVX-512 with VNNI",
        "governor performance (acpi-cpufreq)", "NUMA node 1 68.7 GB, 28 of the usable hardware threads",
        "60.0 GB/s, measured with 8 threads: at most 60 tokens/s on the CPU where a token needs 1 GB",
        "its modules give 76.8 GB/s (4 channels of DDR4-2400)", "modules DDR4-2400 in 4 of 16 slots",
        "4.3 GB, 3.2 GB free", "/sys/fs/cgroup/memory.max; the machine has 137 GB", "2.1 GB, 1.1 GB in use",
        "huge pages always 1.1 GB set aside and unused", "lockable 65.5 KB", "models /home/u/.cache/huggingface/hub",
        "nfs4 on nas:/[x], over the network, 1.0 TB, 500 GB free", "disk reads 2.5 GB/s, measured",
        "numba 0.68.1, numpy 2.4.6", "environment OMP_NUM_THREADS=[8]", "14 threads",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("facts", [machine(cpu=DUAL), machine(T4, cpu=LAPTOP), machine(cpu=replace(DUAL, quota=1.0))])
def test_nothing_but_commands_and_paths_is_wider_than_a_terminal(facts: MachineFacts, show: Show) -> None:
    for line in show(facts).splitlines():
        assert len(line.rstrip()) <= 80 or line.startswith("    "), line


def test_names_are_no_markup(show: Show) -> None:
    assert "[bold]x[/nope]" in show(machine(replace(T4, name="[bold]x[/nope]")))


@pytest.mark.parametrize(
    ("facts", "arguments", "code", "words"),
    [
        (machine(T4), ("--device", "cuda"), 0, ""),
        (BROKEN, (), 0, ""),  # the CPU is there
        (BROKEN, ("--device", "cpu"), 0, ""),
        (BROKEN, ("--device", "cuda:0"), 1, "error: cuda:0 cannot be used: GeForce GTX 1080 Ti (cuda:0) has compute"),
        (machine(T4), ("--device", "cuda:3"), 1, "error: cuda:3 cannot be used: there is no cuda:3"),
        (machine(driver=None), ("--device", "cuda"), 1, "error: cuda:0 cannot be used: no NVIDIA card was found"),
        (machine(T4, transformers=None), (), 1, ""),
    ],
)
def test_exit_codes(
    facts: MachineFacts,
    arguments: Sequence[str],
    code: int,
    words: str,
    pretend: Callable[[MachineFacts], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(facts)
    assert main(["doctor", *arguments]) == code
    said = capsys.readouterr()
    assert said.err.count("\n") == (1 if words else 0) and words in said.err
    assert main(["doctor", "--json", *arguments]) == code
    assert json.loads(capsys.readouterr().out)["runs"] is (facts.transformers is not None)


def test_json(pretend: Callable[[MachineFacts], None], capsys: pytest.CaptureFixture[str]) -> None:
    pretend(BROKEN)
    main(["doctor", "--json", "--device", "cuda:0"])
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == "cpu" and said["usable_cards"] == [] and "sm_75" in said["refused"]
    assert said["findings"][0]["command"] == TORCH12 and said["findings"][0]["severity"] == "problem"
    card = said["machine"]["cards"][0]
    assert card["capability"] == [6, 1] and card["link"]["most_generation"] == 3
    assert said["machine"]["driver"]["version"] == [580, 65, 6]
    assert said["machine"]["cuda"]["architectures"] == list(NEW_TORCH[2])
    assert said["machine"]["cupy"]["wheels"] == [["cupy-cuda13x", "14.2.0"]]


@pytest.mark.parametrize(
    "arguments",
    [("--device", "gpu"), ("--device", "virtual:p40"), ("--device", "cuda:-1"), ("--devise", "cpu"), ("x",)],
)
def test_mistakes(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and arguments[0] in said.err


def test_a_torch_that_is_broken(tmp_path: Path) -> None:
    """Whoever asks the doctor may have just that."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudnn.so.9: cannot open shared object file')\n")
    root = Path(__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; from moe_offload.cli import main; "
    ran = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['doctor']))"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=root,
    )
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert "libcudnn.so.9" in ran.stderr and "pip uninstall -y torch && pip install torch" in ran.stderr


def test_quick_measures_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("moe_offload.doctor_cpu_facts.measure_memory", refuse)
    monkeypatch.setattr("moe_offload.doctor_disk_facts.measure_read", refuse)
    monkeypatch.setattr("moe_offload.doctor_facts._measured", refuse)
    assert main(["doctor", "--quick", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["machine"]
    assert said["cpu"]["read_rate"] is None and said["disks"][0]["read_rate"] is None
    assert said["cpu"]["read_error"] is None and said["disks"][0]["read_error"] is None
    assert said["memory"]["total"] > 0 and said["software"]["torch_threads"] >= 1


def test_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(**_: object) -> MachineFacts:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_facts, "detect_machine", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "")


def test_it_says_what_it_does_before_libraries_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that takes for ever: the line is there, and Ctrl-C ends it."""
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    terminal = Terminal("doctor")
    terminal.wait_for("looking at this machine")
    time.sleep(0.5)  # until it sleeps in torch: an import that is interrupted elsewhere ends as well
    terminal.type("\x03")
    assert ended_by_interrupt(terminal.exit_code())


@given(machines, st.booleans())
@settings(deadline=None, max_examples=60)
def test_whatever_there_is_can_be_printed(facts: MachineFacts, copied: bool) -> None:
    cards: tuple[CardFacts, ...] = facts.cards if copied else ()
    facts = replace(facts, cards=cards)
    verdict = judge(facts)
    json.dumps(to_dict(facts, verdict))
    print_verdict(facts, verdict)
