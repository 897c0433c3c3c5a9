"""The format of a model's own modules on cards without bfloat16: decided, checked, said, and generated with.

There is no card: its facts are made up, and the virtual accelerator, which computes on the CPU, stands in its place.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moe_offload
from moe_offload.device_dtype import choose_dtype, converts
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.expert_weights import locate_experts
from moe_offload.models.range_check import RangeFacts, check_range, loaded_floats
from moe_offload.models.spec import MoeSpec, build_skeleton
from tests import tiny_models
from tests.card_cases import NAMES, card, put_in, warnings_in
from tests.conftest import Checkpoints
from tests.device_cases import generate, on_cpu
from tests.models.test_prequantised import fp8_checkpoint

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
OLD = [(6, 0), (6, 1), (7, 0), (7, 5)]

WithCard = Callable[[tuple[int, int]], None]
Notes = Callable[[], list[str]]


@pytest.fixture
def with_card(monkeypatch: pytest.MonkeyPatch) -> WithCard:
    """with_card(capability): this machine has such a card from now on."""
    return lambda capability: put_in(monkeypatch, card(capability))


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Notes:
    """Warnings so far."""
    return lambda: warnings_in(caplog)


# Deciding


@pytest.mark.parametrize("capability", OLD)
def test_bf16_becomes_f16_where_there_is_none(capability: tuple[int, int]) -> None:
    choice = choose_dtype(card(capability), BF16, "auto", RangeFacts(10**9))
    assert (choice.dtype, choice.converted) == (F16, True)
    major, minor = capability
    assert choice.note.startswith(f"{card(capability).name} (compute capability {major}.{minor}) has no bfloat16")
    assert "float16" in choice.note and "zero" not in choice.note


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("requested", ["auto", "bfloat16", BF16, F32])
def test_cards_with_bf16_get_what_is_asked_for(capability: tuple[int, int], requested: Any) -> None:
    choice = choose_dtype(card(capability), BF16, requested)
    assert (choice.dtype, choice.note, choice.converted) == (requested, "", False)


@pytest.mark.parametrize("requested", ["float16", F16, "float32", F32])
@pytest.mark.parametrize("stored", [BF16, F16, F32])
def test_another_format_that_is_named_is_taken(stored: torch.dtype, requested: Any) -> None:
    assert not converts(card((6, 1)), stored, requested)
    choice = choose_dtype(card((6, 1)), stored, requested)
    assert (choice.dtype, choice.note) == (requested, "")


@pytest.mark.parametrize("stored", [F16, F32])
@pytest.mark.parametrize("requested", ["auto", None])
def test_other_checkpoints_stay_as_they_are(stored: torch.dtype, requested: Any) -> None:
    choice = choose_dtype(card((6, 1)), stored, requested)
    assert (choice.dtype, choice.note) == (requested, "")


@pytest.mark.parametrize("stored", [BF16, F16, F32])
@pytest.mark.parametrize("requested", ["bfloat16", BF16])
def test_bf16_by_name_is_obeyed_and_its_cost_said(stored: torch.dtype, requested: Any) -> None:
    choice = choose_dtype(card((7, 0)), stored, requested)
    assert (choice.dtype, choice.converted) == (requested, False)
    assert "V100" in choice.note and "slow or missing" in choice.note and "--dtype auto" in choice.note


def test_what_does_not_fit_makes_it_f32() -> None:
    choice = choose_dtype(card((7, 5)), BF16, "auto", RangeFacts(10, 0, "model.norm.weight", 98304.0))
    assert (choice.dtype, choice.converted) == (F32, True)
    assert "65504, but model.norm.weight has 98304" in choice.note and "float32" in choice.note


def test_weights_that_vanish_are_said_where_they_are_many() -> None:
    few = choose_dtype(card((7, 5)), BF16, "auto", RangeFacts(1000, 1))
    many = choose_dtype(card((7, 5)), BF16, "auto", RangeFacts(1000, 25))
    assert few.dtype == many.dtype == F16
    assert "zero" not in few.note and "2.5 % of them are so small that they become zero" in many.note


def test_a_conversion_wants_the_range() -> None:
    with pytest.raises(ValueError, match="range"):
        choose_dtype(card((6, 1)), BF16, "auto")


# Checking


def _facts(folder: Path, **tensors: torch.Tensor) -> RangeFacts:
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    records = [record for record in checkpoint.records.values() if record.dtype[0] != "F" or record.dtype[1] != "8"]
    try:
        return check_range(checkpoint, sorted(records, key=lambda record: record.offset))
    finally:
        checkpoint.close()


def _truth(values: torch.Tensor) -> tuple[int, float]:
    """By torch's own conversion."""
    half = values.to(F16)
    lost = half.isinf() & values.isfinite()
    vanishing = int(((half == 0) & (values != 0)).sum())
    return vanishing, float(values[lost].double().abs().max()) if bool(lost.any()) else 0.0


