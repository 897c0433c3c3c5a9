import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.transfer.accelerator import (
    NOTHING,
    DeviceError,
    DeviceLostError,
    OutOfDeviceMemoryError,
    Work,
    as_tensor,
)
from moe_offload.transfer.server_profile import PROFILES, ServerProfile
from moe_offload.transfer.virtual import RaceError, VirtualAccelerator
from moe_offload.transfer.virtual_memory import VirtualBuffer


def plain_profile(**changes: Any) -> ServerProfile:
    """1 byte takes 1 microsecond over the link, a kernel of `nbytes` as many on the device; calls take no time."""
    plain: dict[str, Any] = {
        "memory_gbs": 1e-3, "flops": 1e30, "link_gbs": 1e-3, "link_latency": 0.0, "launch_seconds": 0.0,
        "kernel_seconds": 0.0, "wait_seconds": 0.0, "host_read_gbs": 1e-3, "host_flops": 1e30,
        "host_expert_seconds": 0.0, "host_job_seconds": 0.0,
    }  # fmt: skip
    return dataclasses.replace(PROFILES["p40"], **(plain | changes))


def microseconds(accelerator: VirtualAccelerator) -> float:
    return accelerator.now() * 1e6


def nothing(*_: torch.Tensor) -> None:
    pass


def written(accelerator: VirtualAccelerator, nbytes: int, name: str = "host") -> VirtualBuffer:
    buffer = accelerator.host_arena(nbytes).take(nbytes, name)
    data = buffer.host(write=True)
    if not accelerator.ghost:
        data[:] = np.arange(nbytes) % 251
    return buffer


class Pipe:
    """Two buffers in host memory, two on the device, a stream for copies."""

    def __init__(self, accelerator: VirtualAccelerator, nbytes: int = 100) -> None:
        self.accelerator = accelerator
        self.host = [written(accelerator, nbytes, f"host {i}") for i in range(2)]
        self.device = [accelerator.allocate(nbytes, f"device {i}") for i in range(2)]
        self.copy = accelerator.stream("copy")


def test_data_goes_in_through_a_kernel_and_out() -> None:
    accelerator = VirtualAccelerator(PROFILES["gtx1080ti"])
    pipe = Pipe(accelerator, 4096)
    values = np.arange(1024, dtype=np.float32)
    pipe.host[0].host(write=True).view(np.float32)[:] = values
    accelerator.copy_in(pipe.device[0], pipe.host[0], pipe.copy)
    accelerator.compute.wait(pipe.copy.record())

    def double(source: torch.Tensor, target: torch.Tensor) -> None:
        as_tensor(target, torch.float32, 1024).copy_(2 * as_tensor(source, torch.float32, 1024))

    accelerator.launch(accelerator.compute, double, [pipe.device[0]], [pipe.device[1]], Work(nbytes=4096))
    accelerator.copy_out(pipe.host[1], pipe.device[1], accelerator.compute)
    accelerator.compute.synchronize()
    np.testing.assert_array_equal(pipe.host[1].host().view(np.float32), 2 * values)
    assert accelerator.simulated and accelerator.name == "virtual gtx1080ti"


def test_a_kernel_reads_and_writes_arena_memory() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    source = written(accelerator, 64)
    target = accelerator.host_arena(64).take(64, "target")
    accelerator.launch(accelerator.compute, lambda a, b: b.copy_(a), [source], [target], Work(link_bytes=128))
    accelerator.compute.synchronize()
    np.testing.assert_array_equal(target.host(), source.host())
    assert microseconds(accelerator) == pytest.approx(128)


def test_memory_is_aligned_and_not_a_number_until_written() -> None:
    accelerator = VirtualAccelerator(PROFILES["p40"])
    for _ in range(2):
        buffer = accelerator.allocate(64, "device")
        seen: list[torch.Tensor] = []
        accelerator.launch(accelerator.compute, seen.append, [], [buffer], NOTHING)
        assert seen[0].data_ptr() % 4096 == 0
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert as_tensor(seen[0], dtype, 8).isnan().all()
        seen[0].zero_()
        accelerator.compute.synchronize()
        accelerator.free(buffer)


