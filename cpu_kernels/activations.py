"""The activation functions as vector code.

exp overflows to infinity and underflows to zero as the library's does, and NaN stays NaN, so
that silu(-inf) is NaN and silu(inf) is inf as in torch. Division is IEEE: the fast reciprocal of
a huge 1 + exp(88) is subnormal and was measured 20 times slower than the whole of silu.
"""

from typing import Any

from moe_offload.cpu_kernels.emit import F32, I32, Emitter, Value, micro_kernel, vector
from moe_offload.cpu_kernels.layout import ActivationKind

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# exp(r) on |r| <= ln(2)/2, Taylor's first seven terms: error below one unit in the last place
_EXP = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
# Abramowitz and Stegun 7.1.26: |error| of erf <= 1.5e-7
_ERF_P = 0.3275911
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


class _Math:
    """Elementwise functions on one vector (or scalar) type."""

    def __init__(self, em: Emitter, count: int) -> None:
        self.em, self.b, self.count = em, em.b, count
        self.kind = vector(F32, count)

    def c(self, value: float) -> Value:
        return self.em.const(self.kind, value)

    def clamp_above(self, x: Value, limit: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered(">", x, limit), limit, x)  # NaN stays NaN

    def clamp_below(self, x: Value, limit: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered("<", x, limit), limit, x)

    def clamp_both(self, x: Value, limit: Value) -> Value:
        return self.clamp_below(self.clamp_above(x, limit), self.b.fneg(limit))

    def exp(self, x: Value) -> Value:
        b, em, ints = self.b, self.em, vector(I32, self.count)
        # the conversion to integer is undefined for NaN: bring it into range, restore it below
        inside = b.select(b.fcmp_ordered("<", x, self.c(88.7)), x, self.c(88.7))
        inside = self.clamp_below(inside, self.c(-87.3))
        rounded = self._round(b.fmul(inside, self.c(_LOG2E)))
        rest = em.fma(rounded, self.c(-_LN2_HIGH), inside)
        rest = em.fma(rounded, self.c(-_LN2_LOW), rest)
        value = self.c(_EXP[0])
        for coefficient in _EXP[1:]:
            value = em.fma(value, rest, self.c(coefficient))
        # 2^n in two steps: n reaches 128, whose exponent field would be that of infinity
        power = b.fptosi(rounded, ints)
        half = b.ashr(power, em.const(ints, 1))
        for part in (half, b.sub(power, half)):
            bits = b.shl(b.add(part, em.const(ints, 127)), em.const(ints, 23))
            value = b.fmul(value, b.bitcast(bits, self.kind))
        value = b.select(b.fcmp_ordered("<", x, self.c(-87.3)), self.c(0.0), value)
        value = b.select(b.fcmp_ordered(">", x, self.c(88.7)), self.c(float("inf")), value)
        return b.select(b.fcmp_unordered("uno", x, x), x, value)

    def _round(self, x: Value) -> Value:
        """Nearest integer of |x| < 2^22 by two additions: the instruction came with SSE4.1."""
        magic = self.c(12582912.0)  # 1.5 * 2^23 leaves no bits for a fraction
        return self.b.fsub(self.b.fadd(x, magic), magic)

    def sigmoid(self, x: Value) -> Value:
        one = self.c(1.0)
        return self.b.fdiv(one, self.b.fadd(one, self.exp(self.b.fneg(x))))

    def silu(self, x: Value) -> Value:
        return self.b.fdiv(x, self.b.fadd(self.c(1.0), self.exp(self.b.fneg(x))))

    def tanh(self, x: Value) -> Value:
        """1 - 2 / (exp(2x) + 1): absolute error of one rounding of 1."""
        b = self.b
        e = self.exp(b.fmul(x, self.c(2.0)))
        return b.fsub(self.c(1.0), b.fdiv(self.c(2.0), b.fadd(e, self.c(1.0))))

    def erf(self, x: Value) -> Value:
        b, em = self.b, self.em
        ints = vector(I32, self.count)
        bits = b.bitcast(x, ints)
        size = b.bitcast(b.and_(bits, em.const(ints, 0x7FFFFFFF)), self.kind)
        sign = b.and_(bits, em.const(ints, -(2**31)))
        t = b.fdiv(self.c(1.0), em.fma(size, self.c(_ERF_P), self.c(1.0)))
        series = self.c(_ERF[0])
        for coefficient in _ERF[1:]:
            series = em.fma(series, t, self.c(coefficient))
        tail = b.fmul(b.fmul(series, t), self.exp(b.fneg(b.fmul(size, size))))
        return b.bitcast(b.or_(b.bitcast(b.fsub(self.c(1.0), tail), ints), sign), self.kind)

    def gelu(self, x: Value) -> Value:
        b = self.b
        half = b.fmul(x, self.c(0.5))
        return b.fmul(half, b.fadd(self.c(1.0), self.erf(b.fmul(x, self.c(0.5**0.5)))))

    def gelu_tanh(self, x: Value) -> Value:
        b = self.b
        inner = self.em.fma(b.fmul(b.fmul(x, x), x), self.c(0.044715), x)
        t = self.tanh(b.fmul(inner, self.c(0.7978845608028654)))
        return b.fmul(b.fmul(x, self.c(0.5)), b.fadd(self.c(1.0), t))

    def relu(self, x: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered("<", x, self.c(0.0)), self.c(0.0), x)


