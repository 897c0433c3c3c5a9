"""Does copying ahead pay? Steps that do it are measured against steps that only keep what is worth most.

Copies ahead take the link from fetches, host memory from the CPU's experts, slots from what was kept, and predictions
take the host. Whether they bring more than that depends on the server, the cache and the number of tokens, so each
bucket of tokens has an answer of its own, found and kept up to date by short trials (`scheduling/guard.py`). Until one
has shown a gain nothing is copied ahead.
"""

from moe_offload.scheduling.guard import Guard, Verdict


class PrefetchGate:
    """Open or shut for a whole step."""

    def __init__(self) -> None:
        self._guard = Guard()  # its "dynamic" is what is usual here: shut; "static" is what has to show a gain: open
        self.open = False

    def begin_step(self, tokens: int) -> None:
        """A step of so many tokens begins: `open` says how."""
        self.open = self._guard.mode(tokens) == "static"

    def end_step(self, tokens: int, seconds: float) -> None:
        """It took so long, as `open` has said."""
        self._guard.record(tokens, "static" if self.open else "dynamic", seconds)

    def verdicts(self) -> tuple[Verdict, ...]:
        """What was found, by tokens: "static" stands for open, "dynamic" for shut."""
        return self._guard.verdicts()