def test_budget_is_hard() -> None:
    accelerator = VirtualAccelerator(PROFILES["p40"], 1000)
    first = accelerator.allocate(600, "first")
    accelerator.reserve(300, "parameters")
    with pytest.raises(OutOfDeviceMemoryError, match="slots: 101 bytes asked for, 100 left of 1000 on virtual p40"):
        accelerator.allocate(101, "slots")
    with pytest.raises(MemoryError):
        accelerator.reserve(101, "cache")
    assert (accelerator.used, accelerator.peak) == (900, 900)
    accelerator.free(first)
    accelerator.reserve(-300, "parameters")
    assert (accelerator.used, accelerator.peak) == (0, 900)
    with pytest.raises(ValueError, match="only 0 are used"):
        accelerator.reserve(-1, "parameters")
    accelerator.allocate(1000, "all")


@pytest.mark.parametrize("budget", [-1, PROFILES["p40"].memory_bytes + 1])
def test_budget_must_fit_the_card(budget: int) -> None:
    with pytest.raises(ValueError, match="p40 has"):
        VirtualAccelerator(PROFILES["p40"], budget)
    assert VirtualAccelerator(PROFILES["p40"]).budget == PROFILES["p40"].memory_bytes


def test_arena_is_bounded() -> None:
    accelerator = VirtualAccelerator(PROFILES["p40"])
    arena = accelerator.host_arena(10_000)
    arena.take(5000, "a")
    with pytest.raises(MemoryError, match="b: 2000 bytes asked for, 1808 left of an arena of 10000"):
        arena.take(2000, "b")  # the next begins at a multiple of 4096
    arena.take(1808, "c")
    with pytest.raises(MemoryError, match="the host of virtual p40"):
        accelerator.host_arena(accelerator.profile.host_memory_bytes)


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (0, 0), (0, 101), (98, 3), (200, 1)])
def test_parts_lie_inside(offset: int, nbytes: int) -> None:
    buffer = VirtualAccelerator(PROFILES["p40"]).allocate(100, "slab")
    with pytest.raises(IndexError, match="slab"):
        buffer.part(offset, nbytes)
    part = buffer.part(90, 10).part(2, 8)
    assert (part.start, part.nbytes, part.on_device) == (92, 8, True)


def test_copy_hides_behind_a_kernel() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    pipe = Pipe(accelerator)
    accelerator.copy_in(pipe.device[0], pipe.host[0], pipe.copy)
    ready = pipe.copy.record(timed=True)
    accelerator.copy_in(pipe.device[1], pipe.host[1], pipe.copy)
    accelerator.compute.wait(ready)
    accelerator.launch(accelerator.compute, nothing, [pipe.device[0]], [], Work(nbytes=150))
    accelerator.compute.wait(pipe.copy.record())
    accelerator.launch(accelerator.compute, nothing, [pipe.device[1]], [], Work(nbytes=150))
    assert microseconds(accelerator) == 0  # nothing of this made the host wait
    accelerator.compute.synchronize()
    # 100 for the first copy; the second hides; twice 150
    assert microseconds(accelerator) == pytest.approx(400)
    assert ready.time() * 1e6 == pytest.approx(100)
    assert accelerator.busy == pytest.approx({"h2d": 200e-6, "d2h": 0, "compute": 300e-6, "host": 0})


def test_copies_of_one_direction_queue_in_the_order_of_submission() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    pipe = Pipe(accelerator)
    other = accelerator.stream("other")
    accelerator.copy_in(pipe.device[0], pipe.host[0], pipe.copy)
    accelerator.copy_in(pipe.device[1], pipe.host[1], other)
    assert not other.record().query()
    other.synchronize()
    assert microseconds(accelerator) == pytest.approx(200)


def test_copies_of_both_directions_overlap() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    pipe = Pipe(accelerator)
    accelerator.launch(accelerator.compute, nothing, [], [pipe.device[1]], NOTHING)
    accelerator.copy_in(pipe.device[0], pipe.host[0], pipe.copy)
    accelerator.copy_out(pipe.host[1], pipe.device[1], accelerator.compute)
    pipe.copy.synchronize()
    accelerator.compute.synchronize()
    assert microseconds(accelerator) == pytest.approx(100)


