"""What `load` promises besides the right numbers: an ordinary model, nothing copied, and a clean way back."""

import copy
import gc
import json
import pickle
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_offload
from moe_offload.models.experts_function import HANDLE
from tests import tiny_models
from tests.conftest import Checkpoints


@pytest.fixture
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe")


def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.token_ids() if ids is None else ids).logits  # type: ignore[no-any-return]


def test_from_pretrained_is_the_same(folder: Path) -> None:
    ours = moe_offload.load(folder)
    same = AutoModelForCausalLM.from_pretrained(folder, quantization_config=moe_offload.MoeOffloadConfig(threads=1))
    assert same.offload.options.threads == 1
    assert torch.equal(logits(ours), logits(same))


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_in_another_type_than_it_was_saved_in(family: str, checkpoint: Checkpoints) -> None:
    """Routers are among the tensors whose names differ in the checkpoint."""
    model = moe_offload.load(checkpoint(family), dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in plain.named_parameters()}
    assert {dtypes[name] for name, parameter in model.named_parameters() if dtypes[name] != parameter.dtype} == set()
    assert logits(model).dtype == torch.bfloat16


def test_thread_count_does_not_change_a_bit(folder: Path) -> None:
    outputs = [logits(moe_offload.load(folder, threads=n)) for n in (1, 2, 3)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_expert_weights_stay_in_the_file(tmp_path: Path) -> None:
    """RssAnon must not grow by what the experts weigh (60 MB here; benchmarks/loading.py does it with a GB)."""
    model = tiny_models.build(
        "qwen3_moe", torch.bfloat16, hidden_size=256, moe_intermediate_size=256, num_experts=48, num_hidden_layers=3
    )
    tiny_models.save(model, tmp_path, max_shard_size="20MB")
    del model
    moe_offload.load(tmp_path).offload.close()  # imports and kernels are in memory now
    gc.collect()
    before = _rss_anon()
    loaded = moe_offload.load(tmp_path)
    grown = _rss_anon() - before
    experts = loaded.offload.spec.expert_bytes("bf16")
    rest = sum(p.numel() * p.itemsize for p in loaded.parameters())
    assert experts > 50e6
    assert grown < 0.05 * experts + rest + 5e6  # 5 MB: allocator slack, and Python's own objects


def _rss_anon() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def test_statistics_count_bytes_and_rows(folder: Path) -> None:
    model = moe_offload.load(folder)
    engine = model.offload
    logits(model, tiny_models.token_ids(1, 1))
    counts = engine.statistics.snapshot()
    layer = engine.spec.layers[0]
    assert counts.layer_calls == len(engine.spec.layers) == 3
    assert counts.rows == counts.experts_run == 3 * layer.top_k
    assert counts.bytes_read == counts.experts_run * layer.bytes_per_expert("f32")
    assert counts.seconds > 0
    assert (engine.statistics.snapshot() - counts).rows == 0


def test_odd_calls_of_an_experts_module(folder: Path) -> None:
    """No token, an expert twice in a row, sentinels (expert parallelism's "not mine"), rows of weight zero."""
    ours = moe_offload.load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager")
    layer = ours.offload.spec.layers[0]
    mine, theirs = ours.get_submodule(layer.path), plain.get_submodule(layer.path)
    hidden = torch.randn(4, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    twice = torch.tensor([[1, 1], [2, 2], [0, 3], [3, 0]])
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    with torch.no_grad():
        assert mine(hidden[:0], twice[:0], weights[:0]).shape == (0, layer.hidden_size)
        torch.testing.assert_close(mine(hidden, twice, weights), theirs(hidden, twice, weights), rtol=1e-5, atol=1e-5)
        sentinel = torch.where(twice == 3, layer.num_experts, twice)
        without = torch.where(twice == 3, 0.0, weights)
        torch.testing.assert_close(mine(hidden, sentinel, weights), mine(hidden, twice, without), rtol=0, atol=0)
        assert not mine(hidden, torch.full_like(twice, layer.num_experts), weights).any()


def test_a_module_with_weights_and_no_engine_runs_as_with_transformers(folder: Path) -> None:
    """As the experts of a multi-token-prediction head, which transformers loads beside the model, plainly."""
    moe_offload.load(folder).offload.close()  # the function is registered now
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="grouped_mm")
    expected = logits(plain)
    plain.set_experts_implementation("moe_offload")
    assert torch.equal(logits(plain), expected)


def test_detach_leaves_no_trace(checkpoint: Checkpoints) -> None:
    for model_type in ("qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash", "nemotron_h", "qwen3_vl_moe_text"):
        folder = checkpoint(model_type)
        ours = moe_offload.load(folder)
        plain = type(ours).from_pretrained(folder, dtype="auto")
        engine = ours.offload
        assert engine.detach() is ours
        assert engine.closed
        assert ours.state_dict().keys() == plain.state_dict().keys()
        routed = plain.state_dict()
        for name, value in ours.state_dict().items():
            expected = routed[name]
            if model_type == "longcat_flash" and name.endswith("gate_up_proj"):
                value, expected = value[:8], expected[:8]  # rows of identities are never read
            assert torch.equal(value, expected), name
        assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
        assert ours.config.to_dict() == plain.config.to_dict()
        assert ours.config._experts_implementation == plain.config._experts_implementation
        for mine, theirs in zip(ours.modules(), plain.modules(), strict=True):
            assert mine.__dict__.keys() == theirs.__dict__.keys()
        ids = tiny_models.token_ids()
        with torch.no_grad():
            # torch's products depend on how their operands are aligned in memory, hence no equality of bits
            torch.testing.assert_close(ours(ids)[0], plain(ids)[0], rtol=1e-5, atol=1e-5)


def test_detached_model_can_be_saved(folder: Path, tmp_path: Path) -> None:
    ours = moe_offload.load(folder)
    expected = logits(ours)
    ours.offload.detach().save_pretrained(tmp_path)
    assert torch.allclose(logits(moe_offload.load(tmp_path)), expected, atol=1e-5)


def test_close_ends_the_engine_and_says_so(folder: Path) -> None:
    model = moe_offload.load(folder)
    engine = model.offload
    engine.close()
    engine.close()
    assert not hasattr(model, "offload")
    assert all(HANDLE not in module.__dict__ for module in model.modules())
    with pytest.raises(RuntimeError, match="load it again"):
        logits(model)


def run_until_closed(model: PreTrainedModel, started: threading.Event, problems: list[str]) -> None:
    while True:
        try:
            logits(model)
        except RuntimeError as error:
            problems.append(str(error))
            return
        started.set()


def test_close_waits_for_calls_in_flight(folder: Path) -> None:
    """A call that still read an unmapped file would kill the process."""
    for threads in (1, 2):
        model = moe_offload.load(folder, threads=threads)
        started = threading.Event()
        problems: list[str] = []
        workers = [threading.Thread(target=run_until_closed, args=(model, started, problems)) for _ in range(3)]
        for worker in workers:
            worker.start()
        started.wait(timeout=60)
        model.offload.close()
        for worker in workers:
            worker.join(timeout=60)
        assert len(problems) == 3
        assert all("load" in problem and "again" in problem for problem in problems)


def test_files_are_unmapped_after_close(folder: Path) -> None:
    """transformers keeps mappings of its own for the parameters it loaded; ours must go."""
    model = moe_offload.load(folder)
    before = _mappings(folder)
    skeleton = model.offload._skeleton
    shards = {r.path for w in skeleton.weights.values() for m in w.matrices for r in m.records}
    model.offload.close()
    assert before - _mappings(folder) >= len(shards) > 1


def _mappings(folder: Path) -> int:
    return sum(m.path.startswith(str(folder)) for m in psutil.Process().memory_maps(grouped=False))


def test_a_deep_copy_shares_the_engine(folder: Path) -> None:
    model = moe_offload.load(folder)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model), logits(twin))


