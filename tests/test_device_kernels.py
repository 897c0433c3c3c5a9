"""Models whose experts run by our CUDA kernels, through the public path: the device is virtual, the kernels' sources
run on the CPU behind the shim, the rest is what a card would do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moe_offload.device_costs import _ModelBench
from moe_offload.device_experts import product_type
from moe_offload.device_stats import stats_table
from moe_offload.expert_kernels import say_without
from moe_offload.gpu_kernels.graph import GraphedLayer, Launches, capture_cuda
from moe_offload.gpu_kernels.launch import KernelError
from tests import tiny_models
from tests.conftest import Checkpoints
from tests.device_cases import expected, generate, on_cpu, on_device, padded, side_of
from tests.gpu_kernels.host_kernels import HostKernels, needs_compiler
from tests.models.test_prequantised import mxfp4_checkpoint

pytestmark = needs_compiler


class Counted(HostKernels):
    """Counts launches by kernel."""

    launches: dict[str, int]

    def get(self, source: str, name: str, macros: tuple[tuple[str, int], ...] = ()) -> Any:
        kernel = super().get(source, name, macros)
        counts = self.__dict__.setdefault("launches", {})

        def launch(*args: Any, **kwargs: Any) -> None:
            counts[name] = counts.get(name, 0) + 1
            kernel(*args, **kwargs)

        return launch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    found = Counted()
    monkeypatch.setattr("moe_offload.device_experts.expert_kernels", lambda accelerator: found)
    yield found


def same(model: PreTrainedModel, folder: Path, ids: torch.Tensor, **ways: Any) -> None:
    assert generate(model, ids, **ways) == expected(folder, ids, **ways)


# dense layers first, biases, sinks, no gate, shared experts, weights applied before the expert
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss", "jamba", "llama4_text", "nemotron_h"]
)
def test_tokens_are_those_of_the_cpu(family: str, checkpoint: Checkpoints, kernels: Counted) -> None:
    folder = checkpoint(family)
    ids = tiny_models.token_ids(2, 12)
    with on_device(folder, 16) as model:
        same(model, folder, ids, **padded(ids, [0, 3]))
        assert side_of(model).cache.total().fetches > 0
        assert kernels.launches["gate_up"] == kernels.launches["down"] > 0


def test_a_decoded_token_takes_four_launches_a_layer(checkpoint: Checkpoints, kernels: Counted) -> None:
    """All of a layer's experts that the token is routed to are on the device."""
    folder = checkpoint("qwen3_moe")
    with on_device(folder, 200, policy="lru") as model, torch.no_grad():
        for _ in range(2):  # the second time all that it asks for is there
            prompt = model(tiny_models.token_ids(1, 5), use_cache=True)
            kernels.launches.clear()
            model(torch.tensor([[7]]), past_key_values=prompt.past_key_values)
        layers = len(model.offload.spec.layers)
        assert kernels.launches == dict.fromkeys(("export_layer", "gate_up", "down", "join"), layers)


def test_prompts_go_through_tiles(checkpoint: Checkpoints, kernels: Counted) -> None:
    folder = checkpoint("qwen3_moe", num_experts=16)
    ids = tiny_models.token_ids(1, 150)
    with on_device(folder, 24) as model:
        same(model, folder, ids, max_new_tokens=3)
        assert kernels.launches["gather_rows"] > 0 and kernels.launches["gate_up"] > 0


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_experts(weights: str, checkpoint: Checkpoints, kernels: Counted) -> None:
    """The same packed weights on both sides, with activations in 16 bits here and f32 there: 3e-5 of a group's largest
    for each product.
    """
    folder = checkpoint("mixtral", hidden_size=64, intermediate_size=96)
    options: dict[str, Any] = dict(weights=weights, activations="f32", dense="stored")
    ids = tiny_models.token_ids(2, 11)
    with on_device(folder, 6, **options) as model, torch.no_grad():
        reference = on_cpu(folder, **options)
        wanted = reference(ids).logits
        assert (model(ids).logits - wanted).abs().max() < 3e-4 * wanted.abs().max()
        assert generate(model, ids) == generate(reference, ids)
        assert kernels.launches["gate_up"] > 0