def test_kernels_do_not_overlap_kernels() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    other = accelerator.stream("other")
    accelerator.launch(accelerator.compute, nothing, [], [], Work(nbytes=30))
    accelerator.launch(other, nothing, [], [], Work(nbytes=20))
    other.synchronize()
    assert microseconds(accelerator) == pytest.approx(50)


def test_host_work_overlaps_the_device() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    done: list[int] = []
    accelerator.launch(accelerator.compute, nothing, [], [], Work(nbytes=70))
    accelerator.run_host(lambda: done.append(1), Work(nbytes=50))
    assert done == [1] and microseconds(accelerator) == pytest.approx(50)
    accelerator.compute.synchronize()
    assert microseconds(accelerator) == pytest.approx(70)
    accelerator.run_host(lambda: None, Work(nbytes=10, rows=(1, 1)))
    assert microseconds(accelerator) == pytest.approx(90)
    assert accelerator.busy["host"] == pytest.approx(70e-6)


def test_calls_take_the_hosts_time() -> None:
    accelerator = VirtualAccelerator(plain_profile(launch_seconds=5e-6, wait_seconds=11e-6, kernel_seconds=3e-6))
    pipe = Pipe(accelerator, 1)
    accelerator.copy_in(pipe.device[0], pipe.host[0], pipe.copy)
    assert microseconds(accelerator) == pytest.approx(5)
    accelerator.launch(accelerator.compute, nothing, [], [], Work(launches=2))
    assert microseconds(accelerator) == pytest.approx(15)
    event = accelerator.compute.record(timed=True)
    event.synchronize()  # issued at 15, twice 3 on the device
    assert microseconds(accelerator) == pytest.approx(15 + 6 + 11)
    event.synchronize()
    assert microseconds(accelerator) == pytest.approx(15 + 6 + 22)
    assert event.time() * 1e6 == pytest.approx(21)


def test_polling_an_event_ends() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    accelerator.launch(accelerator.compute, nothing, [], [], Work(nbytes=10))
    event = accelerator.compute.record()
    polls = 0
    while not event.query():
        polls += 1
        assert polls < 1000
    assert microseconds(accelerator) >= 10


def test_event_without_a_time() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    accelerator.launch(accelerator.compute, nothing, [], [], Work(nbytes=10))
    with pytest.raises(DeviceError, match="timed=True"):
        accelerator.compute.record().time()
    with pytest.raises(DeviceError, match="not passed"):
        accelerator.compute.record(timed=True).time()


def test_an_event_on_an_idle_stream_is_passed_when_it_is_recorded() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    accelerator.run_host(lambda: None, Work(nbytes=10))
    event = accelerator.compute.record(timed=True)
    assert event.query() and event.time() * 1e6 == pytest.approx(10)


def test_timeline_is_of_streams_and_host() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    pipe = Pipe(accelerator)
    accelerator.copy_in(pipe.device[0], pipe.host[0], pipe.copy)
    assert accelerator.timeline() == []
    accelerator.keep_timeline(True)
    accelerator.copy_in(pipe.device[1], pipe.host[1], pipe.copy)
    accelerator.launch(accelerator.compute, nothing, [], [], Work(nbytes=20), "norm")
    accelerator.run_host(lambda: None, Work(nbytes=50), "experts")
    pipe.copy.synchronize()
    spans = [(s.track, s.name, round(s.start * 1e6), round(s.end * 1e6)) for s in accelerator.timeline()]
    assert spans == [
        ("copy", "device 1", 100, 200),
        ("compute", "norm", 0, 20),
        ("host", "experts", 0, 50),
        ("host", "wait", 50, 200),
    ]
    assert accelerator.timeline() == []
    accelerator.keep_timeline(False)
    accelerator.run_host(lambda: None, Work(nbytes=50))
    assert accelerator.timeline() == []


