"""A device that fails, or runs out of memory, while a text is being generated: the text goes on, token for token."""

import copy
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moe_offload.copies import Copies
from moe_offload.dispatcher import Dispatcher
from moe_offload.layer_tensors import LayerTensors
from moe_offload.transfer.accelerator import DeviceLostError, OutOfDeviceMemoryError
from moe_offload.transfer.copy_queue import CopyQueue
from moe_offload.transfer.device_slots import DeviceSlots
from moe_offload.transfer.expert_cache import ExpertCache
from moe_offload.transfer.virtual import RaceError
from tests import tiny_models
from tests.conftest import Checkpoints
from tests.device_cases import check, expected, generate, on_cpu, on_device, padded, side_of, virtual

Log = pytest.LogCaptureFixture


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", num_experts=16)


def warnings_of(log: Log) -> list[str]:
    """What was warned of since the last call."""
    found = [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]
    log.clear()
    return found


def operations(model: PreTrainedModel, run: Callable[[], Any]) -> int:
    """How many operations of the device `run` takes."""
    before = virtual(model)._host._operations
    run()
    return virtual(model)._host._operations - before


# Lost

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "sampling": dict(do_sample=True, top_k=20),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "chunked prefill": dict(prefill_chunk_size=4),
    "static cache": dict(cache_implementation="static"),
    "no cache": dict(use_cache=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_lost_at_any_moment(way: str, folder: Path, caplog: Log) -> None:
    ids = tiny_models.token_ids(1 if way == "prompt lookup" else 3, 11)
    ways = WAYS[way] | dict(max_new_tokens=6)
    if way != "prompt lookup":
        ways |= padded(ids, [0, 2, 4])
    wanted = expected(folder, ids, **ways)
    with on_device(folder, 20, contexts=9) as model:
        total = operations(model, lambda: generate(model, ids, **ways))
    moments = (0, 1, total // 5, total // 2, total - 5) if way in ("greedy", "beams") else (total // 2, total - 20)
    for moment in moments:
        caplog.clear()
        with on_device(folder, 20, contexts=9) as model:
            virtual(model).fail_after(moment)
            assert generate(model, ids, **ways) == wanted, moment
            (warning,) = warnings_of(caplog)
            assert "does not answer any more" in warning and "goes on with the CPU alone" in warning
            assert model.offload.device is None
            assert generate(model, ids, **ways) == wanted
            assert not warnings_of(caplog)


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "qwen3_next", "jamba", "lfm2_moe"])
def test_lost_with_caches_of_other_kinds(family: str, checkpoint: Checkpoints) -> None:
    """Latents, windows that have moved on, recurrent states: all are computed again."""
    folder = checkpoint(family)
    ids = tiny_models.token_ids(2, 14)
    ways = dict(max_new_tokens=8)
    wanted = expected(folder, ids, **ways)
    with on_device(folder, 8) as model:
        total = operations(model, lambda: generate(model, ids, **ways))
        virtual(model).fail_after(total * 2 // 3)
        assert generate(model, ids, **ways) == wanted
        assert model.offload.device is None


def turns(model: PreTrainedModel, between: Callable[[DynamicCache], None]) -> list[list[int]]:
    """A conversation that goes on with the KV cache of its first turn."""
    cache = DynamicCache(config=model.config)
    first = torch.tensor(generate(model, tiny_models.token_ids(1, 7), past_key_values=cache))
    between(cache)
    return generate(model, torch.cat([first, tiny_models.token_ids(1, 5, seed=1)], dim=1), past_key_values=cache)


@pytest.mark.parametrize("moment", ["between", "soon after", "later"])
def test_a_conversation_goes_on_without_the_device(moment: str, folder: Path) -> None:
    wanted = turns(on_cpu(folder), lambda cache: None)
    with on_device(folder, 20) as model:
        after = {"between": 0, "soon after": 30, "later": 120}[moment]
        assert turns(model, lambda cache: virtual(model).fail_after(after)) == wanted
        assert model.offload.device is None


def test_a_cache_that_outlives_its_device(folder: Path) -> None:
    """The device is lost in one conversation, with all that it held, and another goes on later."""
    wanted = turns(on_cpu(folder), lambda cache: None)
    with on_device(folder, 20) as model:

        def lose(cache: DynamicCache) -> None:
            virtual(model).fail_after(3)
            generate(model, tiny_models.token_ids(2, 4))
            assert model.offload.device is None
            for layer in cache.layers:
                layer.keys.fill_(torch.nan)
                layer.values.fill_(torch.nan)

        assert turns(model, lose) == wanted


def test_a_loop_of_ones_own(folder: Path) -> None:
    """With the cache that the model makes for itself."""

    def run(model: PreTrainedModel, lose: Callable[[], None]) -> list[int]:
        ids, cache, found = tiny_models.token_ids(1, 6), None, []
        for step in range(6):
            if step == 3:
                lose()
            with torch.no_grad():
                answer = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = answer.logits[:, -1:].argmax(-1), answer.past_key_values
            found.append(int(ids))
        return found

    wanted = run(on_cpu(folder), lambda: None)
    with on_device(folder, 20) as model:
        assert run(model, lambda: virtual(model).fail_after(20)) == wanted
        assert model.offload.device is None


def test_what_cannot_be_computed_again_is_said(folder: Path) -> None:
    """Embeddings instead of tokens went into the cache; where only they are on their way, nothing is lost."""
    with on_device(folder, 20) as model, torch.no_grad():
        cache = DynamicCache(config=model.config)
        embedded = model.get_input_embeddings()(tiny_models.token_ids(1, 6))
        model(inputs_embeds=embedded, past_key_values=cache)
        virtual(model).fail_after(20)
        with pytest.raises(DeviceLostError, match=r"does not answer.*tokens.*not known.*generate it again"):
            model(tiny_models.token_ids(1, 1), past_key_values=cache)
        assert model.offload.device is None
        assert generate(model, tiny_models.token_ids(1, 6)) == expected(folder, tiny_models.token_ids(1, 6))
    with on_device(folder, 20) as model, torch.no_grad():
        virtual(model).fail_after(12)
        found = model(inputs_embeds=embedded).logits
        assert model.offload.device is None
        assert torch.equal(found, model(inputs_embeds=embedded).logits)


def test_lost_under_two_threads(folder: Path) -> None:
    ids = [tiny_models.token_ids(1, 9, seed=n) for n in range(2)]
    wanted = [expected(folder, i, max_new_tokens=12) for i in ids]
    with on_device(folder, 20) as model:
        found: list[list[list[int]]] = [[] for _ in ids]

        def work(n: int) -> None:
            found[n] = generate(model, ids[n], max_new_tokens=12)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(ids))]
        virtual(model).fail_after(300)  # of some 740, fewer where the two waited for each other
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == wanted
        assert model.offload.device is None


