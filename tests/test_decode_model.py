"""The fused decode step of a whole model: one launch where nothing is unusual, else layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from moe_offload.cpu_kernels.stages import Chain
from moe_offload.decode_model import ModelStep, first_seen
from tests import tiny_models
from tests.decode_cases import Pair, check_caches, check_generation, close, counted_runs, load_pair, save
from tests.test_decode import LAYERS, padded, prefilled, step

IDS = tiny_models.token_ids(2, 9)


@contextmanager
def counted_launches() -> Iterator[list[Chain]]:
    """The chains that are launched while this is entered."""
    original, found = Chain.run, []

    def run(self: Chain, *args: Any) -> None:
        found.append(self)
        original(self, *args)

    Chain.run = run  # type: ignore[assignment,method-assign]
    try:
        yield found
    finally:
        Chain.run = original  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture
def pair(folders: Callable[[str], Path], packs: Path) -> Pair:
    """Models that the test may spoil."""
    return load_pair(folders("qwen3_moe"), pack_dir=packs, weights="int8", dense="stored")


def check_launches(pair: Pair, made: list[Any], launches: int, **ways: Any) -> None:
    """One step on both models' caches; `launches` chains run for it."""
    with counted_launches() as chains:
        ours = step(pair.fused, made[0], **ways)
        assert len(chains) == launches
    assert close(ours, step(pair.plain, made[1], **ways))
    check_caches(*made)


def caches(pair: Pair) -> list[Any]:
    """Both models' caches after the prompt and one step, which is one launch."""
    made = [prefilled(model, IDS) for model in pair]
    check_launches(pair, made, 1)
    return made


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
@pytest.mark.parametrize(("weights", "dense"), [("int4", "int8"), ("int4", "stored"), ("auto", "stored")])
def test_one_launch_for_all_layers(
    family: str, weights: Any, dense: Any, folders: Callable[[str], Path], packs: Path
) -> None:
    pair = load_pair(folders(family), pack_dir=packs, weights=weights, dense=dense)
    assert isinstance(pair.fused.model.__dict__["forward"], ModelStep)
    ids, mask = padded(3, 9)
    with counted_launches() as chains:
        assert check_generation(pair, ids, attention_mask=mask, max_new_tokens=8) == 7 * LAYERS
    assert len(chains) == 7


def test_past_blocks_of_positions_and_of_the_cache(folders: Callable[[str], Path], packs: Path) -> None:
    """The rotary table goes on at 256 positions; the cache's buffers grow, and the chain with them."""
    pair = load_pair(folders("qwen3_moe"), pack_dir=packs, weights="int8", dense="stored")
    ids, mask = padded(2, 240)
    with counted_launches() as chains:
        check_generation(pair, ids, attention_mask=mask, max_new_tokens=160)
    assert len(chains) == 159


def test_families_with_other_blocks_go_layer_by_layer(folders: Callable[[str], Path], packs: Path) -> None:
    for family in ("qwen2_moe", "gpt_oss"):
        pair = load_pair(folders(family), pack_dir=packs, weights="int8", dense="stored")
        assert "forward" not in pair.fused.model.__dict__
        with counted_launches() as chains:
            check_generation(pair, IDS, max_new_tokens=3)
        assert len(chains) >= 2 * LAYERS


def test_experts_that_torch_may_run(folders: Callable[[str], Path]) -> None:
    """Experts as stored leave the chain where one of them could get so many rows that torch multiplies them."""
    pair = load_pair(folders("qwen3_moe"), gemm_rows=4)
    for rows, launches in ((3, 1), (4, LAYERS)):
        made = [prefilled(model, tiny_models.token_ids(rows, 7)) for model in pair]
        check_launches(pair, made, launches)


def test_numbers_of_sequences_in_turns(pair: Pair) -> None:
    several = [[prefilled(model, tiny_models.token_ids(rows, 7)) for model in pair] for rows in (1, 3, 2)]
    for _ in range(3):
        for made in several:
            check_launches(pair, made, 1)


