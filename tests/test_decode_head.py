"""The output head as stored, through our kernels for a few tokens, through torch for everything else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_offload
from moe_offload.cpu_kernels.matrices import MatrixKernel
from moe_offload.cpu_kernels.target import current_target
from moe_offload.decode_head import MOST_TOKENS, DecodeHead
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
    ours = DecodeHead(model.offload, head)
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
    assert isinstance(head.__dict__["forward"], DecodeHead)
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