def _apply(m: _Math, kind: ActivationKind, g: Value, u: Value, alpha: Value, limit: Value) -> Value:
    """The gated value of (g, u), or f(g) alone where u is None."""
    b = m.b
    if kind in ("swiglu_oai", "silu_clamp"):
        g, u = m.clamp_above(g, limit), m.clamp_both(u, limit)
        if kind == "silu_clamp":
            return b.fmul(m.silu(g), u)
        glu = b.fmul(g, m.sigmoid(b.fmul(g, alpha)))
        return b.fmul(b.fadd(u, m.c(1.0)), glu)
    if kind == "silu_cap":
        return b.fmul(m.clamp_above(m.silu(g), limit), m.clamp_both(u, limit))
    if kind == "silu_softcap":
        gate = b.fmul(b.fmul(alpha, m.tanh(b.fdiv(g, alpha))), m.sigmoid(g))
        return b.fmul(gate, b.fmul(limit, m.tanh(b.fdiv(u, limit))))
    if kind == "silu":
        value = m.silu(g)
    elif kind == "gelu":
        value = m.gelu(g)
    elif kind == "gelu_tanh":
        value = m.gelu_tanh(g)
    elif kind == "gelu_quick":
        value = b.fmul(g, m.sigmoid(b.fmul(g, alpha)))
    else:
        value = m.relu(g)
        if kind == "relu2":
            value = b.fmul(value, value)
    return value if u is None else b.fmul(value, u)


def make_activate(kind: ActivationKind, gated: bool, step: int, lanes: int) -> Any:
    """Intrinsic (g, u, h, n, alpha, limit): h[i] = act(g[i*step], u[i*step]) for i < n.

    All f32. h may be g: an element is read before it is written, and never again (step 1).
    Gates and ups that lie interleaved (step 2) are taken apart in registers.
    """

    def emit(em: Emitter, g: Value, u: Value, h: Value, n: Value, alpha: Value, limit: Value) -> None:
        def run(count: int, start: Value, stop: Value) -> None:
            m = _Math(em, count)
            splat_alpha, splat_limit = em.splat(alpha, m.kind), em.splat(limit, m.kind)

            def body(i: Value, _: list[Value]) -> list[Value]:
                at = em.mul(i, 4 * step)
                gate = load(m.kind, count, em.add(g, at))
                up = load(m.kind, count, em.add(u, at)) if gated else None
                value = _apply(m, kind, gate, up, splat_alpha, splat_limit)
                em.store(value, em.add(h, em.mul(i, 4)))
                return []

            em.loop(start, stop, count, [], body)

        def load(kind_of: Any, count: int, address: Value) -> Value:
            if step == 1 or count == 1:
                return em.load(kind_of, address)
            # the odd lanes are the other matrix's; the last of them may lie behind the buffer
            low, high = em.load(kind_of, address), em.load(kind_of, address, 4 * count)
            return em.shuffle(low, high, range(0, 2 * count, 2))

        whole = em.floor_to(n, lanes)
        run(lanes, 0, whole)
        run(1, whole, n)

    return micro_kernel(f"activate_{kind}", "iiiiff:v", emit)
