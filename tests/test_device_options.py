"""A device as `load` takes it: what is refused, with which words, and that nothing is left of it afterwards."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_offload
from moe_offload.device_attention import HANDLE
from moe_offload.scheduling.policies import POLICIES
from moe_offload.transfer.find_device import CudaFacts
from tests import tiny_models
from tests.conftest import Checkpoints
from tests.device_cases import PROFILE, budget, dense_bytes, expected, generate, on_device, side_of, virtual

BAD, SMALL = moe_offload.OptionError, moe_offload.NotEnoughMemoryError
CARD = "virtual:gtx1080ti"


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", num_experts=16)


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_offload.transfer.find_device.detect_cuda", lambda: CudaFacts("2.9.0+cpu", None))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (dict(gpu_memory="12 apples"), BAD, r"gpu_memory 12 apples is no size: write it like 512MB"),
        (dict(gpu_memory=-5), BAD, r"gpu_memory -5 is out of bounds: 1 byte is the least"),
        (dict(gpu_memory="0GiB"), BAD, r"gpu_memory 0GiB is out of bounds: 1 byte is the least"),
        (dict(gpu_memory=True), BAD, r"gpu_memory True"),
        (dict(gpu_memory="12GiB"), BAD, r"budget of 12884901888 bytes.*gtx1080ti has \d+, give 1 to"),
        (dict(gpu_memory=60_000), SMALL, r"weights need \d+.* KB, but .*has 60.0 KB.*raise"),
        (dict(ram="some"), BAD, r"ram some is no size"),
        (dict(ram=0), BAD, r"ram 0 is out of bounds"),
        (dict(ram=50_000), SMALL, r"ram.*50000 bytes of host memory hold 4 experts of 12288 bytes, .* at least 98304"),
        (dict(device="virtual:abacus"), BAD, r"no virtual server 'abacus': choose one of v100-6230r"),
        (dict(device="tpu"), BAD, r"no device 'tpu': choose auto, cpu, cuda, cuda:N or virtual"),
        (dict(device="cuda:x"), BAD, r"no device 'cuda:x'"),
        (dict(device=None), BAD, r"no device None"),
        (dict(policy="best"), BAD, r"no policy 'best': choose one of ours, static, .*"),
        (dict(policy="oracle"), BAD, r"oracle"),
        (dict(dense="int8"), BAD, r"dense='int8' packs linears for the CPU, but device='virtual:gtx"),
        (dict(device="cpu", gpu_memory="1GB"), BAD, r"gpu_memory is given, but device='cpu' uses no"),
        (dict(device="cuda"), BAD, r"torch 2.9.0\+cpu has no CUDA.*pip install"),
        (dict(device="auto", gpu_memory="1GB"), BAD, r"gpu_memory is given, but device='auto'"),
    ],
)
def test_what_is_refused(
    options: dict[str, Any], kind: type[Exception], words: str, folder: Path, without_cuda: None
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(kind, match=words) as caught:
        moe_offload.load(folder, **{"device": CARD} | options)
    assert "\n" not in str(caught.value)
    assert not [each for each in threading.enumerate() if each not in before]


def test_room_for_the_rest_of_the_model_and_no_expert(folder: Path) -> None:
    """What is opened before that is noticed is closed again."""
    before = set(threading.enumerate())
    with pytest.raises(SMALL, match=r"given is .* KB, but .* and 2 experts need .* KB.*raise"):
        moe_offload.load(folder, device=CARD, gpu_memory=dense_bytes(folder) + 9216)
    gc.collect()
    assert not [each for each in threading.enumerate() if each not in before]


def test_the_least_that_the_message_names_is_enough(folder: Path) -> None:
    with on_device(folder, 2, contexts=1, policy="lru") as model:
        assert len(side_of(model).slots) >= 2
        ids = tiny_models.token_ids(1, 5)
        assert generate(model, ids) == expected(folder, ids)
        assert model.offload.device is not None


def test_auto_is_the_cpu_where_there_is_no_card(folder: Path, without_cuda: None) -> None:
    with moe_offload.load(folder).offload as engine:
        assert engine.device is None


def test_every_policy_that_can_be_chosen_is_offered() -> None:
    with pytest.raises(moe_offload.OptionError) as caught:
        moe_offload.Options(policy="")
    assert all(name in str(caught.value) for name in set(POLICIES) - {"oracle"})


def test_experts_that_no_record_holds_stay_on_the_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.models.test_prequantised import fp8_checkpoint

    model = moe_offload.load(fp8_checkpoint(tmp_path), device=CARD)
    with model.offload as engine:
        assert engine.device is None
        assert "runs on the CPU alone: experts in fp8" in caplog.text
        generate(model, tiny_models.token_ids(1, 5))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2", "qwen3_next"])
def test_detach_leaves_no_trace(family: str, checkpoint: Checkpoints) -> None:
    folder = checkpoint(family)
    ours = moe_offload.load(folder, device=CARD, gpu_memory=budget(folder, 8, 4))
    plain = type(ours).from_pretrained(folder, dtype="auto")
    generate(ours, tiny_models.token_ids(2, 7))
    engine, side = ours.offload, weakref.ref(ours.offload.device)
    assert engine.detach() is ours
    assert engine.closed
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert ours.config.to_dict() == plain.config.to_dict()
    assert ours.config._attn_implementation == plain.config._attn_implementation
    assert ours.config._experts_implementation == plain.config._experts_implementation
    for mine, theirs in zip(ours.modules(), plain.modules(), strict=True):
        assert mine.__dict__.keys() == theirs.__dict__.keys()
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            assert len(mine.__dict__[hooks]) == len(theirs.__dict__[hooks])
    ids = tiny_models.token_ids()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    del engine
    gc.collect()
    assert side() is None


def test_close_leaves_no_trace_of_the_device(folder: Path) -> None:
    with on_device(folder, 8) as model:
        accelerator = virtual(model)
        generate(model, tiny_models.token_ids(1, 5))
    assert "forward" not in model.__dict__
    assert not any(HANDLE in module.__dict__ for module in model.modules())
    with pytest.raises(RuntimeError, match="load the model again|load it again"):
        generate(model, tiny_models.token_ids(1, 5))
    assert not accelerator._arenas or all(not arena.nbytes for arena in accelerator._arenas)


def test_a_closed_model_keeps_no_slots_alive(folder: Path) -> None:
    """Not even until the garbage collector comes by: a second load would find the memory taken."""
    with on_device(folder, 8) as model:
        side = side_of(model)
        slots = [weakref.ref(side.slots.buffer(slot).tensor) for slot in range(len(side.slots))]  # type: ignore[attr-defined]
        generate(model, tiny_models.token_ids(1, 5))
        gc.disable()
        try:
            model.offload.close()
            assert not any(slot() is not None for slot in slots)
        finally:
            gc.enable()


def test_closed_while_others_generate(folder: Path) -> None:
    with on_device(folder, 8) as model:
        problems: list[str] = []
        started = threading.Event()

        def work() -> None:
            try:
                while True:
                    generate(model, tiny_models.token_ids(1, 5))
                    started.set()
            except RuntimeError as error:
                problems.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        started.wait(timeout=60)
        model.offload.close()
        for thread in threads:
            thread.join(timeout=60)
    assert len(problems) == 2
    assert all("load" in problem and "again" in problem for problem in problems), problems


def test_a_deep_copy_shares_the_device(folder: Path) -> None:
    ids = tiny_models.token_ids(2, 7)
    with on_device(folder, 12) as model:
        twin = copy.deepcopy(model)
        calls = side_of(model).dispatcher.counts.steps
        assert generate(twin, ids) == expected(folder, ids)
        assert side_of(model).dispatcher.counts.steps > calls
        assert twin.forward.model is twin
        assert generate(model, ids) == expected(folder, ids)


def test_a_second_load_beside_the_first(folder: Path, checkpoint: Checkpoints) -> None:
    other = checkpoint("gpt_oss")
    ids = tiny_models.token_ids(1, 9)
    with on_device(folder, 12) as first:
        with on_device(other, 6) as second:
            assert generate(first, ids) == expected(folder, ids)
            assert generate(second, ids) == expected(other, ids)
            assert generate(first, ids) == expected(folder, ids)
        assert generate(first, ids) == expected(folder, ids)


def test_a_dropped_model_gives_everything_back(folder: Path) -> None:
    """Without close(), as in a notebook."""
    before = set(threading.enumerate())
    found = _weak(lambda: moe_offload.load(folder, device=CARD, gpu_memory=budget(folder, 8, 2)))
    gc.collect()
    assert found() is None
    assert len(set(threading.enumerate()) - before) <= 1  # the team's


def _weak(make: Callable[[], Any]) -> Any:
    model = make()
    generate(model, tiny_models.token_ids(1, 5))
    return weakref.ref(model.offload.device)


def test_the_config_keeps_the_options(folder: Path) -> None:
    with on_device(folder, 8, policy="qstar", overlap=False) as model:
        kept = model.config.quantization_config.to_dict()
        assert kept["device"] == PROFILE
        assert (kept["policy"], kept["overlap"], kept["gpu_memory"]) == ("qstar", False, budget(folder, 8, 4))
