"""Decode steps of latent attention over the latents themselves, through `load` and `generate`.

Tolerance in float32: 5e-6 of the largest logit against the module's own expansion, which adds the same products in
another order (found: below 1e-6). In bf16 both ways round, at different places: neither may be further from a float32
run than 1.5 times the other.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import moe_offload
from moe_offload import latent_attention
from moe_offload.latent_attention import HANDLE, LatentAttention
from moe_offload.models import compat
from tests import tiny_models
from tests.conftest import Checkpoints

# of those, which only attend to what they expand, and which also use it for an index
ATTENDING = (
    "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash", "mistral4",
)  # fmt: skip
INDEXED = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4")
KNOWN = tiny_models.known_architectures()
TOLERANCE = 5e-6

pytestmark = pytest.mark.skipif(
    not any(hasattr(module, "expand_kv") for module in tiny_models.build("deepseek_v3").modules()),
    reason="this transformers caches keys and values, not latents",
)


def handles(model: Any) -> list[LatentAttention]:
    return [module.__dict__[HANDLE] for module in model.modules() if HANDLE in module.__dict__]


def prompts(padded: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, inputs: dict[str, torch.Tensor], new: int = 8, **more: Any) -> torch.Tensor:
    """[new, B, V] of greedy generation."""
    made = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, **more,
    )  # fmt: skip
    return torch.stack(made.logits).float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("family", [name for name in ATTENDING if name in KNOWN])
def test_steps_over_latents_are_those_of_expanded_ones(family: str, checkpoint: Checkpoints) -> None:
    model: Any = moe_offload.load(checkpoint(family), device="cpu")
    found = handles(model)
    assert found and len(found) == sum(hasattr(module, "expand_kv") for module in model.modules())
    ours = logits(model, prompts())
    assert [handle.steps for handle in found] == [7] * len(found)  # the first token comes from the prompt
    latent_attention.detach(model)
    theirs = logits(model, prompts())
    assert not handles(model) and found[0].steps == 7
    assert difference(ours, theirs) < TOLERANCE
    model.offload.close()


@pytest.mark.parametrize("family", [name for name in INDEXED if name in KNOWN])
def test_what_is_used_for_more_stays_as_it_is(family: str, checkpoint: Checkpoints) -> None:
    model: Any = moe_offload.load(checkpoint(family), device="cpu")
    assert any(hasattr(module, "expand_kv") for module in model.modules())
    assert not handles(model)
    model.offload.close()


def test_packed_projections_are_unpacked_once(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict.fromkeys(("hidden_size", "moe_intermediate_size", "intermediate_size"), 64)
    sizes |= dict(q_lora_rank=32, kv_lora_rank=32)
    folder = tiny_models.save(tiny_models.build("deepseek_v3", **sizes), tmp_path)
    # f32 activations: what is left is the order of sums
    model: Any = moe_offload.load(folder, device="cpu", weights="int8", pack_dir=tmp_path / "packs", activations="f32")
    handle = handles(model)[0]
    assert getattr(handle.module.kv_b_proj, "packed", None) is not None
    ours = logits(model, prompts())
    query = torch.zeros(1, model.config.num_attention_heads, 1)
    assert handle.halves(query)[0] is handle.halves(query)[0]
    latent_attention.detach(model)
    assert difference(ours, logits(model, prompts())) < TOLERANCE
    model.offload.close()


@pytest.mark.parametrize("assigned", [False, True])
def test_changed_weights_are_read_again(assigned: bool, checkpoint: Checkpoints) -> None:
    model: Any = moe_offload.load(checkpoint("deepseek_v2"), device="cpu")
    before = logits(model, prompts())
    with torch.no_grad():
        for handle in handles(model):
            weight = handle.module.kv_b_proj.weight
            if assigned:
                weight.data = -2.0 * weight.data
            else:
                weight.mul_(-2.0)
    ours = logits(model, prompts())
    assert difference(ours, before) > 100 * TOLERANCE
    latent_attention.detach(model)
    assert difference(ours, logits(model, prompts())) < TOLERANCE
    model.offload.close()


def test_bf16_is_as_near_to_float32_as_expanded(checkpoint: Checkpoints) -> None:
    folder = checkpoint("deepseek_v3", torch.bfloat16)
    inputs = prompts()
    exact: Any = moe_offload.load(folder, device="cpu", dtype=torch.float32)
    sequence = exact.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], dim=1)

    @torch.no_grad()
    def stepped(model: Any) -> torch.Tensor:
        """Logits of the tokens behind the prompt, each given one by one."""
        length = inputs["input_ids"].shape[1]
        out = model(input_ids=sequence[:, :length], attention_mask=mask[:, :length], use_cache=True)
        found = []
        for at in range(length, sequence.shape[1]):
            out = model(
                input_ids=sequence[:, at : at + 1], attention_mask=mask[:, : at + 1], use_cache=True,
                past_key_values=out.past_key_values,
            )  # fmt: skip
            found.append(out.logits[:, -1].float())
        return torch.stack(found)

    wanted = stepped(exact)
    model: Any = moe_offload.load(folder, device="cpu")
    ours = difference(stepped(model), wanted)
    assert handles(model)[0].steps == 8
    latent_attention.detach(model)
    theirs = difference(stepped(model), wanted)
    assert 0 < ours < 1.5 * theirs
    exact.offload.close()
    model.offload.close()


def test_another_implementation_expands(checkpoint: Checkpoints) -> None:
    model: Any = moe_offload.load(checkpoint("deepseek_v3"), device="cpu")
    ours = logits(model, prompts())
    model.set_attn_implementation("eager")
    theirs = logits(model, prompts())
    assert handles(model)[0].steps == 7
    assert difference(ours, theirs) < TOLERANCE
    model.set_attn_implementation("sdpa")
    logits(model, prompts())
    assert handles(model)[0].steps == 14
    model.offload.close()


def test_what_the_kernel_does_not_know_is_expanded(checkpoint: Checkpoints) -> None:
    """A mask with holes, a static cache, several positions: the outcome is the same, by the other way."""
    model: Any = moe_offload.load(checkpoint("deepseek_v3"), device="cpu")
    inputs = prompts()
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -1]
        cache = StaticCache(config=model.config, max_cache_len=12)
        first = model(**{name: each[:, :8] for name, each in inputs.items()}, past_key_values=cache, use_cache=True)
        last = model(
            input_ids=inputs["input_ids"][:, 8:], attention_mask=inputs["attention_mask"],
            past_key_values=first.past_key_values, use_cache=True,
        )  # fmt: skip
    assert difference(last.logits[:, -1], wanted) < TOLERANCE
    holes = inputs["attention_mask"].clone()
    holes[1, 4] = 0
    before = handles(model)[0].steps
    ours = logits(model, inputs | {"attention_mask": holes})
    assert handles(model)[0].steps == before
    latent_attention.detach(model)
    assert difference(ours, logits(model, inputs | {"attention_mask": holes})) < TOLERANCE
    model.offload.close()


def test_adapters_and_hooks_are_heard(checkpoint: Checkpoints) -> None:
    class Adapter(torch.nn.Linear):
        """Computes more than its weight says."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(input)

    model: Any = moe_offload.load(checkpoint("deepseek_v2"), device="cpu")
    found = handles(model)
    heard: list[int] = []
    projection = found[1].module.kv_b_proj
    removable = found[0].module.kv_b_proj.register_forward_hook(lambda *_: heard.append(1))
    adapter = Adapter(projection.in_features, projection.out_features, bias=False)
    adapter.weight = projection.weight
    found[1].module.kv_b_proj = adapter
    ours = logits(model, prompts())
    assert [handle.steps for handle in found] == [0, 0, 7] and len(heard) == 8
    removable.remove()
    latent_attention.detach(model)
    assert difference(ours, logits(model, prompts())) < TOLERANCE
    assert len(latent_attention.attach(model, model.offload.team)) == 2
    model.offload.close()


