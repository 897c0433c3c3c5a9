"""Whoever decides, with whatever budget, and in whatever order the work is enqueued: the same tokens."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_offload.scheduling.policies import POLICIES
from tests import tiny_models
from tests.conftest import Checkpoints
from tests.device_cases import SERVERS, budget, check, expected, generate, on_device, padded, side_of, virtual

CHOOSABLE = sorted(set(POLICIES) - {"oracle"})
RECORD = 12288  # bytes of host memory for an expert
PROFILES = tuple(SERVERS)


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", num_experts=16)


BATCHES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.booleans(), st.integers(1, 3))


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(CHOOSABLE),
    st.sampled_from(PROFILES),
    st.integers(2, 60),
    st.integers(2, 12),
    st.one_of(st.none(), st.integers(17, 60)),
    st.booleans(),
    st.lists(BATCHES, min_size=1, max_size=3),
)
@example("lru", "tiny-t4", 2, 2, 17, True, [(3, 30, True, 2), (1, 1, False, 1)])
@example("ours", "tiny-gtx1080ti", 24, 12, None, False, [(1, 5, False, 1), (3, 70, True, 1), (2, 5, True, 3)])
def test_any_policy_budget_and_batch(
    folder: Path,
    policy: str,
    profile: str,
    slots: int,
    contexts: int,
    records: int | None,
    overlap: bool,
    batches: list[tuple[int, int, bool, int]],
) -> None:
    options: dict[str, Any] = dict(policy=policy, device=f"virtual:{profile}", overlap=overlap)
    if records is not None:
        options["ram"] = records * RECORD
    with on_device(folder, slots, contexts=contexts, **options) as model:
        memory = budget(folder, slots, contexts)
        side, accelerator = side_of(model), virtual(model)
        for batch, length, pads, beams in batches:
            ids = tiny_models.token_ids(batch, length)
            ways: dict[str, Any] = dict(max_new_tokens=4, num_beams=beams)
            if pads:
                ways |= padded(ids, [min(row, length - 1) for row in range(batch)])
            assert generate(model, ids, **ways) == expected(folder, ids, **ways)
            check(side)
        assert accelerator.budget == memory
        assert accelerator.peak <= memory
        assert records is None or side.store.capacity <= records


@pytest.mark.parametrize("policy", CHOOSABLE)
def test_the_serial_twin_gives_the_same_and_is_not_faster(policy: str, folder: Path) -> None:
    """On a server where nothing but the order differs: the clock has no noise."""
    ids = tiny_models.token_ids(4, 20)
    seconds = []
    for overlap in (True, False):
        with on_device(folder, 20, policy=policy, overlap=overlap) as model:
            began = virtual(model).now()
            assert generate(model, ids, max_new_tokens=6) == expected(folder, ids, max_new_tokens=6)
            seconds.append(virtual(model).now() - began)
    assert seconds[0] <= seconds[1]


def test_experts_run_on_both_sides(folder: Path) -> None:
    """With half of the experts in slots nothing above would show anything if one side had never worked."""
    ids = tiny_models.token_ids(8, 20)
    for policy in CHOOSABLE:
        with on_device(folder, 24, policy=policy) as model:
            generate(model, ids)
            counts = [side_of(model).dispatcher.counts.layer(layer) for layer in range(3)]
            on_gpu = sum(each.gpu_experts + each.fetched_experts for each in counts)
            assert on_gpu > 0, policy
            if policy in ("ours", "static", "tokens"):
                assert sum(each.cpu_experts for each in counts) > 0, policy


def test_a_model_larger_than_ram(folder: Path) -> None:
    """8 records of 48 are in host memory, fewer than a layer wants at once."""
    ids = tiny_models.token_ids(3, 30)
    for policy in ("ours", "lru", "makespan-greedy"):
        with on_device(folder, 30, policy=policy, ram=8 * RECORD) as model:
            assert generate(model, ids) == expected(folder, ids)
            store = side_of(model).store
            assert store.capacity == 8
            assert store.counters.loads > 8


def test_readers_are_gone_after_close(folder: Path) -> None:
    before = set(threading.enumerate())
    with on_device(folder, 12, ram=8 * RECORD) as model, torch.no_grad():
        generate(model, tiny_models.token_ids(2, 20))
    assert not [each for each in threading.enumerate() if each not in before]