@pytest.mark.parametrize(
    ("path", "launches"),
    [("embed_tokens", LAYERS), ("rotary_emb", LAYERS), ("norm", LAYERS), ("layers.1", LAYERS), ("layers.2.mlp", 2)],
)
def test_hooks_are_called(path: str, launches: int, pair: Pair) -> None:
    made, seen = caches(pair), []
    module = pair.fused.model.get_submodule(path)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *_: seen.append(path))
        check_launches(pair, made, 1 + launches)  # that the model was touched shows while the first chain runs ...
        check_launches(pair, made, launches)  # ... and is known from then on
        handle.remove()
        check_launches(pair, made, 1)
    assert len(seen) == 4


@pytest.mark.parametrize("path", ["norm", "embed_tokens", "rotary_emb"])
def test_replaced_modules(path: str, pair: Pair) -> None:
    class Scaled(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        @property
        def weight(self) -> Any:
            return self.base.weight

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = self.base(*args, **kwargs)
            return tuple(2 * part for part in result) if isinstance(result, tuple) else 2 * result

    made = caches(pair)
    originals = [model.model.get_submodule(path) for model in pair]
    for model, original in zip(pair, originals, strict=True):
        model.model.set_submodule(path, Scaled(original).eval())
    check_launches(pair, made, 1 + LAYERS)
    check_launches(pair, made, LAYERS)
    for model, original in zip(pair, originals, strict=True):
        model.model.set_submodule(path, original)
    check_launches(pair, made, 1)


def test_layers_in_another_order(pair: Pair) -> None:
    made = caches(pair)
    for model in pair:
        layers = model.model.layers
        layers[0], layers[2] = layers[2], layers[0]
    check_launches(pair, made, 1 + LAYERS)
    check_launches(pair, made, LAYERS)


def test_fewer_layers_than_there_are(pair: Pair) -> None:
    for model in pair:
        model.config.num_hidden_layers = LAYERS - 1
    with counted_runs() as runs:
        made = [prefilled(model, IDS) for model in pair]
        ours, theirs = (step(model, cache) for model, cache in zip(pair, made, strict=True))
    assert close(ours, theirs) and len(runs) == LAYERS - 1


@pytest.mark.parametrize("way", ["output_hidden_states", "output_router_logits", "output_attentions"])
def test_reports_that_were_asked_for(way: str, pair: Pair) -> None:
    made = caches(pair)
    if way == "output_attentions":
        for model in pair:
            model.set_attn_implementation("eager")
    with torch.no_grad(), counted_launches() as chains:
        ours, theirs = (
            model(torch.full((2, 1), 5), past_key_values=cache, **{way: True})
            for model, cache in zip(pair, made, strict=True)
        )
    assert len(chains) != 1 and close(ours.logits, theirs.logits)
    name = {"output_hidden_states": "hidden_states", "output_router_logits": "router_logits"}.get(way, "attentions")
    for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
        assert close(a, b)


def test_gradients_leave_no_trace_in_the_buffers(pair: Pair) -> None:
    """That a step is not one to fuse may show when its inputs are already there."""
    made, token = caches(pair), torch.full((2, 1), 5)
    for model in pair:
        model.model.embed_tokens.weight.requires_grad_(True)
    ours, theirs = (model(token, past_key_values=cache).logits for model, cache in zip(pair, made, strict=True))
    assert ours.requires_grad and close(ours.detach(), theirs.detach())
    plan = pair.fused.model.__dict__["forward"]._known[1]
    assert not plan.buffers.x_tensor.requires_grad


def test_recorders_that_transformers_leaves_behind(pair: Pair) -> None:
    """They hang on the modules from the first call that reports hidden states on."""
    made, token = caches(pair), torch.full((2, 1), 5)
    for asked in (True, False, True, False):
        with torch.no_grad(), counted_launches() as chains:
            ours, theirs = (
                model(token, past_key_values=cache, output_hidden_states=asked)
                for model, cache in zip(pair, made, strict=True)
            )
        assert close(ours.logits, theirs.logits)
        if asked:
            assert all(close(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
        else:
            assert len(chains) == 1 and any(module._forward_hooks for module in pair.fused.model.layers)
    check_caches(*made)


def test_a_configuration_that_asks_for_reports(pair: Pair) -> None:
    made = caches(pair)
    for model in pair:
        model.config.output_hidden_states = True
    with torch.no_grad():
        ours, theirs = (
            model(torch.full((2, 1), 5), past_key_values=cache) for model, cache in zip(pair, made, strict=True)
        )
    assert len(ours.hidden_states) == len(theirs.hidden_states) == LAYERS + 1
    assert all(close(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))


def test_tuples_and_embeddings(pair: Pair) -> None:
    made, token = caches(pair), torch.full((2, 1), 5)
    with torch.no_grad():
        ours, theirs = (
            model(token, past_key_values=cache, return_dict=False) for model, cache in zip(pair, made, strict=True)
        )
        assert isinstance(ours, tuple) and close(ours[0], theirs[0])
        ours, theirs = (
            model(inputs_embeds=model.get_input_embeddings()(token), past_key_values=cache).logits
            for model, cache in zip(pair, made, strict=True)
        )
    assert close(ours, theirs)
    check_caches(*made)


def test_positions_of_its_own(pair: Pair) -> None:
    """A step may say where its tokens stand: far from each other, before the block at hand, or at once for all."""
    made = caches(pair)
    for places in ([[700], [5]], [[5], [900]], [[300]], [[0], [0]]):
        check_launches(pair, made, 1, position_ids=torch.tensor(places))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_rotary_embeddings(kind: str, tmp_path: Path, packs: Path) -> None:
    more: dict[str, Any] = {
        "llama3": dict(low_freq_factor=1.0, high_freq_factor=4.0),
        "yarn": dict(beta_fast=32.0, beta_slow=1.0),
    }
    rope = dict(rope_type=kind, rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, **more.get(kind, {}))
    folder = save("qwen3_moe", tmp_path, rope_parameters=rope, max_position_embeddings=16)
    pair = load_pair(folder, pack_dir=packs, weights="int8", dense="stored")
    with counted_launches() as chains:
        check_generation(pair, IDS, max_new_tokens=24)
    assert len(chains) == 23


def test_a_changed_rotary_embedding_is_noticed(pair: Pair) -> None:
    made = caches(pair)
    for model in pair:
        model.model.rotary_emb.inv_freq.mul_(0.5)
    check_launches(pair, made, 1)
    for model in pair:
        model.model.rotary_emb.attention_scaling = 1.5
    check_launches(pair, made, 1)


@pytest.mark.parametrize("through_data", [False, True])
def test_a_changed_norm_is_noticed(through_data: bool, pair: Pair) -> None:
    """At once, or with the next prompt where it was written through `.data`."""
    made = caches(pair)
    with torch.no_grad():
        for model in pair:
            weight = model.model.norm.weight
            (weight.data if through_data else weight).mul_(3)
    if through_data:
        made = [prefilled(model, IDS) for model in pair]
    check_launches(pair, made, 1)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.sampled_from([bool, int]))
def test_first_seen(rows: list[list[bool]], kind: type) -> None:
    mask = torch.tensor(rows).to(torch.bool if kind is bool else torch.int64)
    starts = first_seen(mask, len(rows), 5)
    left_padded = all(row[-1] and row == sorted(row) for row in rows)
    assert (starts is not None) == left_padded
    if starts is not None:
        assert starts.tolist() == [row.index(True) for row in rows]


def test_masks_that_are_none() -> None:
    assert first_seen(None, 3, 7).tolist() == [0, 0, 0]  # type: ignore[union-attr]
    for mask in (torch.ones(2, 6), torch.ones(3, 7), torch.ones(2, 1, 1, 7), {"full_attention": None}):
        assert first_seen(mask, 2, 7) is None
    assert np.array_equal(first_seen(torch.ones(2, 7, dtype=torch.bfloat16), 2, 7), [0, 0])  # type: ignore[arg-type]
