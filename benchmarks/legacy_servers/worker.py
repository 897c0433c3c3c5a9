"""What worker processes begin with. Not in `__main__`: a new process does not import that of a package."""

import signal


def end_at_once() -> None:
    """At Ctrl-C, without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
