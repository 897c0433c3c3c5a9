"""Placements and predictions of `moe-offload plan`, against figures reckoned by hand, and what must never happen."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.models.errors import OptionError, UnsupportedModelError
from moe_offload.plan_advice import changes_that_fit
from moe_offload.plan_model import (
    PlanServer,
    Wish,
    all_placements,
    best_placement,
    check_wish,
    choose_format,
    judge,
    make_plan,
)
from moe_offload.plan_placement import PROGRAM_BYTES, Budgets, place
from moe_offload.plan_predict import Case, LayerTimes, predict
from moe_offload.plan_rates import COMPUTE, DISK, LINK, MEMORY, Curve, MeasuredHost, ProfileHost
from moe_offload.plan_sizes import ExpertLayers, ModelSizes, PlannedModel
from moe_offload.scheduling.memory_share import LayerKv
from moe_offload.transfer.server_profile import PROFILES, ServerProfile
from tests import tiny_models

MIB = 1 << 20
GB = 10**9


def sizes_of(layers: int = 4, experts: int = 8, top_k: int = 2, kv: int = 1000, movable: bool = True) -> ModelSizes:
    """Experts of 1 MiB; 10 MiB of other weights in bf16; a KV cache of `kv` bytes a position and layer."""
    group = ExpertLayers(layers, experts, top_k, 512, 341, "bf16", MIB, MIB)
    return ModelSizes(
        layers, 512, 4096, "whole", 10.0, "bf16", "bf16", (group,), 10 * MIB, 5 * MIB, 2 * MIB,
        tuple(LayerKv(kv, movable) for _ in range(layers)), 0, 0, 0,
    )  # fmt: skip


def server_of(profile: ServerProfile, gpu: int, ram: int) -> PlanServer:
    return PlanServer(profile.name, True, profile if gpu else None, gpu, ram, 1.0, lambda sizes: ProfileHost(profile))


def round_server(**changes: float) -> ServerProfile:
    """100 GB/s on the card, 10 over the link, 50 on the host; nothing starts in any time."""
    plain: dict[str, Any] = dict(
        memory_gbs=100.0, flops=1e15, link_gbs=10.0, link_latency=0.0, kernel_seconds=0.0, launch_seconds=0.0,
        wait_seconds=0.0, host_read_gbs=50.0, host_flops=1e15, host_expert_seconds=0.0, host_job_seconds=0.0,
    )  # fmt: skip
    return dataclasses.replace(PROFILES["p40"], **(plain | changes))


@pytest.mark.parametrize(
    ("ram", "experts", "disk", "lacking"),
    [
        # 12 MiB of weights, 4 layers x 100 positions x 1000 bytes of cache, 32 experts of 1 MiB
        (PROGRAM_BYTES + 12 * MIB + 400_000 + 32 * MIB, 32 * MIB, 0, 0),
        (PROGRAM_BYTES + 12 * MIB + 400_000 + 5 * MIB, 5 * MIB, 27 * MIB, 0),
        (PROGRAM_BYTES + 12 * MIB + 400_000, 0, 32 * MIB, 0),
        (PROGRAM_BYTES + 12 * MIB, 0, 32 * MIB, 400_000),
        (1, 0, 32 * MIB, PROGRAM_BYTES + 12 * MIB + 400_000 - 1),
    ],
)
def test_memory_of_a_host_without_a_card(ram: int, experts: int, disk: int, lacking: int) -> None:
    found = place(sizes_of(), Budgets(0, ram), 100, 1, 0)
    assert (found.ram_experts, found.disk, found.lacking_ram) == (experts, disk, lacking)
    assert found.runs == (lacking == 0)
    assert (found.gpu, found.slots) == (0, 0)


@pytest.mark.parametrize(
    ("room", "kv_layers", "slots", "kv"),
    [
        # beside 10 MiB of weights; the layer that is computed has its cache twice; 1/16 of the rest is for activations
        (16 * MIB, 0, 15, 0),
        (32 * MIB, 0, 30, 0),
        (64 * MIB, 0, 32, 0),  # there are no more
        (16 * MIB, 4, 15, 4),
        (2 * MIB + MIB // 4, 0, 2, 0),
    ],
)
def test_memory_of_a_card(room: int, kv_layers: int, slots: int, kv: int) -> None:
    sizes = sizes_of()
    per_layer = 100_000
    budget = 10 * MIB + (kv + 1) * per_layer + room
    found = place(sizes, Budgets(budget, GB), 100, 1, kv_layers)
    assert (found.slots, found.gpu_experts, found.gpu_kv) == (slots, slots * MIB, (kv + 1) * per_layer)
    assert found.ram_experts == (32 - slots) * MIB
    assert found.ram_kv == (4 - kv) * per_layer
    assert found.ram_dense == 2 * MIB  # the embedding
    assert found.gpu <= budget and found.runs


def test_a_card_that_is_too_small_says_by_how_much() -> None:
    sizes = sizes_of()
    least = 10 * MIB + 100_000 + 2 * MIB
    lacks = place(sizes, Budgets(least - MIB, GB), 100, 1, 0)
    assert not lacks.runs and lacks.lacking_gpu > MIB
    assert place(sizes, Budgets(least - MIB + lacks.lacking_gpu, GB), 100, 1, 0).runs


def test_kv_that_cannot_move_stays_on_the_card() -> None:
    sizes = sizes_of(movable=False)
    (only,) = all_placements(sizes, Wish("bf16", 1000, 1, Budgets(64 * MIB, GB)))
    assert only.gpu_kv == 5 * 1_000_000 and only.ram_kv == 0


def test_decode_on_the_cpu_is_what_is_read() -> None:
    sizes, profile = sizes_of(), round_server()
    host = ProfileHost(profile)
    found = predict(sizes, place(sizes, Budgets(0, GB), 100, 1, 0), host, 1.0, None, Case(1, 100, 1))
    read = 10 * MIB + 4 * 100_000 + 4 * 2 * MIB  # two experts in each of four layers
    assert found.seconds == pytest.approx(read / 50e9 + host.between(sizes).seconds)
    assert found.parts[MEMORY] == pytest.approx(read / 50e9)


def test_decode_from_disk_is_the_disk() -> None:
    sizes, profile = sizes_of(), round_server()
    half = place(sizes, Budgets(0, PROGRAM_BYTES + 12 * MIB + 400_000 + 16 * MIB), 100, 1, 0)
    found = predict(sizes, half, ProfileHost(profile), 0.5, None, Case(1, 100, 1))
    assert found.parts[DISK] == pytest.approx(4 * 2 * MIB * 0.5 / 0.5e9)
    assert found.limit == DISK


def test_compute_is_the_limit_of_a_slow_cpu() -> None:
    sizes, profile = sizes_of(), round_server(host_flops=1e9)
    found = predict(sizes, place(sizes, Budgets(0, GB), 100, 1, 0), ProfileHost(profile), 1.0, None, Case(1, 100, 1))
    assert found.limit == COMPUTE
    assert found.parts[COMPUTE] >= 4 * 2 * MIB / 1e9


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        # 4 active experts; the CPU takes 4 s for one, the card 1, a copy 6
        (4, 4.0),
        (3, 4.0),  # the CPU has one, or a copy 6: the card 3
        (2, 8.0),  # two on the CPU: 8; one fetched and one on the CPU: 6 + 1
        (0, 12.0),
    ],
)
def test_a_layer_is_divided_as_the_planner_would(there: int, expected: float) -> None:
    times = LayerTimes(8, 4, 0.0, 4.0, 0.0, 1.0, 6.0, 0.0)
    choices = []
    for runs in range(5):
        fetched = max(runs - there, 0)
        choices.append(max(runs * 1.0, fetched * 6.0 + 1.0 if fetched else 0.0, (4 - runs) * 4.0))
    assert times.best[there] == pytest.approx(min(choices))
    assert times.best[there] <= expected


def test_a_link_that_is_fast_is_used_and_named() -> None:
    times = LayerTimes(8, 8, 0.0, 10.0, 0.0, 0.1, 1.0, 0.0)
    assert times.limit[0] == LINK
    assert times.best[0] < 80.0


def test_experts_on_the_card_are_hypergeometric() -> None:
    # 2 of 4 experts active, one on the card: it is wanted half of the time
    times = LayerTimes(4, 2, 0.0, 1.0, 0.0, 0.0, 1e9, 0.0)
    assert sum(seconds for seconds, _ in times.expected(1)) == pytest.approx(0.5 * 1.0 + 0.5 * 2.0)
    assert sum(seconds for seconds, _ in times.expected(4)) == pytest.approx(0.0)
    assert sum(seconds for seconds, _ in times.expected(0.5)) == pytest.approx(0.5 * 1.5 + 0.5 * 2.0)


def test_measured_rates_are_used() -> None:
    host = MeasuredHost(2, 50.0, {"bf16 512x341": Curve((1, 4), (1e-3, 2e-3))}, 10.0, 1e12, 5.0, 1e12, 1e-4, 1e-5, 1e-5)
    sizes = sizes_of()
    assert host.experts(sizes.groups[0], 2, 1).seconds == pytest.approx(2e-3)
    assert host.experts(sizes.groups[0], 2, 2).seconds == pytest.approx(2 * (1e-3 + 1e-3 / 3))
    assert host.experts(sizes.groups[0], 1, 8).seconds == pytest.approx(4e-3)
    assert host.dense(sizes, 1).seconds == pytest.approx(10 * MIB / 10e9)
    modules = dataclasses.replace(sizes, step="modules")
    assert host.dense(modules, 4).seconds == host.dense(sizes, 4).seconds
    assert host.dense(modules, 5).seconds == pytest.approx(10 * MIB / 5e9)
    assert host.between(sizes).seconds == pytest.approx(1e-4 + 4e-5)
    assert host.between(dataclasses.replace(sizes, step="modules")).seconds == pytest.approx(1e-4 + 4 * 10 * 1e-5)


def model_of(folder: Path, **changes: object) -> PlannedModel:
    tiny_models.make_config("qwen3_moe", **changes).save_pretrained(folder)
    return PlannedModel(folder)


def test_sizes_are_those_of_the_model(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    sizes, spec = model.sizes("f32"), model.spec
    assert not model.complete and model.stored == "f32" and model.formats == ("f32", "int8", "int4")
    assert sizes.expert_bytes == spec.expert_bytes("f32")
    assert sizes.dense_bytes + sizes.embedding_bytes == 4 * spec.non_expert_params
    assert sizes.device_bytes == 2 * (spec.non_expert_params - spec.vocab_size * spec.hidden_size)
    assert sizes.step == "whole"
    assert model.sizes("int4").expert_bytes < model.sizes("int8").expert_bytes < sizes.expert_bytes


def test_advice_is_true(tmp_path: Path) -> None:
    """Each change that is proposed makes it fit, by what it says."""
    model = model_of(tmp_path)
    sizes = model.sizes("f32")
    need = PROGRAM_BYTES + sizes.dense_bytes + sizes.embedding_bytes + sizes.expert_bytes
    wish = Wish("f32", 256, 4, Budgets(0, need + sizes.kv_bytes(256, 2)))
    assert judge(sizes, wish) == "runs from disk"
    changes = changes_that_fit(model, wish)
    assert any(each == "--batch 2 instead of 4" for each in changes)
    assert any(each.startswith("--weights int8") for each in changes)
    assert judge(sizes, dataclasses.replace(wish, sequences=2)) == "fits"
    assert judge(sizes, dataclasses.replace(wish, sequences=3)) != "fits"
    assert any("more memory (--ram " in each for each in changes)


def test_auto_is_what_fits(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    whole = {name: model.sizes(name) for name in model.formats}
    for name, sizes in whole.items():
        assert choose_format(model, "auto", sizes.expert_bytes + sizes.dense_bytes + sizes.embedding_bytes) == name
    assert choose_format(model, "auto", 1) == "f32"
    assert choose_format(model, "int4", 1 << 40) == "int4"


@pytest.mark.parametrize(
    ("weights", "context", "sequences", "said"),
    [
        ("int5", 1, 1, "int5 is not one of auto"),
        ("mxfp4", 1, 1, "stored as f32"),
        ("auto", 0, 1, "from 1 to 256"),
        ("auto", 257, 1, "257.*from 1 to 256"),
        ("auto", -5, 1, "out of bounds"),
        ("auto", 1, 0, "--batch 0"),
        ("auto", 1, 1 << 40, "1 to 4096"),
    ],
)
def test_impossible_wishes(weights: str, context: int, sequences: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        check_wish(model_of(tmp_path, max_position_embeddings=256), weights, context, sequences)


def test_a_dense_model_has_no_plan(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedModelError):
        PlannedModel(tmp_path)


SHAPES = st.builds(
    sizes_of, layers=st.integers(1, 6), experts=st.integers(2, 40), top_k=st.integers(1, 4),
    kv=st.integers(0, 300_000), movable=st.booleans(),
)  # fmt: skip
BYTES = st.integers(1, 200 * MIB) | st.integers(1, 1 << 50)


@settings(deadline=None, max_examples=80)
@given(sizes=SHAPES, gpu=st.just(0) | BYTES, ram=BYTES, context=st.integers(1, 1 << 20), sequences=st.integers(1, 64))
def test_placements_never_exceed_budgets(sizes: ModelSizes, gpu: int, ram: int, context: int, sequences: int) -> None:
    wish = Wish("bf16", context, sequences, Budgets(gpu, ram))
    for each in all_placements(sizes, wish):
        if each.runs:
            assert each.gpu <= gpu and each.ram <= ram
        assert each.slots <= sizes.expert_count
        on_card = round(sizes.expert_bytes * each.slots / sizes.expert_count)
        assert on_card + each.ram_experts + each.disk == sizes.expert_bytes
        assert min(dataclasses.astuple(each)) >= 0


@settings(deadline=None, max_examples=60)
@given(
    sizes=SHAPES, gpu=st.just(0) | BYTES, ram=BYTES, more=BYTES, context=st.integers(1, 4096),
    sequences=st.integers(1, 64), on_card=st.booleans(), server=st.sampled_from(sorted(PROFILES)),
)  # fmt: skip
def test_more_memory_is_never_slower(
    sizes: ModelSizes, gpu: int, ram: int, more: int, context: int, sequences: int, on_card: bool, server: str
) -> None:
    profile = PROFILES[server]
    seconds = []
    for extra in (0, more):
        budgets = Budgets(gpu + extra * (on_card and gpu > 0), ram + extra * (not on_card))
        wish = Wish("bf16", context, sequences, budgets)
        _, found = best_placement(sizes, wish, server_of(profile, budgets.gpu, budgets.ram), ProfileHost(profile))
        seconds.append(found.seconds if found else float("inf"))
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    return model_of(tmp_path_factory.mktemp("tiny"))


@settings(deadline=None, max_examples=40)
@given(gpu=st.just(0) | BYTES, ram=BYTES, context=st.integers(1, 256), sequences=st.integers(1, 4096))
def test_a_plan_is_always_made(tiny: PlannedModel, gpu: int, ram: int, context: int, sequences: int) -> None:
    plan = make_plan("tiny", tiny, server_of(PROFILES["t4"], gpu, ram), "auto", context, sequences)
    assert (plan.decode is None) == (plan.verdict == "does not fit")
    assert (plan.reason == "") == (plan.verdict == "fits")
    if plan.decode is not None and plan.prompt is not None:
        assert plan.decode.tokens_per_second > 0 and plan.prompt.tokens_per_second > 0
        assert sum(plan.decode.parts.values()) == pytest.approx(plan.decode.seconds)
