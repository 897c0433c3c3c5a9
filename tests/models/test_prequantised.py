"""Checkpoints that are quantised already: FP8 in blocks and MXFP4, against transformers' own dequantising load.

The dequantised weights must be equal bit for bit (shown by detaching). Logits are compared in bf16, the only dtype
in which transformers runs both: a rounding (2^-8) a layer, and now and then one that moves a token to another
expert on either side, so the mean counts: 2 % of the mean logit.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_offload
from tests import tiny_models

TOLERANCE = 0.02


def _rewrite(folder: Path, quantization: Mapping[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def fp8_checkpoint(folder: Path, block: int = 16) -> Path:
    """Qwen3-MoE with every projection in float8_e4m3 and one f32 scale per block x block weights."""
    model = tiny_models.build("qwen3_moe", torch.bfloat16, hidden_size=64, moe_intermediate_size=32, head_dim=16)
    tiny_models.save(model, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in _tensors(folder).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        rows, cols = value.shape
        blocks = value.float().view(rows // block, block, cols // block, block)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view(rows, cols).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    quantization = {
        "quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    return _rewrite(folder, quantization, tensors)


def mxfp4_checkpoint(folder: Path) -> Path:
    """gpt-oss as published: experts in blocks of 16 bytes and a scale byte, biases and the rest in bf16."""
    model = tiny_models.build("gpt_oss", torch.bfloat16, hidden_size=64, intermediate_size=64)
    tiny_models.save(model, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = _tensors(folder)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, out = tensors.pop(name).shape
        shape = (experts, out, inner // 32)
        tensors[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        tensors[name + "_scales"] = torch.randint(120, 126, shape, generator=generator).to(torch.uint8)
    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    }  # fmt: skip
    return _rewrite(folder, quantization, tensors)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_same_as_the_dequantising_load(kind: str, tmp_path: Path) -> None:
    folder = fp8_checkpoint(tmp_path) if kind == "fp8" else mxfp4_checkpoint(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager")
    options = dict(activations="f32", dense="stored", pack_dir=tmp_path / "packs")
    ours = moe_offload.load(folder, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    assert {weights.format for weights in ours.offload._skeleton.weights.values()} == {kind}
    assert not any("experts" in name and p.dim() >= 3 for name, p in ours.named_parameters())
    ids = tiny_models.token_ids()
    with torch.no_grad():
        expected, found = reference(ids).logits, ours(ids).logits
    assert (expected - found).float().abs().mean() <= TOLERANCE * expected.float().abs().mean()

    plain = ours.offload.detach()
    assert set(plain.state_dict()) == set(reference.state_dict())
    for name, value in reference.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    folder = fp8_checkpoint(tmp_path)
    tensors = _tensors(folder)
    gone = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(moe_offload.CheckpointError, match=gone):
        moe_offload.load(folder)


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.build("qwen3_moe"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(moe_offload.UnsupportedModelError, match="'gptq'; supported are bf16"):
        moe_offload.load(folder)
