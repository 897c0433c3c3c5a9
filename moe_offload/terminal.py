"""What the command line says beside its results: on stderr, while results go to stdout.

One line each: `error: ...`, `note: ...`, and dim figures after a generation.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

# Control characters that a model may write but a terminal should not obey.
_HARMLESS = {code: "\ufffd" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\t\n"}


class OutputClosedError(Exception):
    """Nobody reads stdout any more (`| head -1`): there is nothing left to do."""


def console() -> Console:
    """stderr as a rich console. Made anew, since sys.stderr may have been replaced."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def error(message: str) -> None:
    """The one line that says why the command ends."""
    _line(("error:", "bold red"), message)


def note(message: str) -> None:
    """Something worth knowing that stops nothing."""
    _line(("note:", "bold yellow"), message)


def figures(message: str) -> None:
    """Measurements, below what they belong to."""
    console().print(Text(message, style="dim"))


def write(text: str) -> None:
    """A piece of the result, at once. Raises OutputClosedError when nobody reads."""
    if sys.stdout.isatty():
        text = text.translate(_HARMLESS)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except UnicodeEncodeError:  # a terminal of an old locale
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError as problem:
        raise OutputClosedError from problem


def discard_output() -> None:
    """Point stdout to nowhere, lest the interpreter complain of the closed pipe at its exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # stdout is no file: nothing to discard
        pass


def _line(label: tuple[str, str], message: str) -> None:
    console().print(Text.assemble(label, " ", " ".join(message.split())))


class _Notes(logging.Handler):
    """Our own warnings as notes, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._seen:
            self._seen.add(message)
            note(message)


@contextmanager
def notes(verbose: bool) -> Iterator[None]:
    """Our log as notes for the time of a command; Python's warnings are shown only if `verbose`."""
    logger, handler = logging.getLogger("moe_offload"), _Notes()
    propagate, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    if verbose:
        logger.setLevel(logging.DEBUG)
        handler.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate, logger.level = propagate, level