def test_every_bf16_number_as_torch_converts_it(tmp_path: Path) -> None:
    values = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(BF16)
    facts = _facts(tmp_path, every=values)
    assert (facts.vanishing, facts.largest) == _truth(values)
    assert (facts.misfit, facts.values) == ("every", 1 << 16)
    fitting = values[~(values.isfinite() & values.to(F16).isinf())]
    facts = _facts(tmp_path, some=fitting)
    assert facts == RangeFacts(len(fitting), _truth(fitting)[0])  # infinities and NaN stay what they are


@pytest.mark.parametrize(("number", "fits"), [(65280.0, True), (-65280.0, True), (65536.0, False), (-65536.0, False)])
def test_where_bf16_ceases_to_fit(number: float, fits: bool, tmp_path: Path) -> None:
    facts = _facts(tmp_path, one=torch.tensor([1.0, number, float("inf")], dtype=BF16))
    assert facts == (RangeFacts(3) if fits else RangeFacts(3, 0, "one", 65536.0))


EDGES = [0.0, 65504.0, 65519.0, 65519.996, 65520.0, 65536.0, 1e5, 3e38, 2.0**-24, 2.0**-25, 2.9803e-8, 2.9e-8, 1e-40]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(EDGES) | st.floats(width=32), min_size=1, max_size=12), st.booleans())
def test_f32_numbers_as_torch_converts_them(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[float], minus: bool
) -> None:
    values = torch.tensor(numbers, dtype=F32) * (-1 if minus else 1)
    facts = _facts(tmp_path_factory.mktemp("f32"), one=values)
    assert (facts.vanishing, facts.largest) == _truth(values)


def test_the_first_tensor_in_the_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    small, large = torch.full((3, 5), 1e-9, dtype=BF16), torch.full((4,), -1e5, dtype=BF16)
    facts = _facts(tmp_path, a=small, b=large, c=large * 4, d=torch.zeros(0, dtype=BF16))
    assert facts == RangeFacts(19, 15, "b", float(-large[0]))


@pytest.mark.parametrize(("scale", "fits"), [(146.0, True), (147.0, False)])
def test_fp8_is_judged_by_its_scales(scale: float, fits: bool, tmp_path: Path) -> None:
    """Its largest number is 448."""
    weight = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    for dtype in (F32, BF16):
        facts = _facts(tmp_path, w=weight, w_scale_inv=torch.tensor([[1.0, scale]], dtype=dtype))
        assert (facts.misfit is None) == fits and (fits or facts.largest == 448 * scale)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3_000_000, dtype=BF16), "b": torch.ones(7)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    seen: list[tuple[int, int]] = []
    check_range(checkpoint, list(checkpoint.records.values()), lambda done, total: seen.append((done, total)))
    checkpoint.close()
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == (6_000_028, 6_000_028)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_all_that_is_loaded_is_looked_at_and_no_expert(family: str, checkpoint: Checkpoints) -> None:
    folder = checkpoint(family, BF16)
    model = on_cpu(folder)
    found = Checkpoint.open(folder)
    skeleton = build_skeleton(model.config)
    weights = locate_experts(skeleton, found, MoeSpec.from_hf(model.config, skeleton))
    experts = set().union(*(each.keys for each in weights.values()))
    records = loaded_floats(skeleton, found, experts)
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    state = model.state_dict()
    wanted = {name for name in state if not any(part in name for part in kept)}
    # some are stored under other names, but as many of them, and as large
    assert sorted(r.shape for r in records) == sorted(tuple(state[name].shape) for name in wanted)
    assert not experts & {record.name for record in records}
    found.close()


