"""Small moves around a block of positions, in vectors: LLVM leaves loops over int64 addresses scalar."""

from typing import Any

from moe_offload.cpu_kernels.attention_rows import Rows
from moe_offload.cpu_kernels.emit import F32, Emitter, Value, micro_kernel, vector


def make_ask(rows: Rows) -> Any:
    """Intrinsic (address, step, n): ask for n rows before a job needs them."""

    def emit(em: Emitter, address: Value, step: Value, n: Value) -> None:
        def ask(j: Value, _: list[Value]) -> list[Value]:
            rows.prefetch(em, em.add(address, em.mul(j, step)), 0, rows.row_bytes)
            return []

        em.loop(0, n, 1, [], ask)

    return micro_kernel(f"attention_ask_{rows.row_bytes}", "iii:v", emit)


def make_set(lanes: int) -> Any:
    """Intrinsic (to, count, value): to[i] = value, f32."""

    def emit(em: Emitter, to: Value, count: Value, value: Value) -> None:
        def store(width: int) -> Any:
            def body(i: Value, _: list[Value]) -> list[Value]:
                em.store(em.splat(value, vector(F32, width)), to, em.mul(i, 4))
                return []

            return body

        whole = em.floor_to(count, lanes)
        em.loop(0, whole, lanes, [], store(lanes))
        em.loop(whole, count, 1, [], store(1))

    return micro_kernel(f"attention_set_{lanes}", "iif:v", emit)


def make_copy(lanes: int) -> Any:
    """Intrinsic (source, to, count): to[i] = source[i], f32; not an element further."""

    def emit(em: Emitter, source: Value, to: Value, count: Value) -> None:
        def move(width: int) -> Any:
            def body(i: Value, _: list[Value]) -> list[Value]:
                at = em.mul(i, 4)
                em.store(em.load(vector(F32, width), source, at), to, at)
                return []

            return body

        whole = em.floor_to(count, lanes)
        em.loop(0, whole, lanes, [], move(lanes))
        em.loop(whole, count, 1, [], move(1))

    return micro_kernel(f"attention_copy_{lanes}", "iii:v", emit)
