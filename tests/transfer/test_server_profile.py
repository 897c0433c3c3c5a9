import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.transfer.accelerator import Work
from moe_offload.transfer.measured_experts import XEON_6230R
from moe_offload.transfer.server_profile import PROFILES, ServerProfile, find_profile

NAMES = ["v100-6230r", "p40", "p100", "gtx1080ti", "rtx2080ti", "t4", "rtx3090", "a100"]
QWEN, DEEPSEEK, MIXTRAL = 3 * 2048 * 768, 3 * 2048 * 1408, 3 * 4096 * 14336  # weights of an expert


def bf16(weights: int, *rows: int) -> Work:
    return Work(nbytes=2 * weights, flops_per_row=2 * weights, rows=rows)


def round_profile(**changes: Any) -> ServerProfile:
    """Rates that can be reckoned with in the head."""
    plain: dict[str, Any] = {
        "memory_gbs": 100.0, "flops": 1e12, "link_gbs": 10.0, "link_latency": 0.0, "kernel_seconds": 0.0,
        "host_read_gbs": 50.0, "host_flops": 1e11, "host_expert_seconds": 0.0, "host_job_seconds": 0.0,
    }  # fmt: skip
    return dataclasses.replace(PROFILES["p40"], **(plain | changes))


def test_all_servers_are_there() -> None:
    assert list(PROFILES) == NAMES
    for name in NAMES:
        profile = find_profile(name)
        assert profile.name == name
        assert profile.sources and profile.description and profile.device and profile.precision


def test_unknown_server_is_refused_with_the_choice() -> None:
    with pytest.raises(ValueError, match=r"'gtx580'.*v100-6230r, p40, p100"):
        find_profile("gtx580")


@pytest.mark.parametrize("name", NAMES)
def test_orders_of_magnitude(name: str) -> None:
    profile = PROFILES[name]
    # a card reads faster than a host, which reads faster than the link, which is faster than a disk
    assert profile.memory_gbs > profile.host_read_gbs > profile.link_gbs > profile.disk_gbs
    assert profile.flops > profile.host_flops > 1e11
    assert 10 << 30 <= profile.memory_bytes < profile.host_memory_bytes
    assert profile.link_gbs in (12.0, 25.0)
    assert profile.disk_seconds(10**9) == pytest.approx(1 / profile.disk_gbs)


def test_copies_take_latency_and_bytes() -> None:
    profile = round_profile(link_latency=1e-3)
    assert profile.copy_seconds(10_000_000) == pytest.approx(2e-3)


def test_device_takes_the_larger_of_reading_and_multiplying() -> None:
    profile = round_profile()
    # 100 MB are read in 1 ms; a row multiplies for 0.1 ms
    work = Work(nbytes=100_000_000, flops_per_row=100_000_000, rows=(1, 10, 20), launches=0)
    assert profile.device_seconds(work) == pytest.approx(1e-3 + 1e-3 + 2e-3)


def test_device_pays_kernels_and_mapped_bytes() -> None:
    profile = round_profile(kernel_seconds=1e-6)
    assert profile.device_seconds(Work(launches=3, link_bytes=10_000)) == pytest.approx(4e-6)


def test_host_pays_for_jobs_and_experts() -> None:
    profile = round_profile(host_job_seconds=1e-3, host_expert_seconds=1e-4)
    # 50 MB are read in 1 ms; 30 rows multiply for 3 ms
    work = Work(nbytes=50_000_000, flops_per_row=10_000_000, rows=(1, 30))
    assert profile.host_seconds(work) == pytest.approx(1e-3 + 2e-4 + 1e-3 + 3e-3)


@given(rows=st.lists(st.integers(1, 3000), min_size=1, max_size=40), name=st.sampled_from(NAMES))
@settings(deadline=None, max_examples=60)
def test_a_job_is_the_sum_of_its_experts(rows: list[int], name: str) -> None:
    """However many there are: few are added in Python, many by NumPy, and a table is looked up."""
    profile = dataclasses.replace(PROFILES[name], host_job_seconds=0.0)
    for weights in (QWEN, 1_000_000):
        work = bf16(weights, *rows)
        alone = sum(profile.host_seconds(bf16(weights, count)) for count in rows)
        assert profile.host_seconds(work) == pytest.approx(alone)
        assert profile.host_seconds(dataclasses.replace(work, rows=np.array(rows))) == pytest.approx(alone)
        device = dataclasses.replace(work, launches=0)
        alone = sum(profile.device_seconds(dataclasses.replace(device, rows=(count,))) for count in rows)
        assert profile.device_seconds(device) == pytest.approx(alone)


@pytest.mark.parametrize(
    ("weights", "rows", "milliseconds"),
    [(QWEN, 1, 0.1637), (QWEN, 8, 0.5336), (DEEPSEEK, 4, 0.5114), (MIXTRAL, 1, 3.241), (MIXTRAL, 64, 72.08)],
)
def test_measured_experts_take_what_was_measured(weights: int, rows: int, milliseconds: float) -> None:
    profile = dataclasses.replace(PROFILES["v100-6230r"], host_job_seconds=0.0)
    assert 1e3 * profile.host_seconds(bf16(weights, rows)) == pytest.approx(milliseconds)


def test_tables_never_fall_and_go_on_in_proportion() -> None:
    assert {table.nbytes for table in XEON_6230R} == {2 * QWEN, 2 * DEEPSEEK, 2 * MIXTRAL}
    for table in XEON_6230R:
        assert len(table.seconds) == 1500
        assert table.seconds[0] == 0 < table.seconds[1]
        assert (np.diff(table.seconds) >= 0).all()
        assert table.sum(np.array([2998])) == pytest.approx(2 * table.seconds[1499])


def test_tables_are_for_the_experts_that_were_measured() -> None:
    qwen = XEON_6230R[-1]
    assert qwen.describes(2 * QWEN, 2 * QWEN)
    assert qwen.describes(2 * QWEN + 4096, 2 * QWEN)  # a record is padded
    assert not qwen.describes(int(2.1 * QWEN), 2 * QWEN)
    # DeepSeek's expert in int8 has 2.6 % fewer bytes than Qwen's in bf16; one that has as many, but more weights
    assert not qwen.describes(int(DEEPSEEK * 8.5 / 8), 2 * DEEPSEEK)
    assert not qwen.describes(2 * QWEN, 4 * QWEN)


def test_break_even_of_bf16_on_the_measured_server() -> None:
    """With Qwen's experts and PCIe 3.0 a copy pays from 9 to 30 tokens on: what the published tables say."""
    profile = PROFILES["v100-6230r"]
    copy = profile.copy_seconds(2 * QWEN)
    first = next(n for n in range(1, 200) if profile.host_seconds(bf16(QWEN, n)) > copy)
    assert 9 <= first <= 30
