"""`moe-offload`: runs a command and turns what went wrong into one line and an exit code.

0, 1 for a bug, 2 for what the user can mend, 130 after Ctrl-C, 141 when nobody reads stdout.
"""

import sys
from collections.abc import Sequence

from moe_offload.models.errors import MoeOffloadError

_INTERRUPTED = 130  # 128 + SIGINT, as a shell counts
_OUTPUT_CLOSED = 141  # 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(given: list[str]) -> int:
    from moe_offload import commands, measuring_commands, terminal
    from moe_offload.app import app

    assert commands and measuring_commands  # importing them has added their commands to app

    verbose = "--verbose" in given
    try:
        with terminal.notes(verbose):
            code = app(args=given or ["--help"], prog_name="moe-offload", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except MoeOffloadError as error:
        terminal.error(str(error))
        return 2
    except terminal.OutputClosedError:
        terminal.discard_output()
        return _OUTPUT_CLOSED
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
            terminal.error(error.format_message())
            return 2
        if type(error).__name__ == "Abort":  # typer's word for Ctrl-C
            return _INTERRUPTED
        if verbose:
            raise
        terminal.error(f"{type(error).__name__}: {error} (this should not happen; --verbose shows where)")
        return 1