def test_mxfp4_as_stored(tmp_path: Path, kernels: Counted) -> None:
    """gpt-oss as published: packed experts with biases; bf16 around them."""
    folder = mxfp4_checkpoint(tmp_path)
    options: dict[str, Any] = dict(activations="f32", dense="stored")
    ids = tiny_models.token_ids(2, 11)
    with on_device(folder, 8, **options) as model, torch.no_grad():
        cpu, found = on_cpu(folder, **options)(ids).logits.float(), model(ids).logits.float()
        assert model.offload.weights == "mxfp4" and kernels.launches["gate_up"] > 0
        assert (found - cpu).abs().mean() < 0.01 * cpu.abs().mean()
        assert (found - cpu).abs().max() < 0.05 * cpu.abs().max()


def test_bf16_within_its_rounding(checkpoint: Checkpoints, kernels: Counted) -> None:
    """As much as the CPU's own answer is away from that of float32 weights."""
    folder = checkpoint("qwen3_moe", torch.bfloat16)
    ids = tiny_models.token_ids(2, 11)
    exact = on_cpu(folder, dtype=torch.float32)
    with on_device(folder, 12, contexts=8) as model, torch.no_grad():
        truth, cpu, found = (each(ids).logits.float() for each in (exact, on_cpu(folder), model))
        assert (found - truth).abs().mean() < 1.5 * (cpu - truth).abs().mean() + 1e-6


def test_losing_the_device_and_memory_loses_no_token(checkpoint: Checkpoints, kernels: Counted) -> None:
    folder = checkpoint("qwen3_moe", num_experts=16)
    ids = tiny_models.token_ids(1, 9)
    with on_device(folder, 20) as model:
        device: Any = side_of(model).accelerator
        device.fail_after(100)
        same(model, folder, ids)
        assert model.offload.device is None
    with on_device(folder, 20) as model:
        side_of(model).give_up_slots()
        same(model, folder, ids)


