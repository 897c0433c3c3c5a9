"""Every supported architecture: the same logits and the same greedy tokens as transformers' eager experts.

Tolerance in float32: 5e-5 of the largest logit. Both sides add the same products in f32, in another order; over K +
2 sums of at most 48 terms that is some 1e-6 at a layer, and the models with linear attention carry it through a
recurrence.

In bf16 and f16 eager rounds after every step and the engine only once per layer, so they differ by design. There
the yardstick is the same checkpoint computed in float32: the engine must not be further from it than eager is.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import moe_offload
from moe_offload.models.spec import model_class
from tests import tiny_models
from tests.conftest import Checkpoints

F32_TOLERANCE = 5e-5

# No causal language model in transformers: a bare text model, or a token classifier.
HEADLESS = ("qwen3_vl_moe_text", "muse_spark_text", "minimax_m3_vl_text", "openai_privacy_filter")

# One for each way weights lie on disk and each kind of kernel.
LOW_PRECISION = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "aria_text",
    "nemotron_h",
    "gemma4_text",
    "deepseek_v2",
    "llama4_text",
)


def load_reference(folder: Path, ours: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    reference = type(ours).from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    assert reference.dtype == dtype
    return reference


def output(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids)
    return result.logits if "logits" in result else result.last_hidden_state  # type: ignore[no-any-return]


def greedy(model: PreTrainedModel, ids: torch.Tensor) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.generate(ids, generation_config=config).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", tiny_models.known_architectures())
def test_float32(model_type: str, tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.build(model_type), tmp_path)
    ids = tiny_models.token_ids()
    ours = moe_offload.load(folder)
    reference = load_reference(folder, ours, torch.float32)

    expected, found = output(reference, ids), output(ours, ids)
    assert (expected - found).abs().max() <= F32_TOLERANCE * expected.abs().max()
    if ours.can_generate():
        assert greedy(ours, ids) == greedy(reference, ids)
    else:
        assert model_type in HEADLESS

    assert not any(p.is_meta for p in ours.parameters())
    left = {name for name, _ in ours.named_parameters()}
    gone = {name for name, _ in reference.named_parameters()} - left
    engine = ours.offload
    assert gone == {
        f"{layer.path}.{name}"
        for layer in engine.spec.layers
        for name, _ in reference.get_submodule(layer.path).named_parameters(recurse=False)
    }
    assert engine.spec.total_params == sum(p.numel() for p in reference.parameters()) - _identities(reference)
    assert engine.statistics.snapshot().rows > 0
    engine.close()


def _identities(model: PreTrainedModel) -> int:
    """longcat_flash's parameters have rows for identity experts, which no checkpoint needs."""
    return sum(
        module.zero_expert_num * module.gate_up_proj[0].numel()
        for module in model.modules()
        if hasattr(module, "zero_expert_num") and getattr(module, "gate_up_proj", None) is not None
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", [name for name in LOW_PRECISION if name in tiny_models.known_architectures()])
def test_low_precision(model_type: str, dtype: torch.dtype, checkpoint: Checkpoints) -> None:
    folder = checkpoint(model_type, dtype)
    ids = tiny_models.token_ids(4, 23)
    ours = moe_offload.load(folder)
    assert ours.dtype == dtype
    truth = output(load_reference(folder, ours, torch.float32), ids)
    eager_error = (output(load_reference(folder, ours, dtype), ids).float() - truth).abs()
    our_error = (output(ours, ids).float() - truth).abs()
    # The mean over ~12 000 logits; single logits jump where rounding moves a token to another expert.
    assert our_error.mean() <= 1.1 * eager_error.mean()
    ours.offload.close()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
def test_rows_are_tokens_times_top_k(model_type: str, checkpoint: Checkpoints) -> None:
    model = moe_offload.load(checkpoint(model_type))
    ids = tiny_models.token_ids()
    output(model, ids)
    rows = model.offload.statistics.snapshot().rows
    expected = ids.numel() * sum(layer.top_k for layer in model.offload.spec.layers)
    # longcat_flash's identity experts are no rows of the engine.
    assert 0 < rows < expected if model_type == "longcat_flash" else rows == expected
    model.offload.close()


def test_gemm_and_kernel_agree(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe")
    ids = tiny_models.token_ids(3, 40)
    outputs = []
    for rows in (1, 4, 10_000):
        model = moe_offload.load(folder, gemm_rows=rows)
        outputs.append(output(model, ids))
        counts = model.offload.statistics.snapshot()
        assert (counts.torch_experts == counts.experts_run) == (rows == 1)
        assert (counts.torch_experts == 0) == (rows == 10_000)
        model.offload.close()
    for other in outputs[1:]:
        assert (outputs[0] - other).abs().max() <= F32_TOLERANCE * outputs[0].abs().max()


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(moe_offload.UnsupportedModelError, match="dense model.*supported is"):
        moe_offload.load(tmp_path)


@pytest.mark.parametrize("model_type", ["jetmoe", "dbrx"])
def test_an_undispatched_mixture_is_refused(model_type: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(_small(model_type))
    model.save_pretrained(tmp_path)
    with pytest.raises(moe_offload.UnsupportedModelError, match="experts interface; supported is"):
        moe_offload.load(tmp_path)


def _small(model_type: str) -> "object":
    from transformers import DbrxConfig, JetMoeConfig

    if model_type == "jetmoe":
        return JetMoeConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=4,
            intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
    return DbrxConfig(
        vocab_size=64, d_model=16, n_heads=2, n_layers=1, max_seq_len=64,
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=1, rope_theta=10000.0),
    )  # fmt: skip


def test_model_class_follows_architectures(checkpoint: Checkpoints) -> None:
    """A configuration that AutoModelForCausalLM does not know is loaded as what its checkpoint says it is."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint("qwen3_vl_moe_text"))
    assert issubclass(model_class(config), nn.Module)
    assert model_class(config).__name__ == "Qwen3VLMoeTextModel"


def test_what_is_tied_counts_once(tmp_path: Path) -> None:
    """Also for a loaded model, whose engine reads its specification before head and embedding are one."""
    from moe_offload.models.spec import MoeSpec

    counts = {}
    for tied in (True, False):
        folder = tiny_models.save(tiny_models.build("qwen3_moe", tie_word_embeddings=tied), tmp_path / str(tied))
        model = moe_offload.load(folder, device="cpu")
        counts[tied] = model.offload.spec.total_params
        assert counts[tied] == MoeSpec.from_hf(model.config).total_params
        embedding = model.get_input_embeddings().weight.numel()
        model.offload.close()
    assert counts[False] - counts[True] == embedding