def test_pickling_is_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(moe_offload.load(folder))


def test_gradients_are_refused_instead_of_wrong(folder: Path) -> None:
    model = moe_offload.load(folder)
    loss = model(tiny_models.token_ids()).logits.sum()  # with gradients on, as a plain call has them
    with pytest.raises(RuntimeError, match="inference only"):
        loss.backward()


def test_save_pretrained_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        moe_offload.load(folder).save_pretrained(tmp_path)


def test_dtype_can_be_chosen(folder: Path) -> None:
    model = moe_offload.load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    difference = (logits(model).float() - logits(plain)).abs()
    assert difference.mean() < 0.02 * logits(plain).abs().mean()


@pytest.mark.parametrize("format_", ["int5", "", None, 4])
def test_unknown_weights_are_refused(format_: object, folder: Path) -> None:
    with pytest.raises(moe_offload.OptionError, match="is not one of auto, bf16"):
        moe_offload.load(folder, weights=format_)  # type: ignore[arg-type]


def test_weights_must_be_the_stored_ones(folder: Path) -> None:
    assert moe_offload.load(folder, weights="f32").offload.options.weights == "f32"
    with pytest.raises(moe_offload.OptionError, match="stored as f32"):
        moe_offload.load(folder, weights="bf16")


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_thread_counts_out_of_bounds(threads: object, folder: Path) -> None:
    with pytest.raises(moe_offload.OptionError, match="at least 1"):
        moe_offload.load(folder, threads=threads)  # type: ignore[arg-type]


def test_unknown_options_are_errors(folder: Path) -> None:
    with pytest.raises(TypeError, match="thread_count"):
        moe_offload.load(folder, thread_count=2)  # type: ignore[call-arg]


def test_memory_limit(folder: Path) -> None:
    with pytest.raises(moe_offload.NotEnoughMemoryError, match=r"need \d+.* KB.*limit given is 1\.0 KB"):
        moe_offload.load(folder, memory_limit=1000)


def test_memory_is_counted_in_the_dtype_that_is_loaded(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe", torch.bfloat16)
    loaded = moe_offload.load(folder)
    needed = sum(p.numel() * p.itemsize for p in loaded.parameters())
    assert moe_offload.load(folder, memory_limit=needed).offload.options.memory_limit == needed
    with pytest.raises(moe_offload.NotEnoughMemoryError):
        moe_offload.load(folder, memory_limit=needed, dtype=torch.float32)


def test_a_missing_tensor_is_refused_not_invented(folder: Path, tmp_path: Path) -> None:
    """transformers would fill it with random numbers and warn."""
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(
        moe_offload.CheckpointError, match="1 tensors are missing, such as 'model.layers.1.self_attn.q_proj"
    ):
        moe_offload.load(tmp_path)


def test_index_of_another_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = {"weight_map": {"x": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(moe_offload.CheckpointError, match="not a safetensors file name"):
        moe_offload.load(tmp_path)