def test_a_deep_copy_outlives_the_device(folder: Path) -> None:
    ids = tiny_models.token_ids(1, 9)
    with on_device(folder, 20) as model:
        twin = copy.deepcopy(model)
        assert generate(twin, ids) == expected(folder, ids)
        virtual(model).fail_after(100)
        assert generate(model, ids) == expected(folder, ids)
        assert model.offload.device is None
        assert generate(twin, ids) == expected(folder, ids)


# Out of memory


@pytest.mark.parametrize(("slots", "operations"), [(2, 0), (5, 50), (8, 100)])
def test_a_smaller_budget_costs_slots_and_no_tokens(slots: int, operations: int, folder: Path) -> None:
    """By what so many slots take; and then a longer prompt wants more of it."""
    ids, longer = tiny_models.token_ids(2, 11), tiny_models.token_ids(3, 60)
    with on_device(folder, 44, contexts=3) as model:
        accelerator, side = virtual(model), side_of(model)
        generate(model, ids)
        before = len(side.slots)
        accelerator.shrink_budget(accelerator.used - slots * 9216, operations)
        assert generate(model, longer, max_new_tokens=4) == expected(folder, longer, max_new_tokens=4)
        assert generate(model, ids) == expected(folder, ids)
        assert model.offload.device is side
        assert 2 <= len(side.slots) < before
        assert accelerator.used <= accelerator.budget


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "jamba"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, OutOfDeviceMemoryError])
def test_out_of_memory_in_the_midst_of_a_forward(
    family: str, kind: type[Exception], checkpoint: Checkpoints, caplog: Log
) -> None:
    """Some layers have put their share into the cache already, which is taken back."""
    folder = checkpoint(family, **(dict(num_experts=16) if family == "qwen3_moe" else {}))
    ids = tiny_models.token_ids(2, 14)
    ways = dict(max_new_tokens=6)
    with on_device(folder, 12) as model:
        calls = []

        def fail(*_: object) -> None:
            calls.append(0)
            if len(calls) in (1, 4):
                raise kind("a test has no memory")

        side = side_of(model)
        slots = len(side.slots)
        hook = model.model.layers[-1].register_forward_pre_hook(fail)
        assert generate(model, ids, **ways) == expected(folder, ids, **ways)
        hook.remove()
        assert len(calls) >= 8  # 6 tokens, and two that were tried again
        assert sum("is out of memory" in warning for warning in warnings_of(caplog)) == 2
        if kind is torch.OutOfMemoryError:  # what torch takes is not counted, so it is left free from now on
            assert len(side.slots) < slots


