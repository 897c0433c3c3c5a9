"""A timeline as a file for Chrome's about:tracing and Perfetto: the trace event format, "complete" events.

One row for each stream and one for the host. Times are microseconds.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from moe_offload.transfer.accelerator import Span


def write_trace(path: Path, spans: Iterable[Span], device: str) -> int:
    """Write the spans beside `path` and rename; returns how many there were. Raises OSError."""
    spans = sorted(spans, key=lambda span: span.start)
    tracks = sorted({span.track for span in spans})
    begin = spans[0].start if spans else 0.0
    events: list[dict[str, object]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": device}}]
    for number, track in enumerate(tracks):
        events.append({"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": track}})
    numbers = {track: number for number, track in enumerate(tracks)}
    for span in spans:
        events.append({
            "ph": "X", "pid": 0, "tid": numbers[span.track], "name": span.name, "ts": (span.start - begin) * 1e6,
            "dur": (span.end - span.start) * 1e6,
        })  # fmt: skip
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return len(spans)
