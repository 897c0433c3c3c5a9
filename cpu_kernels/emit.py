"""A thin layer to emit LLVM vector IR from Python and call it from Numba functions.

A micro kernel is a Python function `emit(em, *values)` that writes IR through an `Emitter`;
`micro_kernel` turns it into a Numba intrinsic. Unrolling and register tiles are Python loops at
emission time. To Numba's front end a micro kernel is one call, so compile time stays small, and
LLVM's machine code is that of C with vector intrinsics. Memory is addressed by int64: no array
is unboxed, and any layout of a checkpoint can be read in place.

No fast-math flag is set anywhere: NaN and infinity have to come out as torch gives them, and a
reordered sum would make results depend on the tile. Where a sum may be reordered, the order is
written down.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir
from numba.core import types
from numba.extending import intrinsic

from moe_offload.cpu_kernels.target import Target, current_target

ir: Any = llvmlite.ir  # untyped; as Any it may be called from typed code

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()
VOID = ir.VoidType()

Value = Any  # an llvmlite value; llvmlite publishes no types
_NUMBA_TYPES: dict[str, Any] = {
    "i": types.int64,
    "h": types.int32,
    "f": types.float32,
    "v": types.void,
}


def vector(element: Any, count: int) -> Any:
    """<count x element>; a count of 1 is the scalar, so that tails share their code."""
    return element if count == 1 else ir.VectorType(element, count)


class Emitter:
    """Writes IR at the builder's position. Integers given as Python int become i64 constants."""

    def __init__(self, builder: Any, target: Target) -> None:
        self.b = builder
        self.target = target

    def const(self, kind: Any, value: float | int) -> Value:
        if isinstance(kind, ir.VectorType):
            return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
        return ir.Constant(kind, value)

    def i64(self, value: Value) -> Value:
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def add(self, a: Value, b: Value) -> Value:
        if isinstance(b, int) and b == 0:
            return a
        return self.b.add(self.i64(a), self.i64(b))

    def mul(self, a: Value, b: Value) -> Value:
        return self.b.mul(self.i64(a), self.i64(b))

    def pointer(self, address: Value, offset: Value = 0) -> Value:
        base = self.b.inttoptr(address, POINTER)
        if isinstance(offset, int) and offset == 0:
            return base
        # one inttoptr of the base and a GEP let LLVM fold constant offsets into the instruction
        return self.b.gep(base, [self.i64(offset)], source_etype=I8)

    def load(self, kind: Any, address: Value, offset: Value = 0) -> Value:
        """Any address is fine: safetensors data may begin at an odd offset of the file."""
        return self.b.load(self.pointer(address, offset), align=1, typ=kind)

    def store(self, value: Value, address: Value, offset: Value = 0) -> None:
        self.b.store(value, self.pointer(address, offset), align=1)

    def prefetch(self, address: Value, offset: Value = 0, locality: int = 3) -> None:
        """Locality 3 asks for L1, 2 for L2. An address behind a mapping's end is harmless."""
        hints = [ir.Constant(I32, 0), ir.Constant(I32, locality), ir.Constant(I32, 1)]
        self.call("llvm.prefetch.p0", VOID, [self.pointer(address, offset), *hints])

    def call(self, name: str, result: Any, args: Sequence[Value], variadic: bool = False) -> Value:
        function = self.b.module.globals.get(name)
        if function is None:
            parameters = [args[0].type] if variadic else [a.type for a in args]
            kind = ir.FunctionType(result, parameters, var_arg=variadic)
            function = ir.Function(self.b.module, kind, name=name)
        return self.b.call(function, list(args))

    def suffix(self, kind: Any) -> str:
        return f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c; on a target without FMA two roundings instead of a library call."""
        if self.target.fma:
            return self.call(f"llvm.fma.{self.suffix(a.type)}", a.type, [a, b, c])
        return self.b.fadd(self.b.fmul(a, b), c)

    def splat(self, scalar: Value, kind: Any) -> Value:
        if not isinstance(kind, ir.VectorType):
            return scalar
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        mask = ir.Constant(ir.VectorType(I32, kind.count), None)
        return self.b.shuffle_vector(first, undefined, mask)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, n) for n in lanes])
        return self.b.shuffle_vector(a, b, mask)

    def sum_lanes(self, value: Value) -> Value:
        """Sum of a vector's lanes by halving: one fixed order, whatever the tile."""
        count = value.type.count
        while count > 1:
            count //= 2
            low = self.shuffle(value, value, range(count))
            high = self.shuffle(value, value, range(count, 2 * count))
            value = self.b.fadd(low, high)
        return self.b.extract_element(value, ir.Constant(I32, 0))

    def loop(
        self,
        start: Value,
        stop: Value,
        step: int,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """for (i = start; i < stop; i += step) carried = body(i, carried); returns `carried`."""
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "body", "done"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(self.i64(start), before)
        values = []
        for initial in carried:
            phi = b.phi(initial.type)
            phi.add_incoming(initial, before)
            values.append(phi)
        b.cbranch(b.icmp_signed("<", index, self.i64(stop)), inside, after)
        b.position_at_end(inside)
        results = body(index, list(values))
        assert len(results) == len(values)
        following = b.add(index, ir.Constant(I64, step))
        last = b.block
        b.branch(head)
        index.add_incoming(following, last)
        for phi, result in zip(values, results, strict=True):
            phi.add_incoming(result, last)
        b.position_at_end(after)
        return values

    def floor_to(self, value: Value, multiple: int) -> Value:
        """The largest multiple (a power of two) not above a value >= 0."""
        return self.b.and_(value, ir.Constant(I64, -multiple))


def micro_kernel(name: str, signature: str, emit: Callable[..., Value | None]) -> Any:
    """A Numba intrinsic from `emit(em, *values)`.

    `signature` is "arguments:result" with i = int64 (addresses too), h = int32, f = float32,
    v = nothing.
    """
    arguments, result = signature.split(":")
    numba_signature = _NUMBA_TYPES[result](*[_NUMBA_TYPES[code] for code in arguments])

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Value:
        returned = emit(Emitter(builder, current_target()), *values)
        return context.get_dummy_value() if result == "v" else returned

    def typer(typing_context: Any, *_types: Any) -> Any:
        return numba_signature, codegen

    # Numba reads the arity from the Python signature; a starred one would arrive as one tuple.
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["typing_context", *(f"a{i}" for i in range(len(arguments)))]
    typer.__name__ = typer.__qualname__ = name
    signature_of: Any = typer
    signature_of.__signature__ = inspect.Signature([inspect.Parameter(n, positional) for n in names])
    as_intrinsic: Any = intrinsic  # typed for functions whose arity is known
    return as_intrinsic(typer)
