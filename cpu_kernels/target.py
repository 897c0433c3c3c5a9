"""What the machine that Numba compiles for can do: vector width, FMA, half conversion, byte dot products.

Asked of LLVM itself: a few lines of IR are compiled for Numba's CPU name and features, and the
assembly is read. So NUMBA_CPU_NAME and NUMBA_CPU_FEATURES hold here as they hold for the kernels;
a CPU's name alone (`haswell` with an empty feature list) says nothing through llvmlite otherwise.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding
from numba.core.registry import cpu_target

llvm: Any = llvmlite.binding  # untyped

_PROBE = """
target triple = "{triple}"
define <16 x float> @wide(<16 x float> %a, <16 x float> %b) {{
  %r = fadd <16 x float> %a, %b
  ret <16 x float> %r
}}
"""
_PROBE_FMA = """
target triple = "{triple}"
declare <4 x float> @llvm.fma.v4f32(<4 x float>, <4 x float>, <4 x float>)
define <4 x float> @fused(<4 x float> %a, <4 x float> %b, <4 x float> %c) {{
  %r = call <4 x float> @llvm.fma.v4f32(<4 x float> %a, <4 x float> %b, <4 x float> %c)
  ret <4 x float> %r
}}
"""
_PROBE_HALF = """
target triple = "{triple}"
define <4 x float> @half(ptr %p) {{
  %h = load <4 x half>, ptr %p, align 1
  %r = fpext <4 x half> %h to <4 x float>
  ret <4 x float> %r
}}
"""
_PROBE_BYTES = """
target triple = "{triple}"
define <64 x i8> @bytes(<64 x i8> %a, <64 x i8> %b) {{
  %r = add <64 x i8> %a, %b
  ret <64 x i8> %r
}}
"""
_PROBE_SHUFFLE = """
target triple = "{triple}"
define <16 x i8> @reverse(<16 x i8> %a) {{
  %r = shufflevector <16 x i8> %a, <16 x i8> poison, <16 x i32> <i32 15, i32 14, i32 13, i32 12, i32 11, i32 10,
    i32 9, i32 8, i32 7, i32 6, i32 5, i32 4, i32 3, i32 2, i32 1, i32 0>
  ret <16 x i8> %r
}}
"""
# A sum of products of unsigned and signed bytes, which LLVM turns into the instruction where there is one. Where an
# LLVM does not see it, the kernels of the next lower tier run: never an instruction that is not there.
_PROBE_BYTE_DOT = """
target triple = "{triple}"
declare i32 @llvm.vector.reduce.add.v64i32(<64 x i32>)
define i32 @byte_dot(ptr %p, ptr %q) {{
  %a = load <64 x i8>, ptr %p, align 1
  %b = load <64 x i8>, ptr %q, align 1
  %wide_a = zext <64 x i8> %a to <64 x i32>
  %wide_b = sext <64 x i8> %b to <64 x i32>
  %product = mul <64 x i32> %wide_a, %wide_b
  %r = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %product)
  ret i32 %r
}}
"""


@dataclass(frozen=True, slots=True)
class Target:
    """The instruction set that kernels are emitted for."""

    triple: str
    cpu: str
    features: str
    lanes: int  # f32 lanes of one vector register
    registers: int  # vector registers
    fma: bool  # llvm.fma is one instruction; otherwise it would be a library call
    half: bool  # f16 -> f32 is an instruction; otherwise it would be a library call
    int_lanes: int  # i32 lanes of one integer vector register (AVX alone has wide floats and narrow integers)
    byte_dot: bool  # AVX-512 VNNI: u8 x s8 dot products of four into i32
    byte_shuffle: bool  # pshufb: 16 bytes looked up at once
    tiles: bool  # AMX for bytes; a process needs permission, too: see amx.py
    follows_streams: bool  # memory is read best without asking ahead, as long as arithmetic does not hold it up

    @property
    def is_x86(self) -> bool:
        return self.triple.startswith(("x86_64", "i386", "i586", "i686"))

    @property
    def is_arm64(self) -> bool:
        return self.triple.startswith(("aarch64", "arm64"))


@cache
def current_target() -> Target:
    """The target of Numba's JIT in this process."""
    codegen = cpu_target.target_context.codegen()
    triple, cpu, features = codegen.magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)

    def assembly(source: str) -> str:
        module = llvm.parse_assembly(source.format(triple=triple))
        text: str = machine.emit_assembly(module)
        return "\n".join(line for line in text.splitlines() if "cfi" not in line)

    wide = assembly(_PROBE)
    lanes = 16 if "zmm" in wide else 8 if "ymm" in wide else 4
    fused, half = assembly(_PROBE_FMA), assembly(_PROBE_HALF)
    # the instruction itself: AVX-512 without BW (Knights Landing) passes bytes in zmm, but adds them in halves
    adds = [line for line in assembly(_PROBE_BYTES).splitlines() if "paddb" in line]
    int_lanes = 16 if any("zmm" in line for line in adds) else 8 if any("ymm" in line for line in adds) else 4
    x86 = triple.startswith(("x86_64", "i386", "i586", "i686"))
    return Target(
        triple=triple,
        cpu=cpu,
        features=features,
        lanes=lanes,
        registers=32 if lanes == 16 or not x86 else 16,
        fma="vfm" in fused or "fmla" in fused or "fmadd" in fused,
        half="vcvtph2ps" in half or "fcvt" in half,
        int_lanes=int_lanes,
        byte_dot=int_lanes == 16 and "vpdpbusd" in assembly(_PROBE_BYTE_DOT),
        byte_shuffle=x86 and "pshufb" in assembly(_PROBE_SHUFFLE),
        # not asked of LLVM: it selects tile instructions for any CPU, and only the host's list knows of the system
        tiles=x86 and {"+amx-tile", "+amx-int8"} <= set(features.split(",")),
        # Zen 4: with one token int4 reads at 89 % of the limit against 78 %, int8 at 95 against 75; Sapphire Rapids
        # gains by asking. A fact of the CPU at hand, whichever one the kernels are compiled for.
        follows_streams=llvm.get_host_cpu_name().startswith("znver"),
    )
