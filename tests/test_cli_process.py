"""The command as a process: start-up time, pipes, terminals, Ctrl-C."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import cli_model

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "moe_offload"]
# One thread each: on a busy machine OpenMP's wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("process") / "model", max_position_embeddings=8192)


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


_COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=ROOT, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """The text up to `pattern`, which is then gone from `self.text`."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    self.text += _COLOURS.sub("", os.read(self.ours, 65536).decode(errors="replace"))
                except OSError:  # the process has gone
                    assert re.search(pattern, self.text), self.text
        before, self.text = self.text[: match.end()], self.text[match.end() :]
        return before

    def exit_code(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            os.close(self.ours)


def _take_terminal() -> None:
    """Make the pseudo-terminal the controlling one, so that Ctrl-C typed into it becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def ended_by_interrupt(code: int) -> bool:
    """130, or killed by the signal itself, which a shell shows as 130 too."""
    return code in (130, -signal.SIGINT)


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, time; from moe_offload.cli import main; main(['generate', '--help']);"
        "print('torch' in sys.modules, 'transformers' in sys.modules, time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    torch, transformers, seconds = done.stdout.splitlines()[-1].split()
    assert (torch, transformers) == ("False", "False")
    assert float(seconds) < 1


def test_error_is_one_line_and_code_2(tmp_path: Path) -> None:
    done = run("generate", tmp_path / "nothing", "-p", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)


def test_binary_garbage_on_stdin(folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "generate", str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT,
        input=os.urandom(4096) + b"\xff",
        capture_output=True,
    )
    assert done.returncode == 2 and b"UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_reader_of_stdout_goes_away(folder: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", str(folder), "-p", "hello", "--max-new-tokens", "4000", "--threads", "1"],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""


def test_piped_conversation() -> None:
    done = run(
        "chat", "demo", "--greedy", "--max-new-tokens", "8", "--json",
        input="/system be brief\nhello\n\nand?\n/exit\nnever\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]


@pytest.mark.parametrize("delay", [0.05, 1.0, 2.5])
def test_interrupt_while_starting(folder: Path, delay: float) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", str(folder), "-p", "hello", "--max-new-tokens", "8000", "--threads", "2"],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if delay < 1:  # as soon as Python runs our code at all
        time.sleep(0.3)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert ended_by_interrupt(process.returncode)
    assert "Traceback" not in errors


def test_interrupt_of_a_generation() -> None:
    terminal = Terminal("generate", "demo", "-p", "def f", "--max-new-tokens", "1000", "--seed", "1", "--raw")
    terminal.wait_for(r"\w")
    time.sleep(3)  # wherever it is by then
    terminal.type("\x03")
    assert ended_by_interrupt(terminal.exit_code())
    assert "Traceback" not in terminal.text


def test_conversation_at_a_terminal(folder: Path) -> None:
    terminal = Terminal("chat", folder, "--max-new-tokens", "4000", "--seed", "1", "--threads", "1")
    terminal.wait_for("> ")
    terminal.type("/nothing\n")
    terminal.wait_for("error: there is no command /nothing")
    terminal.wait_for("> ")
    terminal.type("hello\n")
    time.sleep(2)
    terminal.type("\x03")
    terminal.wait_for("interrupted (after|before)")
    terminal.wait_for("> ")
    terminal.type("/clear\n")
    terminal.wait_for("conversation cleared")
    for expected in ("Ctrl-C again", "\n"):
        terminal.wait_for("> ")
        time.sleep(0.5)  # a signal between readline's prompt and its select() waits for a key
        terminal.type("\x03")
        terminal.wait_for(expected)
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.text


def test_end_of_input_leaves(folder: Path) -> None:
    terminal = Terminal("chat", folder, "--threads", "1")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
