"""Routers read from a model's modules: their scores make the modules' own choice, here and a layer ahead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import moe_offload
from moe_offload.models.errors import UnsupportedModelError
from moe_offload.models.routers import Floats, Routers, experts_call, normalised, read_routers, selected
from tests import tiny_models

KNOWN = tiny_models.known_architectures()
EXACT = (
    "cohere2_moe", "ernie4_5_moe", "flex_olmo", "flint", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "hy_v3", "jamba",
    "laguna", "lfm2_moe", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe", "openai_privacy_filter", "phimoe",
    "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
)  # fmt: skip
# the choice among groups is not modelled: within groups the scores order experts as the router does
GROUPS = ("deepseek_v2", "deepseek_v3", "glm4_moe", "nemotron_h")
REFUSED = {
    "deepseek_v4": "does not run by itself",
    "gemma4_text": "does not run by itself",
    "llama4_text": "do not get the block's input",
    "longcat_flash": "no linear of",
    "zaya": "no linear of",
}

Calls = list[tuple[Floats, NDArray[np.int64]]]


def build(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A random model whose norms and biases are no ones and zeros."""
    model = tiny_models.build(model_type, **overrides)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            parameter.data = 0.3 + torch.rand(parameter.shape, generator=generator)
        elif "bias" in name and parameter.dim() <= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return moe_offload.load(tiny_models.save(model, folder), device="cpu", threads=1)


def routed(model: PreTrainedModel, length: int = 40) -> tuple[Floats, Calls]:
    """The embedding, and of each layer what its experts got and who was chosen, of random tokens."""
    seen: Calls = []
    embedded: list[Floats] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, index, _weights = experts_call(args, kwargs)
        seen.append((hidden.float().numpy().copy(), index.numpy().copy()))

    def embed(_: Any, __: Any, output: torch.Tensor) -> None:
        embedded.append(output.float().numpy().reshape(-1, output.shape[-1]).copy())

    handles = [model.get_input_embeddings().register_forward_hook(embed)]
    for layer in model.offload.spec.layers:
        handles.append(model.get_submodule(layer.path).register_forward_pre_hook(hook, with_kwargs=True))
    with torch.inference_mode():
        model.base_model(input_ids=tiny_models.token_ids(1, length), use_cache=False)
    for handle in handles:
        handle.remove()
    return embedded[0], seen


def choice(scores: Floats, top_k: int) -> list[set[int]]:
    return [set(row) for row in np.argsort(-scores, axis=1)[:, :top_k].tolist()]


def agreement(scores: Floats, index: NDArray[np.int64]) -> float:
    """The share of tokens whose experts are the best by score."""
    wanted = [set(row) for row in index.tolist()]
    return float(np.mean([a == b for a, b in zip(choice(scores, index.shape[1]), wanted, strict=True)]))


@pytest.mark.parametrize("model_type", [name for name in EXACT if name in KNOWN])
def test_own_scores_make_the_choice(model_type: str, tmp_path: Path) -> None:
    model = loaded(build(model_type), tmp_path)
    routers = read_routers(model)
    _, calls = routed(model)
    assert len(routers.layers) == len(calls)
    for router, (hidden, index) in zip(routers.layers, calls, strict=True):
        assert agreement(router.scores(hidden), index) == 1
    model.offload.close()


