"""The comparison with llama.cpp stands on equal weights: what the GGUF holds, and what its formats round to."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.peers.agreement import distance, from_other_rounding, from_same_weights
from benchmarks.peers.gguf_file import gguf_tensors, interleave, write_gguf
from benchmarks.peers.reference import exact_logits
from benchmarks.peers.rounding import rounded
from benchmarks.random_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gguf"), "small", 1)


def _gguf() -> ModuleType:
    """The package, which only these benchmarks use."""
    pytest.importorskip("gguf")
    return importlib.import_module("gguf")


def test_every_tensor_is_there_once_with_the_checkpoint_values(small: Path) -> None:
    stored = {name: tensor for file in small.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = {tensor.name: tensor for tensor in gguf_tensors(small)}
    assert sum(int(np.prod(one.shape)) for one in found.values()) == sum(one.numel() for one in stored.values())
    up = torch.from_numpy(found["blk.0.ffn_up_exps.weight"].read().view(np.int16)).view(torch.bfloat16)
    assert torch.equal(up[3], stored["model.layers.0.mlp.experts.3.up_proj.weight"])
    router = found["blk.0.ffn_gate_inp.weight"]
    assert not router.bf16
    assert torch.equal(torch.from_numpy(router.read()), stored["model.layers.0.mlp.gate.weight"].float())


def test_interleaving_pairs_the_halves_of_each_head() -> None:
    rows = np.arange(12)[:, None]  # two heads of six: halves 0-2 and 3-5, 6-8 and 9-11
    assert interleave(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(("kind", "codes"), [("Q8_0", 255), ("Q4_0", 16)])
def test_rounded_values_are_codes_times_a_half_precision_scale(kind: str, codes: int) -> None:
    weights = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    weights[2, :32] = 0
    found = rounded(weights, kind)
    error = (found - weights).abs().reshape(-1, 32).amax(1)
    step = weights.abs().reshape(-1, 32).amax(1) * 2 / (codes - 1)
    # Half a step and the scale's own rounding; Q4_0 has no code for its extreme's opposite: a whole step.
    assert bool((error <= step * (0.57 if kind == "Q8_0" else 1.1)).all())
    assert all(len(block.unique()) <= codes for block in found.reshape(-1, 32))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_rounding_is_ggml_s(kind: str) -> None:
    gguf = _gguf()
    weights = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    quants, format_ = gguf.quants, gguf.GGMLQuantizationType[kind]
    wanted = quants.dequantize(quants.quantize(weights.numpy(), format_), format_)
    np.testing.assert_array_equal(rounded(weights, kind).numpy(), wanted)


def test_the_file_reads_back(small: Path, tmp_path: Path) -> None:
    gguf = _gguf()
    target = tmp_path / "small.gguf"
    write_gguf(small, target)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    for tensor in gguf_tensors(small):
        assert tuple(read[tensor.name].shape[::-1]) == tensor.shape
        assert read[tensor.name].data.tobytes() == np.ascontiguousarray(tensor.read()).tobytes()


def test_exact_logits_are_transformers_in_f32(small: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompts = [[3, 700, 12, 9], [8, 8, 5, 1]]
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)(torch.tensor(prompts)).logits.numpy()
    np.testing.assert_allclose(exact_logits(small, prompts, "BF16"), wanted, rtol=1e-4, atol=1e-5)


def test_another_model_is_refused() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((2, 8, 64)).astype(np.float32)
    close, far = exact * np.float32(1.01), rng.standard_normal(exact.shape).astype(np.float32)
    assert distance(close, exact) == pytest.approx(0.01, rel=1e-3)
    assert from_same_weights(close, exact, "BF16", 0.006).holds
    assert not from_same_weights(far, exact, "Q4_0", 0.006).holds
    assert not from_other_rounding(far, exact, close, "Q4_0", 0.006).holds
    assert not from_same_weights(exact * np.float32("nan"), exact, "BF16", 0.006).holds