# Loading and generating


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5), (8, 0)])
def test_the_card_decides(
    capability: tuple[int, int], device: str, checkpoint: Checkpoints, with_card: WithCard, notes: Notes
) -> None:
    folder = checkpoint("qwen3_moe", BF16)
    with_card(capability)
    model = moe_offload.load(folder, device=device)
    with model.offload as engine:
        old = capability < (8, 0)
        assert engine.device is not None and engine.weights == "bf16"  # the experts' format stays
        assert model.dtype == (F16 if old else BF16) == model.config.dtype
        assert {each.dtype for each in model.parameters()} == {model.dtype}
        assert len(notes()) == old and all(NAMES[capability] in note for note in notes())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_f16_is_no_further_from_the_truth_than_bf16(family: str, checkpoint: Checkpoints, with_card: WithCard) -> None:
    folder = checkpoint(family, BF16)
    ids = tiny_models.token_ids(2, 11)
    with_card((6, 1))
    with moe_offload.load(folder).offload as engine, torch.no_grad():
        model = engine._model
        assert model.dtype == F16
        truth, bf16, found = (each(ids).logits.float() for each in (on_cpu(folder, dtype=F32), on_cpu(folder), model))
        assert (found - truth).abs().mean() <= 1.1 * (bf16 - truth).abs().mean()
        assert len(generate(model, ids)[0]) == 19


def _planted(folder: Path, target: Path, tensor: str, value: float) -> Path:
    """A copy of a checkpoint with one weight changed, in the shard that has it."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor].view(-1)[-1] = value
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.2.self_attn.q_norm.weight", "lm_head.weight"])
def test_a_weight_that_does_not_fit(
    tensor: str, tmp_path: Path, checkpoint: Checkpoints, with_card: WithCard, notes: Notes
) -> None:
    folder = _planted(checkpoint("qwen3_moe", BF16), tmp_path / "model", tensor, -1e5)
    with_card((7, 0))
    with moe_offload.load(folder).offload as engine:
        model = engine._model
        assert model.dtype == F32
        assert float(model.state_dict()[tensor].view(-1)[-1]) == float(torch.tensor(-1e5, dtype=BF16))
        assert len(notes()) == 1 and f"{tensor} has 99840" in notes()[0]
        ids = tiny_models.token_ids(1, 5)
        assert generate(model, ids) == generate(on_cpu(folder, dtype=F32), ids)


def test_an_expert_that_does_not_fit_is_nobodys_business(
    tmp_path: Path, checkpoint: Checkpoints, with_card: WithCard, notes: Notes
) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    folder = _planted(checkpoint("qwen3_moe", BF16), tmp_path / "model", name, 1e5)
    assert any(name in load_file(file) for file in folder.glob("*.safetensors"))
    with_card((7, 0))
    with moe_offload.load(folder).offload as engine:
        assert engine._model.dtype == F16 and len(notes()) == 1


def test_fp8_linears_become_f16(tmp_path: Path, with_card: WithCard, notes: Notes) -> None:
    folder = fp8_checkpoint(tmp_path)
    with_card((7, 5))
    with moe_offload.load(folder, weights="int8", dense="stored").offload as engine:
        assert engine.device is not None and {each.dtype for each in engine._model.parameters()} == {F16}
        generate(engine._model, tiny_models.token_ids(1, 5))


@pytest.mark.parametrize("said", ["bfloat16", BF16])
def test_bf16_by_name_is_loaded(said: Any, checkpoint: Checkpoints, with_card: WithCard, notes: Notes) -> None:
    with_card((6, 1))
    with moe_offload.load(checkpoint("qwen3_moe", BF16), dtype=said).offload as engine:
        assert engine._model.dtype == BF16
        assert len(notes()) == 1 and "slow or missing" in notes()[0]


@pytest.mark.parametrize("device", ["cpu", "virtual:gtx1080ti"])
def test_without_a_real_card_nothing_is_converted(
    device: str, checkpoint: Checkpoints, with_card: WithCard, notes: Notes
) -> None:
    with_card((6, 1))
    with moe_offload.load(checkpoint("qwen3_moe", BF16), device=device).offload as engine:
        assert engine._model.dtype == BF16 and not notes()


def test_a_config_that_names_no_format(tmp_path: Path, checkpoint: Checkpoints, with_card: WithCard) -> None:
    """transformers then takes that of the first tensor."""
    folder = _planted(checkpoint("qwen3_moe", BF16), tmp_path / "model", "", 0)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    with_card((7, 0))
    with moe_offload.load(folder).offload as engine:
        assert engine._model.dtype == F16
