"""A rate is of what was timed: fused decode steps count bytes, but no time of their experts' own."""

from moe_offload.statistics import Statistics


def test_bytes_without_a_time_do_not_raise_the_rate() -> None:
    statistics = Statistics()
    statistics.add(rows=8, experts=4, torch_experts=0, bytes_read=2 * 10**9, seconds=0.5)
    before = statistics.snapshot()
    statistics.add(rows=2, experts=2, torch_experts=0, bytes_read=6 * 10**9, seconds=0.0)
    after = statistics.snapshot()
    assert after.gigabytes_per_second == before.gigabytes_per_second == 4.0
    assert (after.bytes_read, after.timed_bytes) == (8 * 10**9, 2 * 10**9)
    assert (after - before).gigabytes_per_second == 0.0