def test_no_memory_for_anything(folder: Path, caplog: Log) -> None:
    """Not even two slots and a context: the CPU goes on alone."""
    ids = tiny_models.token_ids(2, 11)
    with on_device(folder, 20) as model:
        generate(model, ids)
        virtual(model).shrink_budget(0, 10)
        assert generate(model, tiny_models.token_ids(3, 90)) == expected(folder, tiny_models.token_ids(3, 90))
        assert model.offload.device is None
        assert sum("goes on with the CPU alone" in warning for warning in warnings_of(caplog)) == 1
        assert generate(model, ids) == expected(folder, ids)


# Interrupted


class Interrupt(BaseStreamer):  # type: ignore[misc]
    """Ctrl-C between two tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None: ...


def test_interrupted_between_tokens(folder: Path) -> None:
    before = set(threading.enumerate())
    ids = tiny_models.token_ids(1, 11)
    with on_device(folder, 20) as model:
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, streamer=Interrupt(4))
        assert generate(model, ids) == expected(folder, ids)
    assert not [each for each in threading.enumerate() if each not in before]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (LayerTensors, "on_device"), (LayerTensors, "join"), (Dispatcher, "_launch"), (Copies, "_transfer"),
        (Copies, "note_arrivals"), (Dispatcher, "_state"), (ExpertCache, "place"), (CopyQueue, "_submit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["lru", "makespan-greedy"])
def test_interrupted_in_the_midst_of_a_layer(
    policy: str, owner: type, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was half done is undone or done: the next text is right, and nothing is lost for good."""
    ids = tiny_models.token_ids(2, 11)
    with on_device(folder, 20, policy=policy) as model:
        usual, left = getattr(owner, name), 9 if policy == "lru" else 2

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return usual(*args, **kwargs)

        monkeypatch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, max_new_tokens=12)
        assert generate(model, ids) == expected(folder, ids)
        side = side_of(model)
        side.dispatcher.resize(2)
        check(side)
        assert not side.dispatcher.copies
        assert not any(record.holds for record in side.store._tier.records.values())


def test_a_disk_that_fails_ends_a_generation_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny_models.token_ids(2, 20)
    with on_device(folder, 12, policy="lru", ram=10 * 12288) as model:
        source = side_of(model).store._source
        usual, left = source.read_into, 5

        def read_into(*args: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError("a test's disk does not answer")
            usual(*args)

        monkeypatch.setattr(source, "read_into", read_into)
        with pytest.raises(OSError, match="does not answer"):
            generate(model, ids)
        assert generate(model, ids) == expected(folder, ids)


# Planted mistakes


def test_a_slot_that_is_overwritten_before_its_reader_is_through(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer, so that what a layer finds in a slot may have to go within that layer."""
    folder = checkpoint("qwen3_moe", num_experts=16, num_hidden_layers=1)
    monkeypatch.setattr(DeviceSlots, "last_read", lambda self, slot: None)
    with (
        on_device(folder, 4, policy="lru", contexts=6) as model,
        pytest.raises(RaceError, match="not ordered after the read"),
    ):
        generate(model, tiny_models.token_ids(6, 5))


def test_experts_that_run_before_their_copy_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies, "event", lambda self, key: None)
    with on_device(folder, 4, policy="lru") as model, pytest.raises(RaceError, match="not ordered after the write"):
        generate(model, tiny_models.token_ids(2, 11))


def test_staging_that_is_rewritten_while_the_device_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_device(folder, 20) as model:
        monkeypatch.setattr(type(virtual(model).compute), "synchronize", lambda self: None)
        with pytest.raises(RaceError):
            generate(model, tiny_models.token_ids(2, 11))
        monkeypatch.undo()
