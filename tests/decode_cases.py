"""What the tests of the fused decode step share: pairs of models, and proof that a step was fused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

import moe_offload
from moe_offload.decode_plan import LayerPlan
from moe_offload.model_plan import ModelPlan
from tests import tiny_models

FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "phimoe", "gpt_oss")
# Wide enough for packed linears: k_proj has 32 outputs. gpt-oss: every layer sees everything.
SIZES: dict[str, Any] = dict(
    hidden_size=64, moe_intermediate_size=64, intermediate_size=64, head_dim=16, max_position_embeddings=1024
)
EXTRA: dict[str, dict[str, Any]] = {
    "gpt_oss": dict(layer_types=["full_attention"] * 3),
    "mixtral": dict(sliding_window=None),
}
# Both sides add the same products in f32, in another order: over three layers that is some 1e-6 of the largest logit.
TOLERANCE = 2e-5


class Pair(NamedTuple):
    """The same checkpoint, its decode step fused and not."""

    fused: PreTrainedModel
    plain: PreTrainedModel


def save(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A checkpoint whose norms, biases and sinks are no ones and zeros."""
    model = tiny_models.build(model_type, dtype, **(SIZES | EXTRA.get(model_type, {}) | overrides))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(*((0.5, 1.5) if "norm" in name and "bias" not in name else (-0.3, 0.3)))
    return tiny_models.save(model, folder)


def load_pair(folder: Path, **options: Any) -> Pair:
    fused, plain = (
        moe_offload.load(folder, activations="f32", fused_decode=wanted, **options) for wanted in (True, False)
    )
    assert fused.offload.fused_layers == len(fused.model.layers) and plain.offload.fused_layers == 0
    return Pair(fused, plain)


@contextmanager
def counted_runs() -> Iterator[list[LayerPlan]]:
    """The plans whose steps counted while this is entered, in order."""
    one, all_of_them, found = LayerPlan.run, ModelPlan.totals, []

    def run(self: LayerPlan, *args: Any) -> None:
        found.append(self)
        one(self, *args)

    def totals(self: ModelPlan) -> tuple[int, int, int]:  # asked for once, after a step that is not thrown away
        found.extend(self.layers)
        return all_of_them(self)

    LayerPlan.run, ModelPlan.totals = run, totals  # type: ignore[assignment,method-assign]
    try:
        yield found
    finally:
        LayerPlan.run, ModelPlan.totals = one, all_of_them  # type: ignore[method-assign]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether `a` is `b` within a share of b's largest value."""
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())


def generate(model: PreTrainedModel, ids: torch.Tensor, **ways: Any) -> Any:
    """generate(), greedy unless told otherwise, 8 tokens, with logits and cache."""
    kept: dict[str, Any] = dict(
        max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    return model.generate(ids, **(kept | ways))


def check_generation(pair: Pair, ids: torch.Tensor, tolerance: float = TOLERANCE, **ways: Any) -> int:
    """Both models give the same tokens, logits and cache; the number of layers that ran fused."""
    with counted_runs() as runs:
        found = generate(pair.fused, ids, **ways)
        fused = len(runs)
        expected = generate(pair.plain, ids, **ways)
        assert len(runs) == fused
    assert found.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert close(a, b, tolerance)
    check_caches(found.past_key_values, expected.past_key_values, tolerance)
    return fused


def check_caches(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert type(a) is type(b) and a.keys.shape == b.keys.shape and a.keys.dtype == b.keys.dtype
        assert close(a.keys, b.keys, tolerance) and close(a.values, b.values, tolerance)
