"""What the cells say together: who is first, and how far ours is from the oracle."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from benchmarks.servers.simulation import NEXT_ONLY, Result

OURS, ORACLE = "ours", "oracle"
_KNOWING = (ORACLE, NEXT_ONLY)
EQUAL = 0.01  # relative: as fast as


@dataclass(frozen=True, slots=True)
class Cell:
    """Every policy on one server with one model and batch; a prompt where `prompt` is set, with its tokens as batch."""

    server: str
    shape: str
    kind: str
    batch: int
    prompt: bool
    results: Mapping[str, Result]

    def speed(self, policy: str) -> float:
        """Tokens per second."""
        return self.results[policy].tokens_per_second

    @property
    def rival(self) -> str:
        """The fastest of the policies that ours is compared with."""
        return max((name for name in self.results if name not in (OURS, *_KNOWING)), key=self.speed)

    @property
    def lead(self) -> float:
        """Ours over the rival."""
        return self.speed(OURS) / self.speed(self.rival)

    def share(self, oracle: str) -> float | None:
        """Ours over one that knows what is to come."""
        return self.speed(OURS) / self.speed(oracle) if oracle in self.results else None

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        found = {
            name: {
                "tokens_per_s": round(result.tokens_per_second, 2), "hits": round(result.hits, 4), "busy": result.busy,
                **({"guard": result.verdict} if result.verdict else {}),
            }
            for name, result in self.results.items()
        }  # fmt: skip
        facts = {key: value for key, value in asdict(self).items() if key != "results"}
        slots = next(iter(self.results.values())).slots
        return {**facts, "slots": slots, "rival": self.rival, "lead": round(self.lead, 4), "simulated": found}


@dataclass(frozen=True, slots=True)
class Summary:
    """cells; first: those where ours is the fastest, or as fast; shares: of an oracle's speed, mean and least."""

    cells: int
    first: int
    least_lead: float
    shares: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        text = (
            f"simulated: ours is first, or within {EQUAL:.0%} of first, in {self.first} of {self.cells} cells"
            f" (least: {self.least_lead:.3f} of the best other)"
        )
        return text + "".join(
            f"; {mean:.1%} of {name} on average, {least:.1%} at least" for name, (mean, least) in self.shares.items()
        )


def summarise(cells: Sequence[Cell]) -> Summary:
    """At least one cell is needed."""
    leads = [cell.lead for cell in cells]
    shares = {}
    for oracle in _KNOWING:
        found = [share for cell in cells if (share := cell.share(oracle)) is not None]
        if found:
            shares[oracle] = fmean(found), min(found)
    return Summary(len(cells), sum(lead >= 1 - EQUAL for lead in leads), min(leads), shares)
