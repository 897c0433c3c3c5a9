"""What the expert cache counted, per layer."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """Totals; the difference of two is what came between.

    hits, coming_hits, misses: wanted experts that were in a slot, on their way into one, or neither. fetches,
    prefetches: slots given on demand, and ahead of it. evictions: experts that had arrived and lost their slot.
    wasted: prefetches that lost it before anybody wanted the expert. nbytes: records that arrived.
    """

    hits: int = 0
    coming_hits: int = 0
    misses: int = 0
    fetches: int = 0
    prefetches: int = 0
    evictions: int = 0
    wasted: int = 0
    nbytes: int = 0

    def __sub__(self, other: "CacheCounters") -> "CacheCounters":
        return CacheCounters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: "CacheCounters") -> "CacheCounters":
        return CacheCounters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float:
        """Share of the wanted experts that had a slot, those on their way among them; 0 where nothing was wanted."""
        held = self.hits + self.coming_hits
        return held / (held + self.misses) if held + self.misses else 0.0


class LayerTally:
    """One layer's counters while they grow: plain attributes, on the path of every token."""

    __slots__ = ("coming_hits", "evictions", "fetches", "hits", "misses", "nbytes", "prefetches", "wasted")

    def __init__(self) -> None:
        self.hits = self.coming_hits = self.misses = self.fetches = 0
        self.prefetches = self.evictions = self.wasted = self.nbytes = 0

    def snapshot(self) -> CacheCounters:
        """The totals so far."""
        return CacheCounters(*(getattr(self, f.name) for f in fields(CacheCounters)))
