"""The conversation at the terminal: lines in, answers out, the slash commands."""

import sys
from collections.abc import Callable, Iterator

from moe_offload import terminal
from moe_offload.conversation import Conversation
from moe_offload.generation import Generation
from moe_offload.models.errors import MoeOffloadError, OptionError
from moe_offload.terminal import write

HELP = """\
/help          this list
/clear         forget the conversation (also /reset)
/system TEXT   what the model is told first; without TEXT: say what it is
/exit          leave (also Ctrl-D)
Ctrl-C         stops an answer; at the prompt, twice leaves"""


class Leave(Exception):
    """The user wants to go."""


def hold(conversation: Conversation, *, on_answer: Callable[[Generation], None], echo: bool) -> None:
    """Read lines and have them answered until the user leaves.

    on_answer: called after each answer. echo: write the answer's text to stdout as it comes.

    At a terminal a mistake is reported and the conversation goes on; from a pipe it ends it
    (MoeOffloadError).
    """
    if sys.stdin.isatty():
        _at_terminal(conversation, on_answer, echo)
        return
    try:
        for line in _piped_lines():
            _take(line.strip(), conversation, on_answer, echo)
    except Leave:
        pass


def _at_terminal(conversation: Conversation, on_answer: Callable[[Generation], None], echo: bool) -> None:
    terminal.figures("/help for commands, Ctrl-D to leave")
    try:
        import readline  # noqa: F401  input() has history and editing once it is imported
    except ImportError:
        pass
    warned = False
    while True:
        try:
            line = _ask_line()
            warned = False
            _take(line.strip(), conversation, on_answer, echo)
        except MoeOffloadError as error:
            terminal.error(str(error))
        except Leave:
            return
        except EOFError:
            terminal.console().print()
            return
        except KeyboardInterrupt:
            terminal.console().print()
            if warned:
                return
            warned = True
            terminal.figures("press Ctrl-C again to leave, or type /exit")


def _take(line: str, conversation: Conversation, on_answer: Callable[[Generation], None], echo: bool) -> None:
    if line.startswith("/"):
        _command(line, conversation)
    elif line:
        generation = conversation.ask(line, write if echo else _silent)
        if echo and generation.text and not generation.text.endswith("\n"):
            write("\n")
        if conversation.dropped:
            terminal.note(_dropped(conversation.dropped))
        on_answer(generation)


def _command(line: str, conversation: Conversation) -> None:
    name, _, text = line.partition(" ")
    text = text.strip()
    if name in ("/exit", "/quit"):
        raise Leave
    if name in ("/clear", "/reset"):
        conversation.clear()
        terminal.figures("conversation cleared")
    elif name == "/help":
        terminal.figures(HELP)
    elif name == "/system":
        if text:
            conversation.system = text
        terminal.figures(f"system: {conversation.system or '(nothing)'}")
    else:
        raise OptionError(f"there is no command {name}: /help lists them")


def _ask_line() -> str:
    """A line typed at the prompt. Raises EOFError at the end."""
    if sys.stdout.isatty():
        return input("> ")
    terminal.console().print("> ", end="")  # stdout is for the answers
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _piped_lines() -> Iterator[str]:
    """Lines of standard input. Raises OptionError for one that is no text."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise OptionError(f"line {number} of standard input is not UTF-8 text ({error.reason})") from error


def _silent(piece: str) -> None:
    pass


def _dropped(turns: int) -> str:
    what = "the oldest turn was" if turns == 1 else f"the {turns} oldest turns were"
    return f"the context is full: {what} forgotten; /clear starts anew"
