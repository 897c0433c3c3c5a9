"""Models whose experts were converted at load: what they compute, what they say, and that they are converted once."""

import logging
import shutil
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_offload
from moe_offload import conversion, pack_cache
from moe_offload.convert_model import read_experts
from moe_offload.cpu_kernels import packed_experts
from moe_offload.options import Activations, Options
from moe_offload.packs import find_pack, make_pack
from tests import pack_cases, tiny_models
from tests.conftest import Checkpoints
from tests.models.test_prequantised import fp8_checkpoint, mxfp4_checkpoint
from tests.pack_cases import SIZES, logits, off

# Biases, transposed and interleaved (gpt_oss), without a gate (nemotron_h), identities (longcat_flash), input scaled
# (llama4), one tensor per expert (qwen3_moe, mixtral). Each pair of activation and format is a kernel to compile.
CASES = (
    ("qwen3_moe", "int8"), ("qwen3_moe", "int4"), ("mixtral", "int4"), ("gpt_oss", "int8"), ("nemotron_h", "int4"),
    ("llama4_text", "int8"), ("longcat_flash", "int4"),
)  # fmt: skip


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """With everything but the experts as stored."""
    return moe_offload.load(folder, dense="stored", **options)


@pytest.fixture
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", **SIZES)


@pytest.mark.parametrize(("arch", "weights"), CASES)
def test_logits_are_those_of_the_packed_weights(
    arch: str, weights: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the order of additions may differ: f32 sums of up to a hundred terms, through three layers."""
    ours = load(checkpoint(arch), weights=weights, activations="f32", pack_dir=tmp_path)
    found = logits(ours)
    assert ours.offload.weights == weights
    plain = pack_cases.detach_with_packed_weights(ours, monkeypatch)
    torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["auto", "int16", "f32"])
def test_int8_is_close_to_eager(folder: Path, tmp_path: Path, activations: str) -> None:
    """A group's 32 normal weights reach about 2.1 deviations, so a step is 2.1 / 127 of one and its rounding errs by
    1 / sqrt(12) of that: 0.5 % for a product. Three layers of it, and activations of 8 bits (1 % where "auto" takes
    them), stay below 2 %. int4, with 16 times the step and a better choice of it, is measured at some 7 %.
    """
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager"))
    int8 = load(folder, weights="int8", activations=activations, pack_dir=tmp_path)
    int4 = load(folder, weights="int4", activations=activations, pack_dir=tmp_path)
    assert off(logits(int8), expected) < 0.02
    assert off(logits(int8), expected) < off(logits(int4), expected) < 0.2


def test_thread_count_changes_neither_pack_nor_logits(folder: Path, tmp_path: Path) -> None:
    outputs = []
    for threads in (1, 2, 3):
        place = tmp_path / str(threads)
        outputs.append(logits(load(folder, weights="int4", threads=threads, pack_dir=place)))
        assert pack_cases.pack_in(place).read_bytes() == pack_cases.pack_in(tmp_path / "1").read_bytes()
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_large_experts_are_split_over_threads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no memory for an expert in each thread, all threads share the blocks of one."""
    load(folder, weights="int4", threads=2, pack_dir=tmp_path / "each")
    monkeypatch.setattr(conversion, "_IN_FLIGHT", 1)
    load(folder, weights="int4", threads=2, pack_dir=tmp_path / "shared")
    each, shared = (pack_cases.pack_in(tmp_path / name).read_bytes() for name in ("each", "shared"))
    assert each == shared


def test_second_load_converts_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[str, int, int]] = []
    first = load(folder, weights="int8", pack_dir=tmp_path, progress=lambda *each: reports.append(each))
    assert first.offload.pack == pack_cases.pack_in(tmp_path)
    experts = first.offload.spec.expert_bytes("f32")
    assert [each[1:] for each in reports if each[0] == "converting experts"][-1] == (experts, experts)
    assert any(each[0] == "checking the pack" for each in reports)
    reports.clear()
    monkeypatch.setattr("moe_offload.packs.convert", None)
    second = load(folder, weights="int8", pack_dir=tmp_path, progress=lambda *each: reports.append(each))
    assert all(each[0].startswith("compiling") for each in reports)
    assert torch.equal(logits(first), logits(second))


def test_statistics_count_packed_bytes(folder: Path, tmp_path: Path) -> None:
    model = load(folder, weights="int4", pack_dir=tmp_path, gemm_rows=1)
    logits(model)
    counts, layer = model.offload.statistics.snapshot(), model.offload.spec.layers[0]
    assert counts.bytes_read == counts.experts_run * layer.bytes_per_expert("int4")
    assert counts.torch_experts == 0


