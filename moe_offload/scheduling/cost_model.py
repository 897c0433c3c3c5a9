"""What experts and copies cost on this machine: calibrated once, corrected by every measurement since.

A `kind` names an expert's shape and format, such as "int4 2048x768". For every kind there is a curve of seconds by
rows for the CPU and one for the device; the link is a latency and a rate. Measurements may come from several threads.
Tables are made anew only when something moved by more than a percent, so asking for them is free on the path of every
layer.
"""

import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.scheduling.correction import Correction
from moe_offload.scheduling.cost_curve import BANDS, ROWS, SHORTEST, CostCurve
from moe_offload.scheduling.layer_plan import LayerCosts

_TOLERANCE = 0.01


class _Kind:
    __slots__ = ("nbytes", "cpu", "gpu", "costs", "made_from")

    def __init__(self, nbytes: int, cpu: CostCurve, gpu: CostCurve) -> None:
        self.nbytes = nbytes
        self.cpu = cpu
        self.gpu = gpu
        self.costs: LayerCosts | None = None
        self.made_from = (0, 0, 0)


class CostModel:
    """Seconds of experts by rows on either device, and of copies between them.

    latency, bytes_per_second: the link. cpu_start, gpu_start: a job of any size on either, beyond its experts; waiting
    for the device is not in it. join: bringing the CPU's share of an output to the device.
    """

    def __init__(
        self,
        latency: float,
        bytes_per_second: float,
        *,
        cpu_start: float = 0.0,
        gpu_start: float = 0.0,
        join: float = 0.0,
    ) -> None:
        for name, seconds in (
            ("latency", latency), ("cpu_start", cpu_start), ("gpu_start", gpu_start), ("join", join),
        ):  # fmt: skip
            if not 0 <= seconds < 1e3:
                raise ValueError(f"{name} of {seconds} s: it has to be at least 0 and below 1000")
        if not 1 <= bytes_per_second < 1e15:
            raise ValueError(f"a link of {bytes_per_second} bytes/s: it has to be at least 1 and below 1e15")
        self.latency, self.bytes_per_second = latency, bytes_per_second
        self.cpu_start, self.gpu_start, self.join = cpu_start, gpu_start, join
        self._kinds: dict[str, _Kind] = {}
        self._link = Correction(1)
        self._link_applied = 0.0
        self._link_version = 0
        self._lock = threading.Lock()

    def add(self, kind: str, nbytes: int, cpu: Mapping[int, float], gpu: Mapping[int, float]) -> None:
        """A kind of expert of `nbytes`, with {rows: seconds} measured on either device, starts not included."""
        if not 0 < nbytes < 1 << 50:
            raise ValueError(f"{kind}: an expert of {nbytes} bytes; it has to be positive and below {1 << 50}")
        try:
            made = _Kind(nbytes, CostCurve(cpu, self.cpu_start), CostCurve(gpu, self.gpu_start))
        except ValueError as error:
            raise ValueError(f"{kind}: {error}") from None
        with self._lock:
            self._kinds[kind] = made

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of experts it knows."""
        return tuple(self._kinds)

    def layer_costs(self, kind: str) -> LayerCosts:
        """Tables for a planner: the same object until something changed."""
        entry = self._find(kind)
        with self._lock:
            made_from = (entry.cpu.version, entry.gpu.version, self._link_version)
            costs = entry.costs
            if costs is None or entry.made_from != made_from:
                costs = LayerCosts(
                    entry.cpu.table,
                    entry.gpu.table,
                    self._copy(entry.nbytes),
                    self.cpu_start,
                    self.gpu_start,
                    self.join,
                )
                entry.costs, entry.made_from = costs, made_from
            return costs

    def copy_seconds(self, nbytes: int) -> float:
        """Seconds of one copy of `nbytes` over the link."""
        with self._lock:
            return self._copy(nbytes)

    def observe_cpu(self, kind: str, rows: NDArray[np.int64], seconds: float) -> None:
        """A CPU job over experts with `rows` each took `seconds`, its start included."""
        entry = self._find(kind)
        with self._lock:
            entry.cpu.observe(rows, seconds)
            entry.gpu.tick()

    def observe_gpu(self, kind: str, rows: NDArray[np.int64], seconds: float) -> None:
        """A job of the device, likewise."""
        entry = self._find(kind)
        with self._lock:
            entry.gpu.observe(rows, seconds)
            entry.cpu.tick()

    def observe_copy(self, nbytes: int, seconds: float) -> None:
        """A copy that had the link for itself took `seconds`."""
        if nbytes <= 0 or not SHORTEST <= seconds < math.inf:
            return
        with self._lock:
            self._link.observe(0, math.log(seconds / (self.latency + nbytes / self.bytes_per_second)))
            if abs(self._link.logs[0] - self._link_applied) > _TOLERANCE:
                self._link_applied = self._link.logs[0]
                self._link_version += 1

    def crossover(self, kind: str) -> int | None:
        """Rows from which on a fetch and the device are sooner done than the CPU; None: not up to 1024."""
        costs = self.layer_costs(kind)
        on_cpu = costs.cpu_start + costs.cpu[1:] + costs.join
        loses = on_cpu <= costs.copy + costs.gpu_start + costs.gpu[1:]
        last = int(np.flatnonzero(loses)[-1]) + 1 if loses.any() else 0
        return last + 1 if last < ROWS else None

    def describe(self) -> str:
        """For people, one line per kind: from how many tokens on a fetch pays."""
        lines = []
        for kind in self.kinds:
            costs, rows = self.layer_costs(kind), self.crossover(kind)
            if rows is None:
                pays = "a fetch never pays"
            elif rows == 1:
                pays = "a fetch always pays"
            else:
                pays = f"a fetch pays from {rows} tokens per expert on"
            one = (costs.cpu_start + costs.cpu[1]) * 1e3
            on_gpu = (costs.gpu_start + costs.gpu[1]) * 1e3
            lines.append(
                f"{kind}: {pays} (one token: CPU {one:.3g} ms, GPU {on_gpu:.3g} ms; copy {costs.copy * 1e3:.3g} ms)"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        with self._lock:
            return {
                "latency": self.latency,
                "bytes_per_second": self.bytes_per_second,
                "cpu_start": self.cpu_start,
                "gpu_start": self.gpu_start,
                "join": self.join,
                "link_log": self._link.logs[0],
                "kinds": {
                    kind: {"nbytes": e.nbytes, "cpu": _curve_to_dict(e.cpu), "gpu": _curve_to_dict(e.gpu)}
                    for kind, e in self._kinds.items()
                },
            }

    @classmethod
    def from_dict(cls, data: object) -> "CostModel":
        """The inverse of `to_dict`. Raises ValueError for anything else."""
        top = _mapping(data, "cost model")
        model = cls(
            _number(top, "latency"),
            _number(top, "bytes_per_second"),
            cpu_start=_number(top, "cpu_start"),
            gpu_start=_number(top, "gpu_start"),
            join=_number(top, "join"),
        )
        for kind, entry in _mapping(top.get("kinds"), "kinds").items():
            entry = _mapping(entry, kind)
            nbytes = entry.get("nbytes")
            if type(nbytes) is not int:
                raise ValueError(f"{kind}: nbytes is {nbytes!r:.40}, not a whole number")
            cpu, cpu_logs = _curve_from_dict(entry.get("cpu"), f"{kind}, cpu")
            gpu, gpu_logs = _curve_from_dict(entry.get("gpu"), f"{kind}, gpu")
            model.add(kind, nbytes, cpu, gpu)
            model._kinds[kind].cpu.restore(cpu_logs)
            model._kinds[kind].gpu.restore(gpu_logs)
        model._link.restore([_number(top, "link_log")])
        model._link_applied = model._link.logs[0]
        return model

    def _copy(self, nbytes: int) -> float:
        return math.exp(self._link_applied) * (self.latency + nbytes / self.bytes_per_second)

    def _find(self, kind: str) -> _Kind:
        entry = self._kinds.get(kind)
        if entry is None:
            raise ValueError(
                f"no costs of experts of kind {kind!r}: there are {', '.join(map(repr, self._kinds)) or 'none'}"
            )
        return entry


def _curve_to_dict(curve: CostCurve) -> dict[str, Any]:
    return {
        "rows": list(curve.points),
        "seconds": list(curve.points.values()),
        "logs": list(curve.correction.logs),
    }


def _curve_from_dict(data: object, where: str) -> tuple[dict[int, float], list[float]]:
    entry = _mapping(data, where)
    rows, seconds, logs = (_list(entry, name, where) for name in ("rows", "seconds", "logs"))
    if not all(type(n) is int for n in rows) or len(set(rows)) != len(rows) or len(rows) != len(seconds):
        raise ValueError(f"{where}: {len(rows)} rows and {len(seconds)} seconds are no list of points")
    if len(logs) != len(BANDS):
        raise ValueError(f"{where}: {len(logs)} corrections where there are {len(BANDS)} bands")
    return dict(zip(rows, (_finite(s, where) for s in seconds), strict=True)), [_finite(log, where) for log in logs]


def _mapping(data: object, what: str) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{what}: not an object but {type(data).__name__}")
    return data


def _list(entry: dict[str, Any], name: str, where: str) -> list[Any]:
    value = entry.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} is {value!r:.40}, not a list")
    return value


def _number(entry: dict[str, Any], name: str) -> float:
    return _finite(entry.get(name), name)


def _finite(value: object, where: str) -> float:
    # compared before it is converted: JSON's whole numbers may be too large for a float
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise ValueError(f"{where}: {value!r:.40} is not a finite number")
    return float(value)
