"""Latent attention (MLA) of a decode step, over the latents themselves.

What DeepSeek's attention and its kin cache of a position is one latent [R] and one rotated key [Dr] for all heads.
transformers expands all of them into keys and values of every head at every step: 2 H (Dn + Dv) R operations for each
position, which at some thousand positions is more than the rest of the model. But a score is linear in the latent, so
the matrix that makes the keys can be applied to the query instead, and the one that makes the values to what the
softmax's weights have summed up (DeepSeek-V2, arXiv 2405.04434, section 2.1.2):

    scores = (Wk^T q_nope) . latent + q_rot . rope        out = Wv (sum of weights . latents)

That is an attention with one KV head, keys [latent, rope] and values that are the keys' first R elements. It takes one
query position of each sequence; prompts are expanded as before, for many queries that is less.

How a module is led here: its `config` names our attention function, its `expand_kv` hands the latents on unexpanded,
and the function either computes with them or expands them for the function that stood there before. Both only as long
as the model's real config names the implementation that was found when it was loaded.

Letters: B sequences, H heads, T positions, R size of a latent, Dn and Dr of a query's two parts, Dv of a value.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_offload.attention_layers import NAMES
from moe_offload.cpu_kernels.attention import AttentionShape
from moe_offload.cpu_kernels.team import Team
from moe_offload.decode_modules import WEIGHT_TYPES
from moe_offload.device_attention import PlainObserver, SharedKernels, is_plain_step, stored_array
from moe_offload.models import compat
from moe_offload.models.packed_linear import PackedLinear

NAME = "moe_offload_latent"
HANDLE = "_moe_offload_latent"
_GROUP = 16  # most heads that share a pass over the keys: as many outputs are kept at a time
_ALIKE = 0.03  # of the largest result: what rounding to bf16 on the way may take


class _OtherName:
    """A module's config with our attention function's name while the real one has the name found at loading."""

    def __init__(self, config: Any, implementation: str) -> None:
        self.real, self.found = config, implementation

    @property
    def _attn_implementation(self) -> Any:
        name = self.real._attn_implementation
        return NAME if _former(name) == self.found else name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("real", "found"):  # while it is being copied
            raise AttributeError(name)
        return getattr(self.real, name)


class LatentAttention:
    """One module's attention."""

    def __init__(self, module: Any, config: _OtherName, shared: SharedKernels) -> None:
        self.module, self.config, self.shared = module, config, shared
        self.former = compat.attention_function(module, config.found)
        self.steps = 0  # that ran over latents
        self._halves: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatentAttention":
        """A copied model shares the threads."""
        module, config = copy.deepcopy(self.module, memo), copy.deepcopy(self.config, memo)
        return LatentAttention(module, config, self.shared)

    def expand(self, latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In the place of the module's `expand_kv`: [B, 1, T, R] and [B, 1, T, Dr] as they are, where ours is next."""
        if self.config._attn_implementation == NAME:
            return latent, rope
        return self._expanded(latent, rope)

    def _expanded(self, latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expanded: tuple[torch.Tensor, torch.Tensor] = type(self.module).expand_kv(self.module, latent, rope)
        return expanded

    def __call__(
        self, query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if is_plain_step(query, latent, rope, kwargs) and _is_plain_linear(self.module.kv_b_proj):
            found = self._step(query, latent, rope, mask, kwargs.get("scaling"))
            if found is not None:
                self.steps += 1
                return found, None
        keys, values = self._expanded(latent, rope)
        result: tuple[torch.Tensor, torch.Tensor | None] = self.former(self.module, query, keys, values, mask, **kwargs)
        return result

    def _step(
        self, query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """[B, 1, H, Dv] of queries [B, H, 1, Dn + Dr]; None for a mask that is not known here."""
        if not self._knows(query, latent, mask):
            return None
        query = query[:, :, 0].detach()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys_half, values_half = self.halves(query)
        compute = keys_half.dtype
        nope, rotated = torch.split(query, [keys_half.shape[2], rope.shape[-1]], dim=-1)
        inner = torch.bmm(keys_half, nope.to(compute).permute(1, 2, 0)).permute(2, 0, 1)  # [B, H, R]
        attend = self._on_cpu if query.device.type == "cpu" else self._on_device
        summed = attend(inner, rotated, latent, rope, mask, scale)
        out = torch.bmm(values_half, summed.to(compute).permute(1, 2, 0))  # [H, Dv, B]
        return out.permute(2, 0, 1)[:, None].to(query.dtype)

    def _knows(self, query: torch.Tensor, latent: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """On the CPU masks without holes, on a device all that are the same for all heads."""
        length = latent.shape[2]
        if query.device.type == "cpu":
            return self.shared.starts(mask, len(query), length) is not None
        return mask is None or (mask.dim() == 4 and mask.shape[1:3] == (1, 1) and mask.shape[3] >= length)

    def _on_cpu(
        self, inner: torch.Tensor, rotated: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor,
        mask: torch.Tensor | None, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """[B, H, R] f32 by our kernel, which reads every position once for up to 16 heads."""
        batch, heads, rank = inner.shape
        length = latent.shape[2]
        groups = -(-heads // _GROUP)
        groups = groups if heads % groups == 0 else heads
        keys = torch.cat((latent, rope), dim=-1).detach().expand(-1, groups, -1, -1)
        bf16 = keys.dtype == torch.bfloat16
        kernel = self.shared.kernel(
            AttentionShape(
                heads, groups, keys.shape[3], rank, WEIGHT_TYPES[keys.dtype], scale=scale, q_is_bf16=bf16,
                bf16_weights=bf16,
            )
        )  # fmt: skip
        # rounded as a model of this type rounds its queries
        queries = torch.cat((inner.to(keys.dtype), rotated), dim=-1).to(torch.float32).contiguous()
        out = torch.empty((batch, heads, rank), dtype=torch.float32)
        kernel(
            queries.numpy(), stored_array(keys), stored_array(keys[..., :rank]), np.full(batch, length, np.int64),
            out.numpy(), self.shared.team, starts=self.shared.starts(mask, batch, length),
        )  # fmt: skip
        return out

    @staticmethod
    def _on_device(
        inner: torch.Tensor, rotated: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor,
        mask: torch.Tensor | None, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """[B, H, R] by torch's products. Queries are scaled before them: scores of float16 must not overflow."""
        latent, rope, length = latent[:, 0], rope[:, 0], latent.shape[2]
        scores = torch.bmm(inner * scale, latent.transpose(1, 2)) + torch.bmm(rotated * scale, rope.transpose(1, 2))
        scores = scores.float()
        if mask is not None:
            seen = mask[:, 0, :, :length]
            hidden = torch.finfo(torch.float32).min
            scores = scores.masked_fill(~seen, hidden) if seen.dtype == torch.bool else scores + seen
        return torch.bmm(scores.softmax(dim=-1).to(latent.dtype), latent)

    def halves(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """kv_b_proj as [H, R, Dn] and [H, Dv, R]: on a device views, on the CPU copies in f32, which torch multiplies
        well on every one; made anew when the weights have changed.
        """
        module, linear = self.module, self.module.kv_b_proj
        key: tuple[Any, ...]
        if isinstance(linear, PackedLinear):  # whose `weight` is a new tensor every time
            key = linear.packed, linear.dtype, like.device
        else:
            weight = linear.weight
            # the address too: what is assigned to `data` has no version of its own
            key = weight, weight.dtype, like.device, 0 if weight.is_inference() else weight._version, weight.data_ptr()
        known = self._halves
        if known is not None and known[0][0] is key[0] and known[0][1:] == key[1:]:
            return known[1], known[2]
        whole = linear.weight.detach().to(like.device)
        both = whole.view(like.shape[1], -1, linear.in_features).split([module.qk_nope_head_dim, module.v_head_dim], 1)
        keys_half, values_half = both[0].transpose(1, 2), both[1]
        if like.device.type == "cpu":
            keys_half, values_half = (each.to(torch.float32).contiguous() for each in (keys_half, values_half))
        self._halves = key, keys_half, values_half
        return keys_half, values_half


def _is_plain_linear(linear: Any) -> bool:
    """Whether its weight says what it does: no adapter in its place, nobody listening, nothing elsewhere."""
    if type(linear) not in (nn.Linear, PackedLinear) or hasattr(linear, "_hf_hook"):
        return False
    if linear.bias is not None or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    return isinstance(linear, PackedLinear) or linear.weight.device.type != "meta"


def _former(name: str) -> str:
    """The implementation that a name of ours stands for."""
    return next((former for former, ours in NAMES.items() if ours == name), name)


def _expands_as_known(handle: LatentAttention) -> bool:
    """Whether the module's own expansion is that of the formulas above: tried on a few latents."""
    module, weight = handle.module, handle.module.kv_b_proj.weight
    heads = weight.shape[0] // (module.qk_nope_head_dim + module.v_head_dim)
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(weight.device, weight.dtype)

    latent, rope = noise(1, 1, 3, weight.shape[1]), noise(1, 1, 3, module.qk_rope_head_dim)
    with torch.no_grad():
        keys, values = handle._expanded(latent, rope)
        query = noise(1, heads, 1, keys.shape[3])
        keys_half, values_half = (each.float() for each in handle.halves(query[:, :, 0]))
        inner = torch.einsum("hrn,hn->hr", keys_half, query[0, :, 0, : keys_half.shape[2]].float())
        scores = inner @ latent[0, 0].float().T + query[0, :, 0, keys_half.shape[2] :].float() @ rope[0, 0].float().T
        made = torch.einsum("hvr,tr->htv", values_half, latent[0, 0].float())
        expected = (query.float() @ keys.float().transpose(2, 3))[0, :, 0]
    if expected.shape != scores.shape or values.shape[1:] != made.shape:
        return False
    pairs = (scores, expected), (made, values[0].float())
    return all(bool(((a - b).abs().max() <= _ALIKE * b.abs().max()).item()) for a, b in pairs)


def attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The attention of `module`; the signature is that of transformers' attention functions."""
    handle: Callable[..., Any] = module.__dict__[HANDLE]
    result: tuple[torch.Tensor, torch.Tensor | None] = handle(query, key, value, attention_mask, **kwargs)
    return result


def attach(model: nn.Module, team: Team) -> tuple[LatentAttention, ...]:
    """Let decode steps of latent attention run over latents; what was attached, empty for models without.

    Modules that do more with what they expand than to attend over it (an index of positions), or expand in another
    way, stay as they are.
    """
    if any(compat.asks_for_sdpa_by_name(each) for each in {type(module) for module in model.modules()}):
        return ()
    shared = SharedKernels(PlainObserver(), team, None)
    made = []
    known: dict[tuple[Any, ...], bool] = {}  # one module of each kind is tried: unpacking weights takes its time
    module: Any
    for module in model.modules():
        if not compat.only_attends_to_what_it_expands(type(module)):
            continue
        implementation = _former(module.config._attn_implementation)
        if implementation not in NAMES or not _is_plain_linear(module.kv_b_proj):
            continue
        handle = LatentAttention(module, _OtherName(module.config, implementation), shared)
        weight = module.kv_b_proj.weight
        kind = type(module), weight.shape, weight.dtype, module.qk_nope_head_dim, module.v_head_dim
        if kind not in known:
            known[kind] = _expands_as_known(handle)
        if not known[kind]:
            continue
        module.__dict__.update({HANDLE: handle, "expand_kv": handle.expand, "config": handle.config})
        made.append(handle)
    return tuple(made)


def detach(model: nn.Module) -> None:
    """Inverse of `attach`; harmless without one."""
    for module in model.modules():
        handle = module.__dict__.pop(HANDLE, None)
        if handle is not None:
            del module.__dict__["expand_kv"]
            module.__dict__["config"] = handle.config.real


compat.register_attention_function(NAME, attention_forward, "sdpa")