def test_detach_gives_the_stored_weights_back(folder: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    model = load(folder, weights="int4", pack_dir=tmp_path).offload.detach()
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_close_unmaps_the_pack(folder: Path, tmp_path: Path) -> None:
    model = load(folder, weights="int8", pack_dir=tmp_path)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    model.offload.close()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_mxfp4_is_reordered_and_nothing_else(tmp_path: Path) -> None:
    folder = mxfp4_checkpoint(tmp_path / "model")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for weights in ("mxfp4", "auto"):
        ours = load(folder, weights=weights, activations="f32", dtype=torch.float32, pack_dir=tmp_path / "packs")
        assert ours.offload.weights == "mxfp4" and ours.offload.pack is not None
        torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_quantised_checkpoints_convert_from_their_values(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fp8_checkpoint(tmp_path / "model") if kind == "fp8" else mxfp4_checkpoint(tmp_path / "model")
    options: dict[str, Any] = dict(weights="int8", activations="f32", pack_dir=tmp_path / "packs")
    ours = load(folder, **options)
    stored = load(folder, **options).offload.detach().state_dict()
    packed = pack_cases.detach_with_packed_weights(ours, monkeypatch).state_dict()
    for name, value in stored.items():
        if "experts" in name:
            step = value.float().abs().max() / 127  # half of it is int8's error; bf16, which both are in, has 2^-8
            assert (packed[name].float() - value.float()).abs().max() <= step
        else:
            assert torch.equal(packed[name], value)


def test_auto_takes_what_fits(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = load(folder, pack_dir=tmp_path)
    assert stored.offload.weights == "f32" and stored.offload.pack is None
    spec = stored.offload.spec
    others = sum(p.numel() * p.itemsize for p in stored.parameters())
    assert not any(tmp_path.iterdir()) and not caplog.records
    for weights, limit in (
        ("f32", others + spec.expert_bytes("f32")),
        ("int8", others + spec.expert_bytes("f32") - 1),
        ("int8", others + spec.expert_bytes("int8")),
        ("int4", others + spec.expert_bytes("int8") - 1),
        ("int4", others + spec.expert_bytes("int4")),
        ("f32", others + spec.expert_bytes("int4") - 1),
    ):
        caplog.clear()
        model = load(folder, memory_limit=limit, pack_dir=tmp_path)
        assert model.offload.weights == weights
        fits = limit >= others + spec.expert_bytes("f32")
        assert fits or "the model needs" in caplog.records[0].getMessage()
    assert "from disk" in caplog.text


def test_auto_stays_with_what_is_stored_when_there_is_no_place(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    stored = load(folder)
    limit = sum(p.numel() * p.itemsize for p in stored.parameters()) + stored.offload.spec.expert_bytes("int8")
    model = load(folder, memory_limit=limit, pack_dir=tmp_path / "file" / "packs")
    assert model.offload.weights == "f32"
    assert "run as they are stored" in caplog.text and "--pack-dir" in caplog.text


def test_other_weights_have_another_pack(folder: Path, tmp_path: Path) -> None:
    """The same headers and sizes: only the content differs."""
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    for shard in other.glob("*.safetensors"):
        save_file({name: value * 2 for name, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    names = [
        load(each, weights="int8", pack_dir=tmp_path / "packs").offload.pack.name for each in (folder, copy, other)
    ]
    assert names[0] == names[1] != names[2]


def test_the_hubs_hashes_stand_for_the_content(folder: Path, tmp_path: Path) -> None:
    """In its cache a shard is a link to blobs/SHA-256."""
    (tmp_path / "blobs").mkdir()
    names = []
    for digit in "ab":
        snapshot = tmp_path / f"snapshots-{digit}"
        shutil.copytree(folder, snapshot)
        for number, shard in enumerate(sorted(snapshot.glob("*.safetensors"))):
            blob = tmp_path / "blobs" / (digit + f"{number:063x}")
            shard.rename(blob)
            shard.symlink_to(blob)
        names.append(load(snapshot, weights="int8", pack_dir=tmp_path / "packs").offload.pack.name)
    assert names[0] != names[1]


def test_packs_are_in_the_users_cache_unless_told_otherwise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr("moe_offload.packs.default_folder", pack_cache.default_folder)
    model = load(folder, weights="int8")
    assert model.offload.pack.parent == tmp_path / "moe-offload" / "packs"


def test_experts_that_only_their_module_can_run(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """muse_spark has a norm behind each expert."""
    folder = checkpoint("muse_spark_text")
    with pytest.raises(moe_offload.UnsupportedModelError, match="have to stay f32"):
        load(folder, weights="int8", pack_dir=tmp_path)
    needed = sum(p.numel() * p.itemsize for p in load(folder).parameters())
    assert load(folder, memory_limit=needed, pack_dir=tmp_path).offload.weights == "f32"


def test_weights_that_no_integer_stands_for(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(folder, damaged)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    (shard,) = (path for path in damaged.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][3, 3] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(moe_offload.UnsupportedModelError, match=r"layers\.1\.mlp\.experts, expert 5: .*weights='f32'"):
        load(damaged, weights="int4", pack_dir=tmp_path / "packs")


def test_memory_of_a_conversion_is_bounded(folder: Path, tmp_path: Path) -> None:
    """Two threads hold an expert each (0.4 MB as stored), whatever the size of a layer (19 MB)."""
    model = tiny_models.build(
        "qwen3_moe", torch.bfloat16, hidden_size=256, moe_intermediate_size=256, num_experts=48, num_hidden_layers=2
    )
    tiny_models.save(model, tmp_path / "model", max_shard_size="20MB")
    options = Options(threads=2, pack_dir=tmp_path / "packs")
    small, large = read_experts(folder), read_experts(tmp_path / "model")
    make_pack(find_pack(small, "int4", options), small)  # kernels are in memory now
    cache = find_pack(large, "int4", options)
    tracemalloc.start()
    try:
        make_pack(cache, large).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert large.nbytes > 35e6 and peak < 8e6


def test_options_offer_what_the_kernels_do() -> None:
    """options.py is imported by the command line, which cannot wait for Numba."""
    assert get_args(Activations) == get_args(packed_experts.Activations)


def test_log_says_what_was_written(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moe_offload"):
        load(folder, weights="int8", pack_dir=tmp_path)
    assert "wrote" in caplog.text
