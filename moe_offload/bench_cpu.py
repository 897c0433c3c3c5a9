"""What this CPU's kernels reach of what its memory and its cores give: `moe-offload bench-cpu`, and benchmarks.

One MoE layer, its experts in memory that no cache holds. The read limit is sampled in the same rounds, because
neighbours on the machine move it; only ratios within a run mean anything.
"""

import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from moe_offload.cpu_kernels.bandwidth import ReadLimit
from moe_offload.cpu_kernels.experts import ExpertKernel, warm_up
from moe_offload.cpu_kernels.grouping import Groups, group_tokens
from moe_offload.cpu_kernels.layout import Activation, ExpertLayout, WeightType
from moe_offload.cpu_kernels.packed_experts import Activations, PackedExpertKernel
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix, PackedType, StoredType
from moe_offload.cpu_kernels.target import Target
from moe_offload.cpu_kernels.team import Team

ACTIVE = 8  # experts of one call
CALLS = 4  # back to back, as in decoding: a lone call pays for waking the threads
_SILU = Activation("silu")
# progress(what, share done)
Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """How experts are stored: "int4", "int8:128" (groups of 128), "bf16", "bf16-transposed"."""

    dtype: StoredType
    group: int = 32
    transposed: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for what is no format."""
        name, _, group = text.partition(":")
        dtype = name.removesuffix("-transposed")
        for known in get_args(StoredType):
            if known == dtype and (group == "" or group.isdecimal()):
                return cls(known, int(group or 32), name != dtype)
        raise ValueError(f"{text!r} is no format of experts: {', '.join(get_args(StoredType))}, with :GROUP behind")

    def __str__(self) -> str:
        group = f":{self.group}" if self.group != 32 else ""
        return f"{self.dtype}{'-transposed' if self.transposed else ''}{group}"

    def record(self, hidden: int, inner: int) -> ExpertRecord:
        return ExpertRecord(hidden, inner, self.dtype, group=self.group)

    def kernel(self, hidden: int, inner: int, activations: Activations = "auto") -> ExpertKernel | PackedExpertKernel:
        if self.dtype in get_args(PackedType):
            if self.transposed:
                raise ValueError(f"{self.dtype} experts have one layout: there is no {self}")
            return PackedExpertKernel(self.record(hidden, inner), _SILU, activations)
        for dtype in get_args(WeightType):
            if dtype == self.dtype:
                return ExpertKernel(ExpertLayout(hidden, inner, dtype, transposed=self.transposed), _SILU)
        raise ValueError(f"no kernel for {self}")


class ColdExperts:
    """Copies of one random expert: `mib` of memory, from which every call takes others.

    huge_pages: to show the kernels' best. False: pages as those of a mapped file, where a model's experts lie.
    """

    def __init__(
        self, stored: ExpertFormat, hidden: int, inner: int, mib: int, seed: int = 0, *, huge_pages: bool = True
    ) -> None:
        self.format, self.hidden, self.inner = stored, hidden, inner
        self.record = stored.record(hidden, inner)
        self.count = max(2 * ACTIVE, mib * 2**20 // self.record.nbytes)
        self._rng = np.random.default_rng(seed)
        memory = mmap.mmap(-1, self.count * self.record.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        self.memory: NDArray[np.uint8] = np.frombuffer(memory, np.uint8).reshape(self.count, self.record.nbytes)
        self.memory[:] = random_expert(self.record, self._rng)
        starts = self.memory.ctypes.data + np.arange(self.count) * self.record.nbytes
        self.table = np.zeros((self.count, 6), np.int64)
        self.table[:, :3] = starts[:, None] + np.array(self.record.offsets[:3])
        self._order = self._rng.permutation(self.count)
        self._next = 0

    @property
    def bytes_per_call(self) -> int:
        """Bytes of weights that one call reads."""
        return ACTIVE * self.record.weight_bytes

    def operations(self, tokens: int) -> int:
        """Multiplications and additions of one call with so many tokens for each of its experts."""
        return ACTIVE * tokens * 6 * self.hidden * self.inner

    def draw(self, tokens: int) -> NDArray[np.float32]:
        return self._rng.standard_normal((tokens, self.hidden), np.float32)

    def next_groups(self, tokens: int) -> Groups:
        """The next experts, each with all of the tokens."""
        if self._next + ACTIVE > self.count:
            self._next = 0
        chosen = np.sort(self._order[self._next : self._next + ACTIVE])
        self._next += ACTIVE
        index = np.tile(chosen, (tokens, 1)).astype(np.int64)
        return group_tokens(index, np.full(index.shape, 1 / ACTIVE, np.float32), self.count)

    def seconds(self, kernel: ExpertKernel | PackedExpertKernel, tokens: int, team: Team, calls: int = CALLS) -> float:
        """Mean duration of `calls` calls, one right after the other."""
        hidden = self.draw(tokens)
        out = np.zeros_like(hidden)
        groups = [self.next_groups(tokens) for _ in range(calls)]
        started = time.perf_counter()
        for each in groups:
            kernel(self.table, each, hidden, out, team)
        return (time.perf_counter() - started) / calls


def random_expert(record: ExpertRecord, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes of one expert with weights of deviation 0.02 or so."""
    expert = np.zeros(record.nbytes, np.uint8)
    for n, layout in enumerate(_matrices(record)):
        place = expert[record.offsets[n] :]
        if layout is None:
            count = record.hidden_size * record.intermediate_size
            weights = rng.standard_normal(count, np.float32) * np.float32(0.02)
            place[: record.matrix_bytes[n]].view(_ELEMENTS[record.dtype])[:count] = _encoded(weights, record.dtype)
            continue
        records = place[: layout.nbytes].reshape(-1, layout.record_bytes)
        records[:, : layout.scales_at] = rng.integers(0, 256, (len(records), layout.scales_at), np.uint8)
        if record.dtype == "mxfp4":
            records[:, layout.scales_at :] = 127 - 7
        else:
            scale = np.float16(0.02 / 4 if record.dtype == "int4" else 0.02 / 64)
            records[:, layout.scales_at :] = np.frombuffer(scale.tobytes() * layout.groups_per_record * 32, np.uint8)
    return expert


