"""Linears outside of the experts, packed: what they compute, which they are, and that they leave no trace."""

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

import moe_offload
from moe_offload import dense_choice, dense_conversion
from moe_offload.models.packed_linear import PackedLinear
from tests import tiny_models
from tests.conftest import Checkpoints
from tests.models.test_prequantised import fp8_checkpoint, mxfp4_checkpoint

# Wide enough that most linears have 32 inputs and outputs.
SIZES: dict[str, Any] = dict(hidden_size=64, intermediate_size=96)
ARCHITECTURES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe", "phimoe", "olmoe")
Load = Callable[..., PreTrainedModel]


def wide(arch: str) -> dict[str, Any]:
    return SIZES | (dict(q_lora_rank=32, kv_lora_rank=32) if arch == "deepseek_v3" else {})


@pytest.fixture
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", **SIZES)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.token_ids())[0].float()  # type: ignore[no-any-return]


def packed_linears(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def with_unpacked_weights(model: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """`plain` with the weights that the packed linears of `model` stand for."""
    for path, packed in packed_linears(model).items():
        linear = plain.get_submodule(path)
        assert type(linear) is nn.Linear
        linear.weight = nn.Parameter(packed.weight + 0)
    return plain


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_those_of_the_unpacked_weights(arch: str, checkpoint: Checkpoints) -> None:
    """Nothing but the order of additions may differ: f32 sums of up to a hundred terms, through three layers."""
    folder = checkpoint(arch, **wide(arch))
    ours = moe_offload.load(folder, dense="int8", activations="f32")
    assert len(packed_linears(ours)) >= 7
    same = with_unpacked_weights(ours, moe_offload.load(folder))
    torch.testing.assert_close(logits(ours), logits(same), rtol=1e-4, atol=1e-4)
    ids = tiny_models.token_ids(1, 5)
    generated = [model.generate(ids, max_new_tokens=4, do_sample=False) for model in (ours, same)]
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    ("format_", "activations", "most"), [("int8", "int16", 0.022), ("int8", "auto", 0.035), ("int4", "auto", 0.3)]
)
def test_logits_are_close_to_the_stored_ones(format_: Any, activations: Any, most: float, folder: Path) -> None:
    """A group's 32 normal weights reach about 2.1 deviations, so an int8 step is 2.1 / 127 of one and its rounding
    errs by 1 / sqrt(12) of that: 0.5 % for a product. The 13 products that follow one another here (q, k, v, o in three
    layers, and the head) add up to sqrt(13) * 0.5 % = 1.8 %. Activations of 8 bits err as much again, at most. int4
    rounds by 8 % (test_packing.py), which comes to 29 %.
    """
    expected = logits(moe_offload.load(folder))
    ours = moe_offload.load(folder, dense=format_, activations=activations)
    off = (logits(ours) - expected).abs().mean() / expected.abs().mean()
    assert ours.offload.dense == format_
    assert 1e-4 < off < most


def test_auto_follows_the_experts(folder: Path, tmp_path: Path) -> None:
    assert moe_offload.load(folder).offload.dense == "stored"
    for weights in ("int8", "int4"):
        model = moe_offload.load(folder, weights=weights, pack_dir=tmp_path)
        assert model.offload.dense == "int8"
    stored = moe_offload.load(folder, weights="int8", dense="stored", pack_dir=tmp_path)
    assert stored.offload.dense == "stored" and not packed_linears(stored)
    with pytest.raises(moe_offload.OptionError, match="dense='int5' is not one of auto, stored"):
        moe_offload.load(folder, dense="int5")  # type: ignore[arg-type]


def test_routers_and_small_linears_stay(checkpoint: Checkpoints) -> None:
    model = moe_offload.load(checkpoint("qwen2_moe", num_experts=40, **SIZES), dense="int4")
    assert {path.rpartition(".")[2] for path in packed_linears(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"
    }  # fmt: skip
    left = {path.rpartition(".")[2] for path, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {"shared_expert_gate"}
    routers = moe_offload.load(checkpoint("longcat_flash", n_routed_experts=40, **SIZES), dense="int4")
    assert not any("router" in path for path in packed_linears(routers))


@pytest.mark.parametrize("tied", [False, True])
def test_detach_brings_back_every_bit(tied: bool, checkpoint: Checkpoints) -> None:
    for arch in ("gpt_oss", "qwen3_moe"):
        folder = checkpoint(arch, torch.bfloat16, tie_word_embeddings=tied, **SIZES)
        ours = moe_offload.load(folder, dense="int8")
        plain = type(ours).from_pretrained(folder, dtype="auto")
        assert isinstance(ours.lm_head, PackedLinear)
        assert torch.equal(ours.get_input_embeddings().weight, plain.get_input_embeddings().weight)
        ours.offload.detach()
        expected = plain.state_dict()
        assert list(ours.state_dict()) == list(expected)
        for name, value in ours.state_dict().items():
            assert torch.equal(value, expected[name]) and value.dtype == expected[name].dtype, name
        for mine, theirs in zip(ours.modules(), plain.modules(), strict=True):
            assert type(mine) is type(theirs)
            assert list(mine.__dict__) == list(theirs.__dict__)
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            assert mine.requires_grad == theirs.requires_grad
        assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("make", [fp8_checkpoint, mxfp4_checkpoint])
def test_checkpoints_that_are_quantised_already(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    options: dict[str, Any] = dict(dtype=torch.bfloat16, pack_dir=tmp_path)
    ours, plain = (moe_offload.load(folder, dense=each, **options) for each in ("int8", "stored"))
    assert len(packed_linears(ours)) >= 7  # FP8 ones among them
    stored = plain.state_dict()
    ours.offload.detach()
    for name, value in ours.state_dict().items():
        assert name not in stored or torch.equal(value, stored[name]), name


def test_state_dict_lists_biases_alone(checkpoint: Checkpoints) -> None:
    folder = checkpoint("gpt_oss", **SIZES)
    ours, plain = moe_offload.load(folder, dense="int8"), moe_offload.load(folder)
    weights = {f"{path}.weight" for path in packed_linears(ours)}
    assert weights and ours.state_dict().keys() == plain.state_dict().keys() - weights
    assert isinstance(ours.model.layers[0].self_attn.q_proj.bias, nn.Parameter)


def test_copies_share_the_bytes(folder: Path) -> None:
    ours = moe_offload.load(folder, dense="int8")
    twin = copy.deepcopy(ours)
    assert {each.packed.address for each in packed_linears(ours).values()} == {
        each.packed.address for each in packed_linears(twin).values()
    }
    expected = logits(ours)
    assert torch.equal(logits(twin), expected)
    for refused in (lambda: pickle.dumps(ours.lm_head), lambda: torch.save(ours.lm_head, io.BytesIO())):
        with pytest.raises(TypeError, match="cannot be pickled"):
            refused()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_later(dtype: torch.dtype, folder: Path) -> None:
    ours = moe_offload.load(folder, dense="int8")
    expected = logits(ours)
    ours.to(dtype)
    assert ours.lm_head.weight.dtype == ours.dtype == dtype
    found = logits(ours)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    ours.offload.detach()
    assert ours.lm_head.weight.dtype == dtype


def test_interface_of_a_linear(checkpoint: Checkpoints) -> None:
    model = moe_offload.load(checkpoint("gpt_oss", **SIZES), dense="int8", activations="f32")
    linear = model.model.layers[0].self_attn.q_proj
    assert (linear.in_features, linear.out_features) == (64, 32)
    assert "in_features=64, out_features=32, bias=True, int8 in groups of 32" in repr(linear)
    weight = linear.weight
    assert isinstance(weight, torch.Tensor) and weight.shape == (32, 64) and weight.device.type == "cpu"
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = functional.linear(x, weight, linear.bias)
        torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear(x.transpose(0, 2)), expected.transpose(0, 2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear(x[0, 0, 0]), expected[0, 0, 0], rtol=1e-5, atol=1e-5)
        assert linear(x[:0]).shape == (0, 3, 5, 32)
        assert linear(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="does not fit"):
        linear(x[..., :32])
    with pytest.raises(AttributeError, match="dense='stored'"):
        linear.weight = nn.Parameter(torch.zeros(32, 64))
    linear.bias.data += 1
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected + 1, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="inference only"):
        linear(x).sum().backward()
    model.offload.close()
    with pytest.raises(RuntimeError, match="load the model again"):
        linear(x)


def test_thread_count_does_not_change_a_bit(folder: Path, tmp_path: Path) -> None:
    outputs = [logits(moe_offload.load(folder, dense="int8", threads=n, pack_dir=tmp_path / str(n))) for n in (1, 2, 3)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_the_stored_parameters_are_gone(folder: Path) -> None:
    ours, plain = moe_offload.load(folder, dense="int8"), moe_offload.load(folder)
    linears = ours.offload._dense
    assert linears is not None
    bytes_of = [sum(p.nbytes for p in model.parameters()) for model in (ours, plain)]
    assert bytes_of[1] - bytes_of[0] == linears.stored_bytes
    assert linears.nbytes == sum(each.packed.memory.nbytes for each in packed_linears(ours).values())
    assert linears.nbytes == linears.stored_bytes * 34 // 128  # all sizes are multiples of 32
    assert all(each.packed.address % 64 == 0 for each in packed_linears(ours).values())


def test_what_cannot_be_brought_back_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight that the checkpoint does not hold as it is, and one that somebody hooked."""
    found = dense_choice.dense_linears

    def tampered(model: PreTrainedModel, spec: Any) -> dict[str, nn.Linear]:
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[3, 5] += 1
            model.model.layers[1].self_attn.q_proj.weight *= 2
        model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: None)
        return found(model, spec)

    monkeypatch.setattr(dense_conversion, "dense_linears", tampered)
    ours = moe_offload.load(folder, dense="int8", pack_dir=tmp_path)
    names = packed_linears(ours).keys()
    layer, next_ = "model.layers.0.self_attn", "model.layers.1.self_attn"
    assert not {f"{layer}.q_proj", f"{layer}.o_proj", f"{next_}.q_proj"} & names
    assert {f"{layer}.k_proj", f"{next_}.k_proj"} <= names
    said = f"2 linears stay as they are stored, such as {layer}.q_proj: they are not what the checkpoint holds"
    assert said in caplog.text

    # the pack is the checkpoint's, whoever made it; from now on a row is compared
    caplog.clear()
    assert f"{next_}.q_proj" not in packed_linears(moe_offload.load(folder, dense="int8", pack_dir=tmp_path))
    assert f"1 linears stay as they are stored, such as {next_}.q_proj" in caplog.text


def test_weights_that_no_integer_stands_for(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They stay as they are stored, whether the pack was there or not."""
    damaged = tmp_path / "model"
    shutil.copytree(folder, damaged)
    name = "model.layers.1.self_attn.v_proj"
    (shard,) = (path for path in damaged.glob("*.safetensors") if f"{name}.weight" in load_file(path))
    tensors = load_file(shard)
    tensors[f"{name}.weight"][30, 3] = torch.inf
    save_file(tensors, shard, metadata={"format": "pt"})
    for packs in ("packs", "packs", "model/config.json/packs"):
        caplog.clear()
        linears = packed_linears(moe_offload.load(damaged, dense="int4", pack_dir=tmp_path / packs))
        assert name not in linears and "model.layers.1.self_attn.k_proj" in linears
        assert f"such as {name}: their weights cannot be int4" in caplog.text
