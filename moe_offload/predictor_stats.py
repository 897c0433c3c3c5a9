"""What a learned predictor came to: part of `model.offload.stats()`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PredictorStats:
    """name: which one. calls: how often it was asked, each time for the next three layers. microseconds: the median
    call's, as measured on this machine. recall: of the experts chosen one, two and three layers later, the share that
    was among the K most probable, on a sample of tokens; None where there was none yet. adaptation: "off", "frozen"
    (what it runs with is as it was trained) or "adapted" (of some layers it is not). memory: its bytes.
    """

    name: str
    calls: int
    microseconds: float | None
    recall: tuple[float | None, ...]
    adaptation: str
    memory: int

    def describe(self) -> str:
        """A line for people."""
        known = [f"{share:.1%}" for share in self.recall if share is not None]
        found = f"; it names {', '.join(known)} of the experts 1, 2, 3 layers ahead" if known else ""
        cost = "" if self.microseconds is None else f" of {self.microseconds:.0f} us each"
        return f"predictor {self.name} ({self.adaptation}): asked {self.calls} times{cost}{found}"
