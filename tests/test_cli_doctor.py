"""`moe-offload doctor`: what it prints, its exit codes, and what it says of mistakes."""

import json
import subprocess
import sys
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
from moe_offload.doctor_table import print_verdict
from moe_offload.transfer.card_facts import CardFacts
from tests.test_doctor import CUPY13, GTX1080TI, NEW_TORCH, T4, TORCH12, machine, machines

BROKEN = machine(replace(GTX1080TI, copy_rate=None), torch=NEW_TORCH, cupy=CUPY13)
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


@given(machines, st.booleans())
@settings(deadline=None, max_examples=60)
def test_whatever_there_is_can_be_printed(facts: MachineFacts, copied: bool) -> None:
    cards: tuple[CardFacts, ...] = facts.cards if copied else ()
    facts = replace(facts, cards=cards)
    verdict = judge(facts)
    json.dumps(to_dict(facts, verdict))
    print_verdict(facts, verdict)
