"""Words shared between threads: atomics, waiting, and the futex, for use in Numba functions."""

import platform
import sys

from moe_offload.cpu_kernels.emit import I32, I64, VOID, Emitter, Value, ir, micro_kernel
from moe_offload.cpu_kernels.jit import native

# Numbers of the futex call per machine; without one, an idle worker sleeps and looks again.
_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
HAS_FUTEX = sys.platform == "linux" and platform.machine() in _FUTEX_NUMBERS
_FUTEX = _FUTEX_NUMBERS.get(platform.machine(), 0)
_WAIT_PRIVATE, _WAKE_PRIVATE = 128, 129
_POLL_MICROSECONDS = 50
_EVERYONE = 1 << 20


def _fetch_add(em: Emitter, address: Value, value: Value) -> Value:
    return em.b.atomic_rmw("add", em.pointer(address), value, "seq_cst")


def _load_acquire(em: Emitter, address: Value) -> Value:
    return em.b.load_atomic(em.pointer(address), "acquire", 8, typ=I64)


def _exchange(em: Emitter, address: Value, value: Value) -> Value:
    # also our release store: llvmlite 0.50's store_atomic is broken with opaque pointers
    return em.b.atomic_rmw("xchg", em.pointer(address), value, "seq_cst")


def _relax(em: Emitter) -> None:
    if em.target.is_x86:
        em.call("llvm.x86.sse2.pause", VOID, [])
    elif em.target.is_arm64:
        em.call("llvm.aarch64.hint", VOID, [ir.Constant(I32, 1)])


def _give_way(em: Emitter) -> None:
    em.call("sched_yield", I32, [])


def _futex(em: Emitter, address: Value, operation: Value, value: Value) -> None:
    zero = ir.Constant(I64, 0)
    number = ir.Constant(I64, _FUTEX)
    em.call("syscall", I64, [number, address, operation, value, zero, zero, zero], variadic=True)


def _nap(em: Emitter) -> None:
    em.call("usleep", I32, [ir.Constant(I32, _POLL_MICROSECONDS)])


def _call_job(em: Emitter, function: Value, thread: Value, args: Value) -> None:
    kind = ir.FunctionType(VOID, [I64, I64])
    em.b.call(em.b.inttoptr(function, kind.as_pointer()), [thread, args])


fetch_add = micro_kernel("fetch_add", "ii:i", _fetch_add)
load_acquire = micro_kernel("load_acquire", "i:i", _load_acquire)
exchange = micro_kernel("exchange", "ii:i", _exchange)
relax = micro_kernel("relax", ":v", _relax)
give_way = micro_kernel("give_way", ":v", _give_way)
futex = micro_kernel("futex", "iii:v", _futex)
nap = micro_kernel("nap", ":v", _nap)
call_job = micro_kernel("call_job", "iii:v", _call_job)

_PATIENCE = 4096  # looks before the core is offered to others: we may be waiting for one of them


@native
def wait_for_count(address: int, goal: int) -> None:
    """Spin until the counter at `address` has reached `goal`."""
    looks = 0
    while load_acquire(address) < goal:
        relax()
        looks += 1
        if looks > _PATIENCE:
            give_way()


@native
def sleep_while(address: int, value: int) -> None:
    """Sleep as long as the word at `address` is `value`; may return early."""
    if HAS_FUTEX:
        futex(address, _WAIT_PRIVATE, value)
    else:
        nap()


@native
def wake_all(address: int) -> None:
    if HAS_FUTEX:
        futex(address, _WAKE_PRIVATE, _EVERYONE)
