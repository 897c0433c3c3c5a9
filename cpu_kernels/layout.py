"""What a kernel is specialised for: how one expert lies in memory, and its activation function."""

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

WeightType = Literal["bf16", "f16", "f32"]
ActivationKind = Literal[
    "silu",
    "gelu",
    "gelu_tanh",
    "gelu_quick",
    "relu",
    "relu2",
    "swiglu_oai",
    "silu_clamp",
    "silu_cap",
    "silu_softcap",
]

ELEMENT_BYTES: dict[str, int] = {"bf16": 2, "f16": 2, "f32": 4}
GATED_ONLY = ("swiglu_oai", "silu_clamp", "silu_cap", "silu_softcap")


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How ONE expert lies in memory, as the checkpoint stores it. H = hidden, I = intermediate.

    Row-major (`transposed=False`): gate and up are I rows of H, down is H rows of I.
    Transposed: gate and up are H rows of I (a column is an output), down is I rows of H.
    """

    hidden_size: int
    intermediate_size: int
    dtype: WeightType
    gated: bool = True  # gate, up, down; otherwise up, down
    transposed: bool = False
    gate_up_stride: int = 0  # elements from one gate (up) row to its next; 0 = dense
    gate_up_step: int = 1  # transposed only: elements between neighbouring outputs of a row
    bias: bool = False
    bias_dtype: WeightType | None = None  # None: as `dtype`
    bias_step: int = 1  # elements between neighbouring gate (up) biases; down's are dense

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.intermediate_size < 1:
            raise ValueError(f"an expert needs H >= 1 and I >= 1, got {self}")
        for name in (self.dtype, self.bias_type):
            if name not in get_args(WeightType):
                raise ValueError(f"unknown weight type {name!r}; use one of {get_args(WeightType)}")
        if self.gate_up_step not in (1, 2) or self.bias_step < 1:
            raise ValueError(f"gate_up_step is 1 or 2 and bias_step at least 1, got {self}")
        if self.gate_up_step != 1 and not self.transposed:
            raise ValueError("gate_up_step is for transposed experts; use gate_up_stride for rows")
        if self.gate_up_step == 2 and not self.gated:
            raise ValueError("gate_up_step 2 interleaves gate and up, but the expert has no gate")
        width = self.intermediate_size * self.gate_up_step if self.transposed else self.hidden_size
        shortest = width - self.gate_up_step + 1 if self.transposed else width
        if self.gate_up_stride and self.gate_up_stride < shortest:
            raise ValueError(f"gate_up_stride {self.gate_up_stride} < row length {shortest}")

    @property
    def bias_type(self) -> WeightType:
        return self.bias_dtype or self.dtype

    @property
    def row_stride(self) -> int:
        """Elements from one row of gate (up) to its next."""
        width = self.intermediate_size * self.gate_up_step if self.transposed else self.hidden_size
        return self.gate_up_stride or width

    @property
    def weight_bytes(self) -> int:
        """Bytes that one pass over the expert reads."""
        matrices = 3 if self.gated else 2
        return matrices * self.hidden_size * self.intermediate_size * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Activation:
    """f(gate) * up, or f(up) for experts without a gate. Every kind follows transformers.

    swiglu_oai    g = min(g, limit), u = clamp(u, +-limit): (u + 1) * g * sigmoid(alpha * g)
                  (gpt-oss, minimax_m3_vl)
    silu_clamp    g = min(g, limit), u = clamp(u, +-limit): silu(g) * u
                  (deepseek_v4, hy_v4, glm5_next)
    silu_cap      min(silu(g), limit) * clamp(u, +-limit)   (step3p7)
    silu_softcap  alpha*tanh(g/alpha) * sigmoid(g) * limit*tanh(u/limit)   (inkling2)
    gelu_quick    x * sigmoid(alpha * x)
    """

    kind: ActivationKind
    alpha: float = 1.702
    limit: float = inf

    def __post_init__(self) -> None:
        if self.kind not in get_args(ActivationKind):
            known = ", ".join(get_args(ActivationKind))
            raise ValueError(f"unknown activation {self.kind!r}; known are {known}")
        if not self.limit > 0:
            raise ValueError(f"an activation's limit must be positive, got {self.limit}")

    @property
    def needs_gate(self) -> bool:
        return self.kind in GATED_ONLY