@pytest.mark.parametrize("model_type", [name for name in GROUPS if name in KNOWN])
def test_within_groups_scores_order_experts(model_type: str, tmp_path: Path) -> None:
    model = loaded(build(model_type), tmp_path)
    routers = read_routers(model)
    for router, (hidden, index) in zip(routers.layers, routed(model)[1], strict=True):
        scores = router.scores(hidden)
        groups = scores.reshape(len(scores), 2, -1)
        chosen = index[:, 0] * 2 // scores.shape[1]  # one group of two is chosen
        assert (index * 2 // scores.shape[1] == chosen[:, None]).all()
        inside = groups[np.arange(len(scores)), chosen]
        assert agreement(inside, index % inside.shape[1]) == 1
    model.offload.close()


@pytest.mark.parametrize("model_type", [name for name in REFUSED if name in KNOWN])
def test_other_routers_are_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    model = loaded(tiny_models.build(model_type), tmp_path)
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        read_routers(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    model.offload.close()


def still(model: PreTrainedModel) -> PreTrainedModel:
    """Layers add nothing to the residual stream."""
    for name, parameter in model.named_parameters():
        if name.split(".")[-1].startswith("down_proj") or ".o_proj." in name or ".down_proj." in name:
            parameter.data.zero_()
    return model


# RMSNorm, LayerNorm with biases, 1 + weight, gpt-oss (bias), selection bias
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "phimoe", "qwen3_5_moe_text", "gpt_oss", "minimax_m2"])
def test_ahead_of_layers_that_do_nothing(model_type: str, tmp_path: Path) -> None:
    overrides = dict(layer_types=["full_attention"] * 3) if model_type == "qwen3_5_moe_text" else {}
    model = loaded(still(build(model_type, num_hidden_layers=3, **overrides)), tmp_path)
    routers = read_routers(model)
    embedded, calls = routed(model)
    states = [normalised(embedded), *(hidden for hidden, _ in calls)]
    for source, rows in enumerate(routers.sources):
        look = rows.look(states[source])
        for distance in range(3):
            if source + distance < len(calls):
                # what the target's own router says of its own input, digit by digit; a LayerNorm divides the embedding
                # by its deviation, which is not quite its root mean square
                near = 0.1 if model_type == "phimoe" and source == 0 else 2e-3
                own = routers.layers[source + distance].scores(calls[source + distance][0])
                assert np.allclose(look[:, distance], own, rtol=near, atol=near)
                assert agreement(look[:, distance], calls[source + distance][1]) > 0.97
            else:
                assert not rows.rows[distance].any()
    model.offload.close()


def test_tiny_factors_are_not_undone(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    layers: Any = model.model.layers
    layers[0].post_attention_layernorm.weight.data[3] = 1e-7
    model = loaded(model, tmp_path)
    routers = read_routers(model)
    ratio = layers_ratio(routers)
    assert ratio[3] == 1 and (np.delete(ratio, 3) != 1).all() and np.isfinite(ratio).all()
    model.offload.close()


def layers_ratio(routers: Routers) -> NDArray[np.float32]:
    """By what the columns of layer 1's router were scaled for source 1."""
    return np.asarray(routers.sources[1].rows[0, 0] / routers.layers[1].weight[0])


def test_half_precision(tmp_path: Path) -> None:
    model = tiny_models.build("qwen3_moe", torch.bfloat16)
    model = loaded(model, tmp_path)
    routers = read_routers(model)
    for router, (hidden, index) in zip(routers.layers, routed(model)[1], strict=True):
        assert agreement(router.scores(hidden), index) > 0.8  # the router rounds its logits
    model.offload.close()


@pytest.mark.parametrize("select", ["sigmoid", "softmax"])
def test_bounded_scores_survive_any_logit(select: Any) -> None:
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    scores = selected(logits, select, np.array([0, 0, -0.25], np.float32))
    assert np.isfinite(scores).all() and scores[0, 0] == 8 and scores[0, 1] < 1e-6


def planted(routers: Routers, spoil: Callable[[Floats], Floats], calls: Calls) -> float:
    router = routers.layers[1]
    scores = spoil(router.weight) @ calls[1][0].T
    return agreement(scores.T, calls[1][1])


def test_the_measure_finds_a_wrong_router(tmp_path: Path) -> None:
    model = loaded(build("qwen3_moe"), tmp_path)
    routers, (_, calls) = read_routers(model), routed(model)
    assert planted(routers, lambda weight: weight, calls) == 1
    assert planted(routers, lambda weight: weight[::-1], calls) < 0.5
    assert planted(routers, lambda weight: weight * np.linspace(0, 1, weight.shape[1], dtype=np.float32), calls) < 0.9
    model.offload.close()
