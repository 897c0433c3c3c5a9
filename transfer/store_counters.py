"""What the expert store counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class StoreCounters:
    """What happened so far.

    hits: records that were here when asked for. loads: reads that were completed, on demand or ahead; `loaded_bytes`
    and `load_seconds` are theirs, the seconds summed over threads. waited_seconds: of calls that asked for a record
    that was not here. ahead_loads: loads on a prediction; `ahead_used` were asked for, `ahead_wasted` evicted before.
    evictions: records that made room for others. failed: reads that ended in an error.
    """

    hits: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    waited_seconds: float = 0.0
    ahead_loads: int = 0
    ahead_used: int = 0
    ahead_wasted: int = 0
    evictions: int = 0
    failed: int = 0
