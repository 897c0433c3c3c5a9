"""What the fused decode step leaves to transformers' modules: hooks, adapters, other caches, gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache, QuantizedCache

from tests import tiny_models
from tests.decode_cases import Pair, check_caches, check_generation, close, counted_runs, generate, load_pair, save
from tests.test_decode import LAYERS, check_step, padded, prefilled, step

IDS = tiny_models.token_ids(2, 9)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture
def pair(folder: Path, packs: Path) -> Pair:
    """Models that the test may spoil; stored linears, and experts that the chain runs."""
    return load_pair(folder, pack_dir=packs, weights="int8", dense="stored")


def caches(pair: Pair, ids: torch.Tensor = IDS) -> list[Any]:
    """Both models' caches after the prompt and one step, which is fused."""
    made = [prefilled(model, ids) for model in pair]
    check_step(pair, *made)
    return made


# Hooks and other modules


def test_hooks_inside_of_a_layer_are_called(pair: Pair) -> None:
    made = caches(pair)
    for path in ("self_attn", "self_attn.q_proj", "mlp.gate", "mlp.experts", "input_layernorm"):
        seen: list[str] = []
        module = pair.fused.model.layers[1].get_submodule(path)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_, path=path, seen=seen: seen.append(path))
            check_step(pair, *made, fused=LAYERS - 1)
            handle.remove()
        assert seen == [path, path]
    check_step(pair, *made)


def test_hooks_on_the_layer_itself_cost_nothing(pair: Pair) -> None:
    made, seen = caches(pair), []
    pair.fused.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2].shape))
    check_step(pair, *made)
    assert seen == [(2, 1, 64)]


def test_global_hooks_are_called(pair: Pair) -> None:
    made, seen = caches(pair), []
    handle = torch_module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        check_step(pair, *made, fused=0)
    finally:
        handle.remove()
    assert pair.fused.model.layers[2].self_attn.q_proj in seen


class Doubled(nn.Module):
    """What adapters do: another module around the original one."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> Any:
        return 2 * self.base(x)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.k_norm", "mlp", "post_attention_layernorm"])
@pytest.mark.parametrize("before", [True, False])
def test_replaced_modules(path: str, before: bool, pair: Pair) -> None:
    """Before the first step and after it, and back again."""
    if not before:
        caches(pair)
    originals = [model.model.layers[1].get_submodule(path) for model in pair]
    for model, original in zip(pair, originals, strict=True):
        model.model.layers[1].set_submodule(path, Doubled(original).eval())
    made = [prefilled(model, IDS) for model in pair]
    with counted_runs() as runs:
        logits = [step(model, cache) for model, cache in zip(pair, made, strict=True)]
    assert close(logits[0], logits[1])
    # a doubled block after the attention may still be called from a step that is fused up to there
    assert len(runs) <= LAYERS and all(not plan.whole for plan in runs[2:-1])
    check_caches(*made)


def test_an_adapters_forward_on_an_instance(pair: Pair) -> None:
    """accelerate and others put a function in the place of a module's forward."""
    made = caches(pair)
    for model in pair:
        linear = model.model.layers[0].self_attn.o_proj
        linear.forward = lambda x, linear=linear: 2 * nn.functional.linear(x, linear.weight)
    check_step(pair, *made, fused=LAYERS - 1)


# Outputs of inner modules


def test_inner_outputs(pair: Pair) -> None:
    for model in pair:
        model.set_attn_implementation("eager")
    made = caches(pair)
    wanted = dict(output_attentions=True, output_hidden_states=True, output_router_logits=True)
    with torch.no_grad():
        ours, theirs = (
            model(torch.full((2, 1), 5), past_key_values=cache, **wanted)
            for model, cache in zip(pair, made, strict=True)
        )
    for name in ("attentions", "hidden_states", "router_logits"):
        assert len(ours[name]) == len(theirs[name]) >= LAYERS
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert a.shape == b.shape and close(a, b)
    assert close(ours.logits, theirs.logits)


def test_hidden_states_of_generate(pair: Pair) -> None:
    ours, theirs = (generate(model, IDS, output_hidden_states=True) for model in pair)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert len(a) == len(b) == LAYERS + 1 and all(close(x, y) for x, y in zip(a, b, strict=True))


# Other caches


def test_static_cache(pair: Pair) -> None:
    with counted_runs() as runs:
        results = [generate(model, IDS, cache_implementation="static").sequences.tolist() for model in pair]
    assert results[0] == results[1] and not runs


def test_quantized_cache(pair: Pair) -> None:
    made = []
    for model in pair:
        try:
            cache = QuantizedCache("fp8", model.config)
        except ValueError as error:  # transformers 5.14 has other backends only, from packages of their own
            pytest.skip(str(error))
        made.append(prefilled(model, IDS, past_key_values=cache))
    with counted_runs() as runs:
        logits = [
            model(torch.full((2, 1), 5), past_key_values=cache).logits for model, cache in zip(pair, made, strict=True)
        ]
    assert close(logits[0], logits[1], tolerance=1e-3) and not runs


