"""The output head as stored, through our kernels for a few tokens, through torch for everything else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_offload
from moe_offload.cpu_kernels.matrices import MatrixKernel
from moe_offload.cpu_kernels.target import current_target
from moe_offload.decode_linear import MOST_TOKENS, DecodeLinear
from tests import tiny_models

DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if current_target().half else [])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens that our kernels multiplied."""
    found, original = [], MatrixKernel.__call__

    def call(self: MatrixKernel, matrices: Any, x: Any, *rest: Any) -> None:
        found.append(len(x))
        original(self, matrices, x, *rest)

    monkeypatch.setattr(MatrixKernel, "__call__", call)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return moe_offload.load(tiny_models.save(tiny_models.build("qwen3_moe"), tmp_path))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_like_torch(dtype: torch.dtype, bias: bool, model: Any, calls: list[int]) -> None:
    torch.manual_seed(0)
    head = nn.Linear(67, 43, bias=bias, dtype=dtype)
    ours = DecodeLinear(model.offload, head)
    for rows in (1, 2, MOST_TOKENS):
        x = torch.randn(rows, 1, 67).to(dtype)
        with torch.no_grad():
            found, expected = ours(x), nn.functional.linear(x.double(), head.weight.double())
        expected = expected if head.bias is None else expected + head.bias.double()
        assert found.dtype == dtype and found.shape == expected.shape
        # one rounding of a sum in f32
        step = torch.finfo(dtype).eps
        assert (found.double() - expected).abs().max() <= (step + 1e-5) * expected.abs().max()
    assert calls == [1, 2, MOST_TOKENS]


def test_what_goes_to_torch(model: Any, calls: list[int]) -> None:
    head, x = model.lm_head, torch.randn(1, 1, model.config.hidden_size)
    assert isinstance(head.__dict__["forward"], DecodeLinear)
    expected = nn.functional.linear(x, head.weight)
    with torch.no_grad():
        assert torch.allclose(head(x.expand(1, MOST_TOKENS + 1, -1)), expected, atol=1e-5)
        assert head(x[:, :0]).shape == (1, 0, model.config.vocab_size)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            head(x.to(torch.bfloat16))
        with pytest.raises(RuntimeError):
            head(x[..., :-1])
    assert head(x).requires_grad == head.weight.requires_grad
    assert not calls or calls == [1] * (not head.weight.requires_grad)


def test_a_replaced_weight_is_read_at_once(model: Any, calls: list[int]) -> None:
    head, x = model.lm_head, torch.randn(1, 1, model.config.hidden_size)
    with torch.no_grad():
        before = head(x)
        head.weight.data = 2 * head.weight.data
        assert torch.allclose(head(x), 2 * before, atol=1e-5)
        head.weight = nn.Parameter(torch.zeros_like(head.weight))
        assert not head(x).any()
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe", "qwen3_moe"])
def test_linears_around_the_experts(
    family: str, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them where layers run through transformers' modules; none inside of fused layers."""
    monkeypatch.setattr("moe_offload.decode_model.LEAST_WEIGHTS", 1)
    made: Any = moe_offload.load(tiny_models.save(tiny_models.build(family), tmp_path), device="cpu")
    ours = [name for name, each in made.named_modules() if isinstance(each.__dict__.get("forward"), DecodeLinear)]
    assert "lm_head" in ours
    assert any(".self_attn." in name for name in ours) == (family == "deepseek_v2")
    assert not any("gate" == name.rpartition(".")[2] for name in ours)  # routers
    ids = torch.randint(3, 100, (1, 7))
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        found = made.generate(ids, **options)
    steps = len(calls)
    assert steps >= 4 * (len(ours) if family == "deepseek_v2" else 1) - len(ours)
    made.offload.detach()
    assert not any(isinstance(each.__dict__.get("forward"), DecodeLinear) for each in made.modules())
    with torch.no_grad():
        expected = made.generate(ids, **options)
    assert len(calls) == steps
    found_logits, expected_logits = torch.stack(found.logits), torch.stack(expected.logits)
    assert torch.equal(found.sequences, expected.sequences)
    assert (found_logits - expected_logits).abs().max() <= 5e-5 * expected_logits.abs().max()


def test_small_linears_are_left_to_torch(tmp_path: Path) -> None:
    made: Any = moe_offload.load(tiny_models.save(tiny_models.build("deepseek_v2"), tmp_path), device="cpu")
    assert not any(isinstance(each.__dict__.get("forward"), DecodeLinear) for each in made.modules())
    made.offload.close()