def test_layers_that_are_whole_on_the_device_wait_for_nobody(
    checkpoint: Checkpoints, kernels: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe")
    ids = tiny_models.token_ids(1, 9)
    with on_device(folder, 400) as model:
        generate(model, ids)
        side = side_of(model)
        before = side.stats()
        waits = []
        monkeypatch.setattr(type(side.accelerator.compute), "synchronize", lambda stream: waits.append(stream))
        same(model, folder, ids)
        after = side.stats()
        layers = len(model.offload.spec.layers)
        assert not waits
        assert [new.whole - old.whole for new, old in zip(after.layers, before.layers, strict=True)] == [8] * layers
        assert [new.calls - old.calls for new, old in zip(after.layers, before.layers, strict=True)] == [0] * layers
        assert after.hit_rate == 1.0 and after.steps >= 16
        assert f"run {16 * layers} times without waiting" in str(stats_table(after)[0])


def test_whole_layers_and_others_take_turns(checkpoint: Checkpoints, kernels: Counted) -> None:
    """Long prompts go through the dispatcher; memory that is given up makes tables void."""
    folder = checkpoint("qwen3_moe", num_experts=16)
    long, short = tiny_models.token_ids(1, 150), tiny_models.token_ids(3, 7)
    with on_device(folder, 400, contexts=12) as model:
        same(model, folder, long, max_new_tokens=3)
        same(model, folder, short, num_beams=2)
        side = side_of(model)
        whole = sum(layer.whole for layer in side.stats().layers)
        assert whole > 0
        while len(side.slots) >= 16 * len(model.offload.spec.layers):
            assert side.give_up_slots()
        same(model, folder, short)
        assert sum(layer.whole for layer in side.stats().layers) == whole


def test_kernels_that_cannot_be_compiled_are_done_without(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(HostKernels):
        def get(self, source: str, name: str, macros: tuple[tuple[str, int], ...] = ()) -> Any:
            raise KernelError(f"{source} cannot be compiled: no such card")

    monkeypatch.setattr("moe_offload.device_experts.expert_kernels", lambda accelerator: Broken())
    say_without.cache_clear()
    folder = checkpoint("qwen3_moe")
    with on_device(folder, 16) as model:
        same(model, folder, tiny_models.token_ids(1, 9))
        assert side_of(model).kernels is None
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "torch's operations" in warnings[0] and "no such card" in warnings[0]


@pytest.mark.parametrize(
    ("capability", "stored", "dtype", "wanted"),
    [
        (None, "int4", torch.bfloat16, torch.float32),  # a virtual device computes on the CPU
        ((6, 1), "int4", torch.float16, torch.float32),  # a GTX 1080 Ti
        ((7, 0), "int4", torch.float16, torch.float16),  # a V100
        ((7, 5), "bf16", torch.float16, torch.float32),  # a T4, weights that may not fit
        ((7, 5), "f16", torch.float16, torch.float16),
        ((8, 6), "bf16", torch.bfloat16, torch.bfloat16),
        ((8, 6), "mxfp4", torch.bfloat16, torch.bfloat16),
        ((9, 0), "f16", torch.float16, torch.float16),
        ((9, 0), "f32", torch.float32, torch.float32),
    ],
)
def test_what_products_are_computed_in(
    capability: tuple[int, int] | None, stored: str, dtype: torch.dtype, wanted: torch.dtype
) -> None:
    assert product_type(capability, stored, dtype) == wanted


def test_whole_layers_as_graphs(checkpoint: Checkpoints, kernels: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays the launches it was made of, whatever is in its tensors by then: here, by calling them again."""
    made = []

    def capture(launches: Launches) -> Launches:
        launches()
        made.append(launches)
        return launches

    monkeypatch.setattr(GraphedLayer.__init__, "__defaults__", (capture,))
    folder = checkpoint("qwen3_moe")
    with on_device(folder, 400, cuda_graphs=True) as model:
        layers = len(model.offload.spec.layers)
        for seed in range(3):
            same(model, folder, tiny_models.token_ids(1, 9, seed=seed))
        assert len(made) == 2 * layers  # of the prompt, and of a token
        assert sum(layer.whole for layer in side_of(model).stats().layers) == 3 * 8 * layers


def test_a_graph_is_captured_behind_a_run_that_loads_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            said.append("wait")

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def within(what: str) -> Iterator[None]:
        said.append(f"begin {what}")
        yield
        said.append(f"end {what}")

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within("aside"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: within("capture"))
    replay = capture_cuda(lambda: said.append("launch"))
    replay()
    aside, captured = ["begin aside", "launch", "end aside"], ["begin capture", "launch", "end capture"]
    assert said == ["wait", *aside, "wait", *captured, "replay"]


def test_where_few_rows_end_is_measured(
    checkpoint: Checkpoints, kernels: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe", num_experts=16)
    with on_device(folder, 20) as model:
        side = side_of(model)
        experts = side._parts[0].device
        used, budget = side.accelerator.used, side.accelerator.budget
        side.accelerator.budget *= 8  # experts are measured before there are slots
        side.dispatcher.copies.drain()
        with _ModelBench(side.accelerator, side._parts, {"experts": 0}, side.store) as bench:
            kernels.launches.clear()
            bench.run_gpu("experts", [3, 1])
            assert kernels.launches == {"export_layer": 1, "gate_up": 1, "down": 1}
            bench.find_crossovers()  # on this clock two launches are always less than seven
            assert experts.few_rows == 64
            kernels.launches.clear()
            bench.run_gpu("experts", [65, 70])
            assert kernels.launches["gather_rows"] == 2 and "gate_up" not in kernels.launches
            monkeypatch.setattr(bench, "_seconds", lambda kind, rows: float(rows if experts.few_rows else 10))
            bench.find_crossovers()
            assert experts.few_rows == 8
        assert side.accelerator.used == used
        side.accelerator.budget = budget
        same(model, folder, tiny_models.token_ids(1, 12))