def some_work(accelerator: VirtualAccelerator, sizes: list[int]) -> None:
    """A pipeline of copies, kernels and host work of these sizes."""
    pipe = Pipe(accelerator)
    free = [accelerator.compute.record(), accelerator.compute.record()]
    for number, size in enumerate(sizes):
        slot = number % 2
        pipe.copy.wait(free[slot])
        accelerator.copy_in(pipe.device[slot].part(0, size), pipe.host[slot].part(0, size), pipe.copy)
        accelerator.compute.wait(pipe.copy.record())
        accelerator.launch(accelerator.compute, nothing, [pipe.device[slot].part(0, size)], [], Work(nbytes=size))
        free[slot] = accelerator.compute.record()
        accelerator.run_host(lambda: None, Work(nbytes=size // 2))
    accelerator.compute.synchronize()


@given(sizes=st.lists(st.integers(2, 100), min_size=1, max_size=12), jitter=st.sampled_from([0.0, 0.2]))
@settings(deadline=None, max_examples=25)
def test_a_ghost_takes_the_same_time(sizes: list[int], jitter: float) -> None:
    profile = dataclasses.replace(PROFILES["t4"], jitter=jitter)
    results = []
    for ghost in (False, True):
        with VirtualAccelerator(profile, ghost=ghost, seed=5) as accelerator:
            some_work(accelerator, sizes)
            results.append((accelerator.now(), accelerator.busy, accelerator.peak))
    assert results[0] == results[1]
    now, busy, _ = results[0]
    assert max(busy.values()) <= now


def test_a_ghost_has_no_data_and_calls_nothing() -> None:
    accelerator = VirtualAccelerator(PROFILES["v100-6230r"], ghost=True)

    def fail(*_: torch.Tensor) -> None:
        raise AssertionError("called")

    slot = accelerator.allocate(20 << 30, "20 GiB")
    record = accelerator.host_arena(100 << 30).take(20 << 30, "record")
    with pytest.raises(RaceError, match="nobody has written"):
        record.host()
    assert not record.host(write=True).flags.writeable
    accelerator.copy_in(slot, record, accelerator.compute)
    accelerator.launch(accelerator.compute, fail, [slot], [], NOTHING)
    accelerator.run_host(fail, NOTHING)
    with pytest.raises(OutOfDeviceMemoryError):
        accelerator.allocate(20 << 30, "again")
    accelerator.close()


def test_noise_is_seeded_and_has_the_mean_one() -> None:
    def seconds(seed: int) -> float:
        accelerator = VirtualAccelerator(plain_profile(jitter=0.5), ghost=True, seed=seed)
        for _ in range(2000):
            accelerator.launch(accelerator.compute, nothing, [], [], Work(nbytes=1))
        accelerator.compute.synchronize()
        return accelerator.now()

    assert seconds(1) == seconds(1) != seconds(2)
    assert seconds(1) == pytest.approx(2000e-6, rel=0.05)


@pytest.mark.parametrize("operations", [0, 1, 7])
def test_device_is_lost_after_so_many_operations(operations: int) -> None:
    accelerator = VirtualAccelerator(PROFILES["p40"])
    pipe = Pipe(accelerator)
    event = accelerator.compute.record()
    accelerator.fail_after(operations)
    for _ in range(operations):
        accelerator.launch(accelerator.compute, nothing, [], [], NOTHING)
    stream, device, host = pipe.copy, pipe.device[0], pipe.host[0]
    for call in (
        lambda: accelerator.launch(stream, nothing, [], [], NOTHING),
        lambda: accelerator.copy_in(device, host, stream),
        lambda: accelerator.copy_out(host, device, stream),
        lambda: accelerator.allocate(1, "more"),
        lambda: accelerator.reserve(1, "more"),
        lambda: accelerator.stream("more"),
        lambda: accelerator.host_arena(1),
        lambda: stream.record(),
        lambda: stream.wait(event),
        lambda: stream.synchronize(),
        lambda: event.synchronize(),
        lambda: event.query(),
    ):
        for _ in range(2):
            with pytest.raises(DeviceLostError, match="virtual p40 does not answer"):
                call()
    done: list[int] = []
    accelerator.run_host(lambda: done.append(1), NOTHING)  # the host is well
    assert done == [1] and host.host()[3] == 3
    accelerator.free(device)
    accelerator.close()
    assert accelerator.used == 0


def test_what_a_lost_device_had_not_finished_is_garbage() -> None:
    accelerator = VirtualAccelerator(PROFILES["p40"])
    source = written(accelerator, 100)
    targets = [written(accelerator, 100, name) for name in ("done", "half")]
    device = accelerator.allocate(100, "device")
    accelerator.copy_in(device, source, accelerator.compute)
    accelerator.copy_out(targets[0], device, accelerator.compute)
    accelerator.compute.synchronize()
    accelerator.copy_out(targets[1].part(50, 50), device.part(50, 50), accelerator.compute)
    accelerator.copy_in(device, source, accelerator.compute)  # in flight, too, and only reads
    accelerator.fail_after(0)
    np.testing.assert_array_equal(source.host(write=True), targets[0].host())
    np.testing.assert_array_equal(targets[1].part(0, 50).host(), source.host()[:50])
    with pytest.raises(RaceError, match=r"half\[50:100\]: the host reads bytes that nobody has written"):
        targets[1].part(50, 50).host()
    assert (targets[1].host(write=True)[50:] == 0xFF).all()
    accelerator.free(device)  # nobody is using it


def test_budget_shrinks_while_running() -> None:
    accelerator = VirtualAccelerator(PROFILES["p40"], 1000)
    slots = [accelerator.allocate(300, f"slot {i}") for i in range(3)]
    accelerator.shrink_budget(500, operations=2)
    accelerator.compute.record()
    accelerator.reserve(100, "in time")
    with pytest.raises(OutOfDeviceMemoryError, match="0 left of 500"):
        accelerator.reserve(1, "too late")
    accelerator.free(slots[0])
    with pytest.raises(OutOfDeviceMemoryError, match="0 left of 500"):
        accelerator.allocate(1, "still too much")
    accelerator.free(slots[1])
    accelerator.allocate(100, "fits")
    assert (accelerator.budget, accelerator.used, accelerator.peak) == (500, 500, 1000)
    accelerator.shrink_budget(0)
    assert accelerator.budget == 0


def test_faults_want_a_future() -> None:
    accelerator = VirtualAccelerator(PROFILES["p40"])
    with pytest.raises(ValueError, match="-1 operations"):
        accelerator.fail_after(-1)
    with pytest.raises(ValueError, match="-5 bytes"):
        accelerator.shrink_budget(-5)


def test_wrong_memory_is_named() -> None:
    accelerator, other = VirtualAccelerator(PROFILES["p40"]), VirtualAccelerator(PROFILES["p40"])
    pipe, stream = Pipe(accelerator), accelerator.compute
    device, host = pipe.device[0], pipe.host[0]
    with pytest.raises(TypeError, match="device 1 is not in an arena"):
        accelerator.copy_in(device, pipe.device[1], stream)
    with pytest.raises(TypeError, match="ndarray.*is not in an arena"):
        accelerator.copy_in(device, np.zeros(100, np.uint8), stream)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="foreign is not in an arena"):
        accelerator.copy_in(device, written(other, 100, "foreign"), stream)
    with pytest.raises(TypeError, match="host 1 is not on the device"):
        accelerator.copy_out(host, pipe.host[1], stream)
    with pytest.raises(ValueError, match=r"copy in: host 0\[0:50\] has 50 bytes, device 0 has 100"):
        accelerator.copy_in(device, host.part(0, 50), stream)
    with pytest.raises(TypeError, match="foreign is no memory of virtual p40"):
        accelerator.launch(stream, nothing, [], [other.allocate(1, "foreign")], NOTHING)
    with pytest.raises(TypeError, match="no stream"):
        accelerator.launch(other.compute, nothing, [], [], NOTHING)
    with pytest.raises(TypeError, match="no event"):
        stream.wait(other.compute.record())
    with pytest.raises(TypeError, match="device 0 is device memory"):
        device.host()
    with pytest.raises(TypeError, match="close the arena"):
        accelerator.free(host)
    with pytest.raises(ValueError, match="only device 0 as a whole"):
        accelerator.free(device.part(0, 50))
    for nbytes in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            accelerator.allocate(nbytes, "nothing")


def test_close_waits_for_what_is_in_flight() -> None:
    accelerator = VirtualAccelerator(plain_profile())
    pipe = Pipe(accelerator)
    accelerator.copy_in(pipe.device[0], pipe.host[0], pipe.copy)
    accelerator.close()
    accelerator.close()
    assert microseconds(accelerator) == pytest.approx(100)
    assert accelerator.used == 0
    with pytest.raises(DeviceError, match="closed") as caught:
        accelerator.allocate(1, "late")
    assert not isinstance(caught.value, DeviceLostError)