def test_copies_have_their_own(checkpoint: Checkpoints) -> None:
    model: Any = moe_offload.load(checkpoint("deepseek_v2"), device="cpu")
    other = copy.deepcopy(model)
    assert len(handles(other)) == len(handles(model))
    for one, two in zip(handles(model), handles(other), strict=True):
        assert two is not one and two.module is not one.module and two.config.real is not one.config.real
    assert difference(logits(other, prompts()), logits(model, prompts())) == 0
    assert all(handle.steps == 7 for handle in [*handles(model), *handles(other)])
    model.offload.close()


def test_detached_models_have_no_trace(checkpoint: Checkpoints) -> None:
    model: Any = moe_offload.load(checkpoint("deepseek_v2"), device="cpu")
    attention = handles(model)[0].module
    plain = model.offload.detach()
    assert not handles(plain) and "expand_kv" not in attention.__dict__
    assert attention.config is plain.config and plain.config._attn_implementation == "sdpa"
    logits(plain, prompts())


def test_the_formulas_are_tried_on_the_module(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that expands in another way is left alone."""
    model: Any = moe_offload.load(checkpoint("deepseek_v2"), device="cpu")
    kind: Any = type(handles(model)[0].module)
    latent_attention.detach(model)
    usual = kind.expand_kv
    for changed in (
        lambda self, latent, rope: tuple(2 * each for each in usual(self, latent, rope)),
        lambda self, latent, rope: (usual(self, latent, rope)[0], usual(self, latent, rope)[1].flip(-1)),
        lambda self, latent, rope: (usual(self, latent, rope)[0].roll(1, -1), usual(self, latent, rope)[1]),
    ):
        monkeypatch.setattr(kind, "expand_kv", changed)
        assert latent_attention.attach(model, model.offload.team) == ()
    monkeypatch.setattr(kind, "expand_kv", usual)
    assert len(latent_attention.attach(model, model.offload.team)) == 3
    model.offload.close()


def test_a_forward_that_does_more_is_told_apart() -> None:
    kind = type(next(m for m in tiny_models.build("deepseek_v3").modules() if hasattr(m, "expand_kv")))
    assert compat.only_attends_to_what_it_expands(kind)
    assert not compat.only_attends_to_what_it_expands(torch.nn.Linear)


@pytest.mark.parametrize("heads", [1, 5, 16, 17, 24, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_to_attend(heads: int, dtype: torch.dtype, checkpoint: Checkpoints) -> None:
    """The kernel, in groups of heads, and torch's products as a device runs them, against float64."""
    model: Any = moe_offload.load(checkpoint("deepseek_v2"), device="cpu")
    handle, rank, rotary = handles(model)[0], 32, 16
    random = torch.Generator().manual_seed(heads)
    inner, rotated = (torch.randn(3, heads, size, generator=random).to(dtype) for size in (rank, rotary))
    latent, rope = (torch.randn(3, 1, 21, size, generator=random).to(dtype) for size in (rank, rotary))
    mask = torch.ones(3, 1, 1, 21, dtype=torch.bool)
    mask[1, ..., :20] = mask[2, ..., :6] = False
    scores = inner.double() @ latent[:, 0].double().transpose(1, 2) + rotated.double() @ rope[:, 0].double().transpose(
        1, 2
    )
    weights = (0.3 * scores).masked_fill(~mask[:, 0], float("-inf")).softmax(-1)
    wanted = weights @ latent[:, 0].double()
    # the kernel multiplies in f32; bf16 weights are rounded to 8 bits; f16 products of torch's are rounded to 11
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for attend in (handle._on_cpu, handle._on_device):
        for given in (mask, additive):
            found = attend(inner, rotated, latent, rope, given, 0.3)
            assert found is not None
            assert difference(found.double(), wanted) < tolerance
    model.offload.close()
