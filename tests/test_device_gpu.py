"""A model on a real card: run where there is one, `pytest -m gpu`."""

from typing import Any

import pytest
import torch

import moe_offload
from tests.conftest import Checkpoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA"),
]

BUDGETS = ("8MiB", "2MiB")
# f32 products in another order; TF32 is off by default. Logits of these models are below 10.
TOLERANCE = 1e-3


def _model(checkpoint: Checkpoints, name: str, **options: Any) -> Any:
    return moe_offload.load(checkpoint(name), **options)


def _ids() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("policy", ["ours", "lru", "static"])
def test_logits_are_those_of_the_cpu(checkpoint: Checkpoints, name: str, policy: str) -> None:
    ids, mask = _ids()
    with _model(checkpoint, name, device="cpu").offload as engine, torch.no_grad():
        expected = engine._model(ids, attention_mask=mask).logits
    with _model(checkpoint, name, device="cuda", gpu_memory=BUDGETS[0], policy=policy).offload as engine:
        with torch.no_grad():
            found = engine._model(ids, attention_mask=mask).logits
        assert found.device.type == "cpu"
        engine.device.cache.check_integrity()
    assert torch.allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("memory", BUDGETS)
def test_a_text_is_that_of_the_cpu_and_the_budget_holds(checkpoint: Checkpoints, memory: str) -> None:
    ids, mask = _ids()
    settings: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=24, do_sample=False)
    with _model(checkpoint, "qwen3_moe", device="cpu").offload as engine:
        expected = engine._model.generate(ids, **settings)
    with _model(checkpoint, "qwen3_moe", device="cuda", gpu_memory=memory).offload as engine:
        assert torch.equal(engine._model.generate(ids, **settings), expected)
        stats = engine.stats()
        assert stats is not None and not stats.simulated
        assert stats.memory_peak <= stats.memory_budget


def test_copies_and_kernels_run_side_by_side(checkpoint: Checkpoints) -> None:
    """By the events of both streams: some copy begins before the kernel before it has ended."""
    ids, mask = _ids()
    with _model(checkpoint, "qwen3_moe", device="cuda", gpu_memory=BUDGETS[0], policy="lru").offload as engine:
        engine.record_timeline()
        engine._model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        spans = engine.device.accelerator.timeline()
    copies = [span for span in spans if span.track == "copy"]
    kernels = [span for span in spans if span.track == "compute"]
    assert copies and kernels
    assert any(a.start < b.end and b.start < a.end for a in copies for b in kernels)
