"""The tests' own tool: kernels on the CPU. Faults planted in small kernels have to be found, and sound ones to pass."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.gpu_kernels.launch import Argument, KernelError, Macros
from moe_offload.gpu_kernels.sources import read_source
from tests.gpu_kernels import build_cache
from tests.gpu_kernels.host_kernels import ORDERS, HostKernel, HostKernels, needs_compiler, preloaded_sanitizer

pytestmark = needs_compiler
ROOT = Path(__file__).parents[2]

SUM = """
extern "C" __global__ void __launch_bounds__(128) sum(const float* __restrict__ x, float* out, int n) {
    __shared__ float parts[4];
    float part = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) part += x[i];
    for (int other = 16; other > 0; other >>= 1) part += __shfl_xor_sync(0xffffffffu, part, other);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
    BARRIER
    if (threadIdx.x == LAST) out[blockIdx.x] = parts[0] + parts[1] + parts[2] + parts[3];
}
"""


FAULTS = [
    ("if (i < 40) __syncthreads();", "a barrier that not all threads reach"),
    ("if (i >= 40) return; __syncthreads();", "a barrier that not all threads reach"),
    ("if (i < 32) { __syncthreads(); }\n else { __syncthreads(); }", "threads wait at different barriers"),
    ("if (i % 2) y[i] = __shfl_xor_sync(~0u, x[i], 1);", "the mask names a lane that has returned"),
    ("if (i == 5) return; y[i] = __any_sync(~0u, x[i]);", "the mask names a lane that has returned"),
    ("if (i % 2) y[i] = __shfl_sync(~0u, i, 0); __syncthreads();", "a warp operation that not all of its lanes"),
    ("if (i % 2) __syncwarp();\n else __syncwarp();", "lanes are in different warp operations"),
    ("if (i < 32) __syncwarp(i < 16 ? ~0u : 0xffff0000u);", "different masks"),
    ("if (i < 16) __syncwarp(0xffff0000u);", "a lane is not in its own mask"),
    ("if (i < 16) y[i] = __shfl_sync(0xffffu, x[i], 20);", "a lane reads from one outside of the mask"),
]
BODIES = {
    "next": "y[i] = x[i] + 1;",
    "by_order": "y[0] = 3 * y[0] + x[i];",
    "large": "volatile int all[52000]; for (int k = 0; k < 52000; ++k) all[k] = k; y[i] = all[i];",
    "warps": "__syncwarp();",
    "first_warp": "if (i < 32) __syncwarp();",
    "poisoned": "__shared__ int before[64]; y[i] = before[i]; before[i] = i;",
    "reversed": "extern __shared__ __align__(16) int all[]; all[63 - i] = x[i]; __syncthreads(); y[i] = all[i];",
    "shuffles": """
        const int by = y[0], width = y[1], kind = y[2]; int got = 0;
        __syncthreads();
        if (kind == 0) got = __shfl_xor_sync(~0u, x[i], by, width);
        if (kind == 1) got = __shfl_down_sync(~0u, x[i], by, width);
        if (kind == 2) got = __shfl_up_sync(~0u, x[i], by, width);
        if (kind == 3) got = __shfl_sync(~0u, x[i], by, width);
        y[i] = got;""",
    "ballot": "y[i] = __ballot_sync(~0u, x[i] % 3 == 0);",
    "votes": "y[i] = __any_sync(~0u, x[i] == 40) + 2 * __all_sync(~0u, x[i] < 32);",
    "counts": "y[i] = __syncthreads_count(i < 5) + 100 * __syncthreads_or(i == 9) + 1000 * __syncthreads_and(i < 63);",
    "atomics": "atomicAdd(y, x[i]); atomicMax(y + 1, i);",
    "places": """
        const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        y[block * blockDim.x * blockDim.y * blockDim.z + thread] += thread + 100 * block + 1;""",
    "bytes": """
        y[0] = __byte_perm(x[0], x[1], x[2]);
        y[1] = __dp4a(x[0], x[1], x[2]);
        y[2] = __dp4a((unsigned)x[0], (unsigned)x[1], (unsigned)x[2]);""",
    **{f"fault{at}": text for at, (text, _) in enumerate(FAULTS)},
}


def body(text: str, name: str = "planted") -> str:
    """A kernel with pointers to ints."""
    return f'extern "C" __global__ void {name}(int* x, int* y) {{ const int i = threadIdx.x; {text} }}'


SMALL = "".join(f'\n#line 1 "{name}.cu"\n{body(text, name)}' for name, text in BODIES.items())


def kernel(text: str, name: str, order: int = 0, arch: int = 610, macros: Macros = ()) -> HostKernel:
    return HostKernels.of_text(text, order, arch, "").get("planted.cu", name, macros)


def run(name: str, threads: int = 64, order: int = 0) -> torch.Tensor:
    x, y = torch.arange(threads, dtype=torch.int32), torch.zeros(threads, dtype=torch.int32)
    kernel(SMALL, name, order)((1,), (threads,), (x, y))
    return y


def summed(barrier: str, last: int, order: int) -> list[float]:
    x, out = torch.arange(1000, dtype=torch.float32), torch.zeros(3)
    text = SUM.replace("BARRIER", barrier)
    arguments = (x, out, np.int32(1000))
    kernel(text, "sum", order, macros=(("LAST", last),))((3,), (128,), arguments)
    return out.tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("last", [0, 127])
def test_a_sum_is_right_in_every_order(order: int, last: int) -> None:
    expected = [float(sum(i for i in range(1000) if i // 128 % 3 == block)) for block in range(3)]
    assert summed("__syncthreads();", last, order) == expected


@pytest.mark.parametrize("last", [0, 127])
def test_a_missing_barrier_is_found(last: int) -> None:
    """Each order hides some: forward, where the last thread reads; backward, where the first does."""
    right = summed("__syncthreads();", last, 0)
    wrong = [order for order in ORDERS if summed("", last, order) != right]
    assert set(wrong) >= ({0, 2, 3} if last == 0 else {1, 2, 3})


def test_a_result_that_depends_on_the_order_of_threads_is_found() -> None:
    assert len({int(run("by_order", 32, order)[0]) for order in ORDERS}) == len(ORDERS)


@pytest.mark.parametrize("at", range(len(FAULTS)))
def test_what_must_not_be_is_said_with_its_place(at: int) -> None:
    for order in ORDERS:
        with pytest.raises(KernelError, match=rf"fault{at}: .*{FAULTS[at][1]}.*: fault{at}.cu:[12], block \(0, 0, 0\)"):
            run(f"fault{at}", order=order)
        assert run("next", order=order).tolist() == list(range(1, 65))  # the next launch is sound


def test_a_thread_with_too_large_arrays_is_found() -> None:
    with pytest.raises(KernelError, match="more than its stack"):
        run("large")


def test_a_lane_that_the_block_does_not_have_is_found() -> None:
    with pytest.raises(KernelError, match="does not have"):
        run("warps", threads=48)
    run("first_warp", threads=48)


def test_shared_memory_starts_as_nan() -> None:
    x, y = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    kernel(SMALL, "poisoned")((3,), (64,), (x, y))  # the last block sees nothing of those before it
    assert y.tolist() == [-1] * 64


def test_shared_memory_of_the_size_that_the_launch_asks_for() -> None:
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    reverse = kernel(SMALL, "reversed")
    reverse((1,), (64,), (x, y), shared_bytes=256)
    assert y.tolist() == list(range(63, -1, -1))
    with pytest.raises(KernelError, match="48 KiB"):
        reverse((1,), (64,), (x, y), shared_bytes=49153)


@given(st.integers(0, 3), st.sampled_from([2, 4, 8, 16, 32]), st.integers(0, 31))
@settings(deadline=None, max_examples=60)
def test_shuffles_stay_in_their_part_of_the_warp(kind: int, width: int, by: int) -> None:
    """Against the definition, one lane at a time."""
    x, y = torch.arange(100, 132, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    y[:3] = torch.tensor([by, width, kind])
    kernel(SMALL, "shuffles")((1,), (32,), (x, y))
    for lane in range(32):
        first = lane // width * width
        source = [lane ^ by, lane + by, lane - by, first + by % width][kind]
        inside = source < first + width if kind < 2 else source >= first
        assert y[lane] == 100 + (source if inside else lane)


def test_votes_and_counting_barriers() -> None:
    assert run("ballot", 32)[7] == 0x49249249
    assert run("votes").tolist() == [2] * 32 + [1] * 32
    assert run("counts").tolist() == [105] * 64


@given(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3))
@settings(deadline=None, max_examples=60)
def test_byte_instructions(words: list[int]) -> None:
    x, y = torch.from_numpy(np.array(words, np.uint32).view(np.int32)), torch.zeros(3, dtype=torch.int32)
    kernel(SMALL, "bytes")((1,), (1,), (x, y))
    given_bytes = np.array(words[:2], np.uint32).view(np.uint8)
    chosen = [words[2] >> 4 * at & 15 for at in range(4)]
    permuted = [int(given_bytes[c & 7]) if c < 8 else 255 * int(given_bytes[c & 7] >= 128) for c in chosen]
    a, b = given_bytes[:4].astype(np.int64), given_bytes[4:].astype(np.int64)
    signed = int((a - 256 * (a > 127)) @ (b - 256 * (b > 127)))
    expected = [int.from_bytes(bytes(permuted), "little"), (signed + words[2]) % 2**32, (int(a @ b) + words[2]) % 2**32]
    assert y.numpy().view(np.uint32).tolist() == expected


def test_half_precision_is_exact() -> None:
    """All halves there and back; floats of every exponent, and those next to the middle between two halves."""
    text = (
        read_source("common.cuh")
        + """
    extern "C" __global__ void there(const u16* x, float* y, int n) {
        for (int i = 0; i < n; ++i) y[i] = f16_to_float(x[i]);
    }
    extern "C" __global__ void back(const float* x, u16* y, int n) {
        for (int i = 0; i < n; ++i) y[i] = float_to_f16(x[i]);
    }"""
    )
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    wide = torch.zeros(65536)
    kernel(text, "there")((1,), (1,), (torch.from_numpy(halves), wide, np.int32(65536)))
    assert np.array_equal(wide.numpy(), halves.astype(np.float32), equal_nan=True)
    steps = wide.numpy()[:31744]
    middles = (steps[1:] + steps[:-1]) / 2  # exact
    near = [np.nextafter(middles, np.float32(end)) for end in (0, np.inf)]
    anything = np.random.default_rng(0).integers(0, 2**32, 20000, np.uint32).view(np.float32)
    ends = np.array([65519.99, 65520, np.inf], np.float32)
    values = np.concatenate([wide.numpy(), middles, *near, ends, anything])
    values = np.concatenate([values, -values])
    found = torch.zeros(values.size, dtype=torch.int16)
    kernel(text, "back")((1,), (1,), (torch.from_numpy(values), found, np.int32(values.size)))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    assert np.array_equal(found.numpy().view(np.float16), expected, equal_nan=True)
    same = found.numpy().view(np.uint16) == expected.view(np.uint16)  # zeros have signs
    assert (same | np.isnan(values)).all()


def test_conversions_and_limits_as_on_the_device() -> None:
    text = """
    extern "C" __global__ void limits(const float* x, int* y, float* z) {
        for (int i = 0; i < 8; ++i) y[i] = __float2int_rn(x[i]);
        z[0] = max(x[7], 2.0f);
        z[1] = fminf(1.0f, x[7]);
        z[2] = __uint_as_float(__float_as_uint(x[0])) + __int_as_float(__float_as_int(x[1]));
        z[3] = __fmaf_rn(x[0], x[1], x[2]);
        z[4] = rsqrtf(x[5]) + __ldg(x) + make_float4(1, 2, 3, 4).w;
    }"""
    x = torch.tensor([0.5, 1.5, -2.5, 3e9, -3e9, 4.0, 2147483520.0, float("nan")])
    y, z = torch.zeros(8, dtype=torch.int32), torch.zeros(5)
    kernel(text, "limits")((1,), (1,), (x, y, z))
    assert y.tolist() == [0, 2, -2, 2**31 - 1, -(2**31), 4, 2147483520, 0]
    assert z.tolist() == [2.0, 1.0, 2.0, -1.75, 5.0]


def test_atomics_are_for_integers() -> None:
    assert run("atomics")[:2].tolist() == [2016, 63]
    text = 'extern "C" __global__ void f(float* x) { atomicAdd(x, 1.0f); }'
    with pytest.raises(KernelError, match="atomics are for integers"):
        kernel(text, "f")


TYPES = """
struct Table { unsigned long long address[3]; int count; };
extern "C" __global__ void types(const int* a, int b, unsigned long long c, float d, Table e, unsigned char* out) {
    out[0] = (a != nullptr) + b + c + d + e.count + e.address[2];
}
"""
TABLE = np.array([((1, 2, 3), 4)], np.dtype([("address", np.uint64, 3), ("count", np.int32)], align=True))
RIGHT = (None, np.int32(1), np.uint64(2), np.float32(3), TABLE)


def test_arguments_of_every_kind() -> None:
    out = torch.zeros(1, dtype=torch.uint8)
    run_types = kernel(TYPES, "types")
    run_types((1,), (1,), (*RIGHT, out))
    assert out[0] == 1 + 2 + 3 + 4 + 3
    run_types((1,), (1,), (torch.zeros(1, dtype=torch.int32), *RIGHT[1:], out))
    assert out[0] == 14
    run_types((1,), (1,), (None, np.array([9], np.int32), *RIGHT[2:], out))
    assert out[0] == 21


@pytest.mark.parametrize(
    ("at", "wrong", "error", "message"),
    [
        (0, np.uint64(0), KernelError, "argument 0 is u8, the kernel takes p"),
        (1, np.int64(1), KernelError, "argument 1 is i8, the kernel takes i4"),
        (1, np.uint32(1), KernelError, "argument 1 is u4, the kernel takes i4"),
        (1, None, KernelError, "argument 1 is p, the kernel takes i4"),
        (1, 1, TypeError, "Python int"),
        (1, np.zeros(2, np.int32), KernelError, "has 2 elements"),
        (2, np.int64(1), KernelError, "argument 2 is i8, the kernel takes u8"),
        (3, np.float64(1), KernelError, "argument 3 is f8, the kernel takes f4"),
        (3, 1.0, TypeError, "Python float"),
        (4, TABLE[["count"]].astype([("count", np.int32)]), KernelError, "argument 4 is s4, the kernel takes s32"),
        (4, np.uint64(3), KernelError, "argument 4 is u8, the kernel takes s32"),
        (5, torch.zeros(1, device="meta"), KernelError, "on meta, not on the CPU"),
    ],
)
def test_arguments_of_other_types_are_refused(at: int, wrong: Argument, error: type[Exception], message: str) -> None:
    arguments: list[Argument] = [*RIGHT, torch.zeros(1, dtype=torch.uint8)]
    arguments[at] = wrong
    with pytest.raises(error, match=message):
        kernel(TYPES, "types")((1,), (1,), arguments)
    with pytest.raises(KernelError, match="5 arguments for 6"):
        kernel(TYPES, "types")((1,), (1,), RIGHT)


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((0,), (32,), r"no grid \(0, 1, 1\)"),
        ((1, 70000), (32,), "no grid"),
        ((1,), (0, 1), "no grid"),
        ((1,), (8, 8, 65), "no grid"),
        ((1,), (32, 33), "1056 threads in a block, its bound is 128"),
        ((1,), (129,), "129 threads in a block, its bound is 128"),
        ((1, 1, 1, 1), (32,), "not 4"),
    ],
)
def test_sizes_that_no_device_takes(grid: Sequence[int], block: Sequence[int], message: str) -> None:
    text = SUM.replace("BARRIER", "__syncthreads();")
    with pytest.raises(KernelError, match=message):
        kernel(text, "sum", macros=(("LAST", 0),))(grid, block, (None, None, np.int32(0)))


def test_grids_and_blocks_of_three_dimensions() -> None:
    for order in ORDERS:
        y = torch.zeros(24 * 24, dtype=torch.int32)
        kernel(SMALL, "places", order)((2, 3, 4), (4, 3, 2), (None, y))
        assert y.tolist() == [thread + 100 * block + 1 for block in range(24) for thread in range(24)]


def test_the_instruction_that_older_cards_lack_is_not_there() -> None:
    text = body("y[i] = __dp4a(x[i], x[i], 0);")
    with pytest.raises(KernelError, match="__dp4a"):
        kernel(text, "planted", arch=600)


def test_what_does_not_compile_is_said() -> None:
    with pytest.raises(KernelError, match="kernel.cu:1"):
        kernel(body("y[i] = nothing;"), "planted")
    with pytest.raises(KernelError, match="uninitialized"):
        kernel(body("int sum; for (int k = 0; k < i; ++k) sum += x[k]; y[i] = sum;"), "planted")
    with pytest.raises(ValueError, match="planted.cu has no kernel 'other'"):
        kernel(SMALL, "other")


def test_kernels_that_macros_leave_out_or_name() -> None:
    text = """
    #if SIZE > 1
    extern "C" __global__ void __launch_bounds__(32 * (SIZE), 2) wide(int* x) { x[threadIdx.x] = SIZE; }
    #endif
    #define KERNEL(name) extern "C" __global__ void name(int* x)
    KERNEL(plain) { x[threadIdx.x] = 7; }"""
    assert [kernel(text, name, macros=(("SIZE", 2),)).bound for name in ("wide", "plain")] == [64, 1024]
    with pytest.raises(ValueError, match="wide"):
        kernel(text, "wide", macros=(("SIZE", 1),))


# One process loads torch and compiles; each case is a child of it, which dies of its fault.
SANITIZED = """
import os, sys, numpy as np, torch
from tests.gpu_kernels.host_kernels import HostKernels
text = '''
extern "C" __global__ void reach(float* x, float* y, int read, int write, int shared, int local, int odd) {
    __shared__ float all[64];
    float own[4] = {1, 2, 3, 4};
    const int i = threadIdx.x;
    all[i + shared] = x[i + read];
    __syncthreads();
    y[i + write] = all[63 - i] + own[(i & 3) + local] + ((const uint4*)(x + odd))->y;
}
'''
kernel = HostKernels.of_text(text, sanitize=sys.argv[1]).get("planted.cu", "reach")
for case in sys.argv[2:]:
    print("case", case, file=sys.stderr, flush=True)
    child = os.fork()
    if not child:
        numbers = [np.int32(word) for word in case.split()]
        for _ in range(2):
            kernel((2,), (64,), (torch.from_numpy(np.zeros(64, np.float32)), torch.zeros(64), *numbers))
        print("sound", file=sys.stderr, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
REACHES = {
    "0 0 0 0 0": "sound",
    "1 0 0 0 0": "heap-buffer-overflow",
    "-1 0 0 0 0": "heap-buffer-overflow",
    "0 1 0 0 0": "heap-buffer-overflow",
    "0 0 1 0 0": "out of bounds for type 'float [64]'",
    "0 0 0 1 0": "out of bounds for type 'float [4]'",
    "0 0 0 0 1": "misaligned address",
}


def test_sanitizers_find_bytes_that_are_nobody_s() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, "address,alignment,bounds", *REACHES],
        cwd=ROOT, env={**os.environ, **preloaded_sanitizer()}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = done.stderr.split("case ")[1:]
    assert len(said) == len(REACHES)
    for text, (case, found) in zip(said, REACHES.items(), strict=True):
        assert text.startswith(case) and found in text, text
        assert found == "sound" or ("sound" not in text and "planted.cu" not in case), text


def test_the_sanitizer_has_to_be_loaded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(KernelError, match="preloaded_sanitizer"):
        HostKernels.of_text(SMALL, sanitize="address").get("planted.cu", "next")


def test_compiled_kernels_are_kept_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fresh = build_cache.folder.__wrapped__
    mine = fresh()
    assert mine.parent == tmp_path and mine.stat().st_mode & 0o777 == 0o700 and fresh() == mine
    mine.chmod(0o777)
    assert fresh() != mine
    mine.rmdir()
    mine.symlink_to(tmp_path)
    assert not fresh().is_symlink()


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "folder", lambda: tmp_path)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KernelError("no")

    with pytest.raises(KernelError):
        build_cache.cached(".so", "key", fail)
    assert not list(tmp_path.iterdir())

    def write(path: Path) -> None:
        path.write_text("whole")

    made = build_cache.cached(".so", "key", write)
    assert made.read_text() == "whole" and build_cache.cached(".so", "key", fail) == made