def _matrices(record: ExpertRecord) -> Sequence[PackedMatrix | None]:
    return (record.up_matrix, record.up_matrix, record.down_matrix) if record.packed else (None, None, None)


_ELEMENTS: dict[str, Any] = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}


def _encoded(weights: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """bf16 cut off rather than rounded: for a benchmark that is as good."""
    return (weights.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else weights.astype(_ELEMENTS[dtype])


def tier_name(target: Target) -> str:
    """The instruction set that the kernels use."""
    if not target.is_x86:
        return "NEON" if target.is_arm64 else f"{32 * target.lanes}-bit vectors"
    if target.int_lanes == 16:
        return "AVX-512 with VNNI" if target.byte_dot else "AVX-512"
    if target.int_lanes == 8:
        return "AVX2" if target.fma else "AVX2 without FMA"
    return "AVX" if target.lanes == 8 else "SSE2"


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians of one format. Rates in 1e9 bytes or operations per second; None: not measured."""

    format: str
    read_gb_per_s: float | None  # of weights, with one token
    share: float | None  # of the read limit
    gop_per_s: float | None  # with MANY tokens for each expert


MANY = 64


class CpuBench:
    """Rounds of samples: the read limit, and a layer of each format with 1 and with MANY tokens for each expert."""

    def __init__(
        self, formats: Sequence[ExpertFormat], shape: tuple[int, int], team: Team, mib: int, report: Report
    ) -> None:
        """shape: hidden and intermediate size. mib: memory of each format, and of the limit."""
        self._team, self._shape, self._mib, self._report = team, shape, mib, report
        self._formats = formats
        self._limit: ReadLimit | None = None
        self._times: dict[tuple[str, int], list[float]] = {}

    def run(self, seconds: float) -> None:
        """Compile, fill memory, and measure for `seconds`, two rounds at least. May be interrupted."""
        kernels = [each.kernel(*self._shape) for each in self._formats]
        warm_up(kernels, lambda name, done, total: self._report(f"compiling kernels ({name})", done / total))
        ready = []
        for n, (each, kernel) in enumerate(zip(self._formats, kernels, strict=True)):
            self._report(f"filling memory with {each}", n / len(kernels))
            ready.append((kernel, ColdExperts(each, *self._shape, self._mib)))
        with ReadLimit(self._team, self._mib) as self._limit:
            for kernel, experts in ready:  # the first calls wake threads and map pages
                experts.seconds(kernel, 1, self._team)
            started, rounds = time.perf_counter(), 0
            while rounds < 2 or time.perf_counter() - started < seconds:
                self._report("measuring", min(1.0, (time.perf_counter() - started) / seconds))
                self._limit.sample()
                for tokens in (1, MANY):
                    for kernel, experts in ready:
                        calls = CALLS if tokens == 1 else 1
                        taken = experts.seconds(kernel, tokens, self._team, calls)
                        self._times.setdefault((str(experts.format), tokens), []).append(taken)
                rounds += 1

    @property
    def read_limit(self) -> float | None:
        """GB/s; None before the first round."""
        try:
            return self._limit.gb_per_s() if self._limit is not None else None
        except RuntimeError:
            return None

    def figures(self) -> list[Figures]:
        """What has been measured so far."""
        found = []
        hidden, inner = self._shape
        for each in self._formats:
            one, many = (self._times.get((str(each), tokens)) for tokens in (1, MANY))
            rate = ACTIVE * each.record(hidden, inner).weight_bytes / float(np.median(one)) / 1e9 if one else None
            limit = self.read_limit
            share = rate / limit if rate is not None and limit else None
            speed = ACTIVE * MANY * 6 * hidden * inner / float(np.median(many)) / 1e9 if many else None
            found.append(Figures(str(each), rate, share, speed))
        return found