def test_a_cache_that_updates_in_its_own_way(pair: Pair) -> None:
    class Counting(DynamicCache):  # type: ignore[misc]
        updates = 0

        def update(self, *args: Any, **kwargs: Any) -> Any:
            self.updates += 1
            return super().update(*args, **kwargs)

    cache = prefilled(pair.fused, IDS, past_key_values=Counting())
    check_step(pair, cache, prefilled(pair.plain, IDS, past_key_values=Counting()), fused=0)
    assert cache.updates == 2 * LAYERS


def test_a_cache_in_another_type(pair: Pair) -> None:
    made = caches(pair)
    for cache in made:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    check_step(pair, *made, fused=0)
    check_step(pair, *made)


def test_a_cache_of_another_shape_is_an_error(pair: Pair) -> None:
    cache = prefilled(pair.fused, IDS)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :1], layer.values[:, :1]
    with pytest.raises(RuntimeError):
        step(pair.fused, cache)


@pytest.mark.parametrize(("family", "fused"), [("gpt_oss", 1), ("mixtral", 0), ("qwen2_moe", 1)])
def test_sliding_windows(family: str, fused: int, tmp_path: Path, packs: Path) -> None:
    """Beyond the window; layers that see everything are fused."""
    window: dict[str, Any] = dict(sliding_window=8)
    extra: dict[str, dict[str, Any]] = {
        "gpt_oss": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        "mixtral": {},
        "qwen2_moe": dict(
            use_sliding_window=True, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        ),
    }
    pair = load_pair(save(family, tmp_path, **window, **extra[family]), pack_dir=packs)
    ids, mask = padded(2, 6)
    assert check_generation(pair, ids, attention_mask=mask, max_new_tokens=12) == 11 * fused
    # a cache of layers that all keep everything: the window is in the mask, which hides a beginning
    results = []
    for model in pair:
        cache = prefilled(model, ids, attention_mask=mask, past_key_values=DynamicCache())
        with counted_runs() as runs:
            for n in range(8):
                wide = torch.cat([mask, torch.ones(2, n + 1, dtype=mask.dtype)], dim=1)
                logits = step(model, cache, attention_mask=wide)
        assert len(runs) == (8 * LAYERS if model is pair.fused else 0)
        results.append(logits)
    assert close(results[0], results[1])


# Gradients, training, other modes


def test_training_mode(pair: Pair) -> None:
    made = caches(pair)
    for model in pair:
        model.train()
    check_step(pair, *made, fused=0)
    for model in pair:
        model.eval()
    check_step(pair, *made)


def test_gradients_flow(pair: Pair) -> None:
    """Also to a layer whose input has none."""
    model = pair.fused.requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    cache = prefilled(model, IDS)
    with counted_runs() as runs:
        hidden = model.model(torch.full((2, 1), 5), past_key_values=cache).last_hidden_state
        assert hidden.requires_grad and weight.requires_grad
        assert not runs
    weight.requires_grad_(False)
    with counted_runs() as runs:
        assert not model(torch.full((2, 1), 5), past_key_values=cache).logits.requires_grad
        assert len(runs) == LAYERS


def test_autocast(pair: Pair) -> None:
    made = caches(pair)
    with torch.autocast("cpu", torch.bfloat16), counted_runs() as runs:
        for model, cache in zip(pair, made, strict=True):
            step(model, cache)
    assert not runs


def test_in_and_out_of_inference_mode(pair: Pair) -> None:
    made = [prefilled(model, IDS) for model in pair]
    with torch.inference_mode():
        for _ in range(2):
            check_step(pair, *made)
    check_step(pair, *made)
    with torch.inference_mode():
        made = [prefilled(model, IDS) for model in pair]
        check_step(pair, *made)
    check_step(pair, *made)


def test_loaded_in_inference_mode(folder: Path, packs: Path) -> None:
    """Its parameters count no versions."""
    with torch.inference_mode():
        pair = load_pair(folder, pack_dir=packs, weights="int8", dense="stored")
    check_step(pair, *caches(pair))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_compiled_layer(pair: Pair) -> None:
    """Under torch.compile transformers' modules are traced, once; our launch would be a black box to it."""
    cache = prefilled(pair.fused, IDS)
    layer: Any = torch.compile(pair.fused.model.layers[0], backend="eager")
    hidden = torch.randn(2, 1, 64)
    embedding = pair.fused.model.rotary_emb(hidden, torch.full((1, 1), 9))
    with torch.no_grad(), counted_runs() as runs:
        found = layer(hidden, position_embeddings=embedding, attention_mask=None, past_key_values=copy.deepcopy(cache))
        assert not runs
        ways = dict(position_embeddings=embedding, attention_mask=None, past_key_values=cache)
        assert close(found, pair.fused.model.layers[0](hidden, **ways))
        assert len(runs) == 1
