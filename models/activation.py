"""Which activation an experts module computes: found by asking the module, not by its name.

Candidates are built from the parameters that modules carry (alpha, limit, ...); the one whose values agree with the
module's own `_apply_gate` (or `act_fn`) on a grid of probe values is the answer. A module that computes something
else matches none, and its layer takes the torch path, which calls the module itself: never a silently different
function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from moe_offload.cpu_kernels.layout import Activation

# Around zero, in the bend, beyond every clamp in use (7 and 10), and where exp() would overflow. The step is
# irregular on purpose, so that no candidate agrees by symmetry.
_PROBE = torch.cat([torch.linspace(-4.03, 4.07, 61), torch.tensor([-95.0, -31.5, -12.3, -7.2, 7.4, 11.9, 33.1, 97.0])])


@dataclass(frozen=True, slots=True)
class GateProbe:
    """What a module does between its projections.

    `interleaved`: gate and up alternate in the module's own gate_up. `activation`: the kernels' name for it, or None.
    """

    activation: Activation | None
    interleaved: bool = False


def evaluate(activation: Activation, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """`activation` in torch (float32): the definition that the kernels are held to. `up` is None without a gate."""
    kind, limit = activation.kind, activation.limit
    if kind == "swiglu_oai":
        assert up is not None
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
    if kind == "silu_clamp":
        assert up is not None
        return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    if kind == "silu_cap":
        assert up is not None
        return functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    if kind == "silu_softcap":
        assert up is not None
        capped = activation.alpha * torch.tanh(gate / activation.alpha)
        return capped * torch.sigmoid(gate) * limit * torch.tanh(up / limit)
    if kind == "gelu_quick":
        value = gate * torch.sigmoid(activation.alpha * gate)
    elif kind == "silu":
        value = functional.silu(gate)
    elif kind == "gelu":
        value = functional.gelu(gate)
    elif kind == "gelu_tanh":
        value = functional.gelu(gate, approximate="tanh")
    elif kind == "relu":
        value = functional.relu(gate)
    elif kind == "relu2":
        value = functional.relu(gate).square()
    else:
        raise ValueError(f"no such activation: {kind}")
    return value if up is None else value * up


def probe_gate(module: nn.Module) -> GateProbe:
    """Find what `module` (a dispatched or adapted experts module, weights not needed) computes between its
    projections.
    """
    candidates = _candidates(module)
    if not getattr(module, "has_gate", True):
        found = _call(partial(module.act_fn, _PROBE))  # type: ignore[arg-type,operator,misc]
        return GateProbe(_first_match(candidates, _PROBE, None, found))
    gate, up = (grid.reshape(-1) for grid in torch.meshgrid(_PROBE, _PROBE, indexing="ij"))
    for interleaved in (False, True):
        # Rows of I = 2: with I = 1 the two arrangements could not be told apart.
        half = len(gate) // 2
        a, b = slice(0, half), slice(half, 2 * half)
        columns = (gate[a], up[a], gate[b], up[b]) if interleaved else (gate[a], gate[b], up[a], up[b])
        found = _call(partial(_apply_gate, module, torch.stack(columns, -1)))
        if found is None or found.shape != (half, 2):
            continue
        match = _first_match(candidates, gate[: 2 * half], up[: 2 * half], torch.cat([found[:, 0], found[:, 1]]))
        if match is not None:
            return GateProbe(match, interleaved)
    return GateProbe(None, not getattr(module, "is_concatenated", True))


def _apply_gate(module: nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)  # type: ignore[operator, no-any-return]
    gate, up = gate_up.chunk(2, -1)
    return module.act_fn(gate) * up  # type: ignore[operator, no-any-return]


def _candidates(module: nn.Module) -> list[Activation]:
    def numbers(*names: str) -> list[float]:
        values = (getattr(module, name, None) for name in names)
        return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]

    limits = numbers("limit", "swiglu_limit")
    alphas = numbers("alpha", "swiglu_alpha") or [1.702]
    plain = [Activation(kind) for kind in ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2")]
    if not getattr(module, "has_gate", True):
        return plain
    clamped = [Activation(kind, limit=limit) for kind in ("silu_clamp", "silu_cap") for limit in limits]
    oai = [Activation("swiglu_oai", alpha=alpha, limit=limit) for alpha in alphas for limit in limits]
    act_fn = getattr(module, "act_fn", None)
    caps = [getattr(getattr(act_fn, name, None), "softcap", 0.0) for name in ("gate_softcap", "up_softcap")]
    soft = [Activation("silu_softcap", alpha=float(caps[0]), limit=float(caps[1]))] if all(caps) else []
    return plain + clamped + oai + soft


def _call(function: Callable[[], object]) -> torch.Tensor | None:
    """The probed function may need what only a real forward has (weights, a config): then it is not one we know."""
    try:
        with torch.no_grad(), torch.device("cpu"):
            result = function()
    except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError):
        return None
    return result.float() if isinstance(result, torch.Tensor) and not result.is_meta else None


def _first_match(
    candidates: list[Activation], gate: torch.Tensor, up: torch.Tensor | None, found: torch.Tensor | None
) -> Activation | None:
    if found is None:
        return None
    for candidate in candidates:
        # float32 against float32: 1e-5 is far below the difference between any two candidates on the grid
        # (gelu and its tanh form differ by 5e-4).
        if torch.allclose(evaluate(candidate, gate, up), found, rtol=1e-5, atol=1e-5):
            return candidate
    return None
