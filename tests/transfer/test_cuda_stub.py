"""The CUDA accelerator's calls, on a stand-in for torch.cuda. On a real card: test_cuda.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_offload.transfer import cuda as cuda_module
from moe_offload.transfer import cuda_stream
from moe_offload.transfer.accelerator import NOTHING, Buffer, DeviceError, DeviceLostError, OutOfDeviceMemoryError
from moe_offload.transfer.cuda import HEAD_ROOM, CudaAccelerator
from moe_offload.transfer.cuda_errors import device_error
from tests.transfer.fake_cuda import DeviceTensor, FakeCuda, FakeLocker, fake_torch

FAULT = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setattr(cuda_module, "torch", fake_torch(cuda))
    monkeypatch.setattr(cuda_stream, "torch", fake_torch(cuda))
    monkeypatch.setattr(cuda_module, "CudaPageLocker", FakeLocker)
    monkeypatch.setattr(DeviceTensor, "card", cuda, raising=False)
    monkeypatch.setattr(FakeLocker, "cuda", cuda, raising=False)
    return cuda


@pytest.fixture
def device(cuda: FakeCuda) -> CudaAccelerator:
    return CudaAccelerator(budget=1 << 20)


def pattern(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (np.arange(nbytes) % 251).astype(np.uint8)


def add_one(cuda: FakeCuda) -> Callable[..., None]:
    """A kernel: the second is the first plus one."""

    def kernel(source: torch.Tensor, target: torch.Tensor) -> None:
        plain = target.as_subclass(torch.Tensor)
        cuda.put(lambda: plain.copy_(source.as_subclass(torch.Tensor) + 1))

    return kernel


def test_copies_and_kernels_run_in_order_and_nothing_waits_before_the_end(
    cuda: FakeCuda, device: CudaAccelerator
) -> None:
    arena = device.host_arena(100_000)
    there, back = arena.take(5000, "there"), arena.take(5000, "back")
    there.host(write=True)[:] = pattern(5000)
    back.host(write=True)[:] = 0
    slot, result = device.allocate(5000, "slot"), device.allocate(5000, "result")
    copies = device.stream("copy")
    cuda.log.clear()
    device.copy_in(slot, there, copies)
    device.compute.wait(copies.record())
    device.launch(device.compute, add_one(cuda), [slot], [result], NOTHING)
    copies.wait(device.compute.record())
    device.copy_out(back, result, copies)
    done = copies.record()
    assert not done.query() and not back.host().any()
    assert not any("synchronize" in call for call in cuda.log)
    done.synchronize()
    assert done.query()
    np.testing.assert_array_equal(back.host(), pattern(5000) + 1)


def test_the_stand_in_finds_a_missing_wait(cuda: FakeCuda, device: CudaAccelerator) -> None:
    arena = device.host_arena(10_000)
    there = arena.take(100, "there")
    there.host(write=True)[:] = 9
    slot, result = device.allocate(100, "slot"), device.allocate(100, "result")
    slot.tensor.fill_(0)
    copies = device.stream("copy")
    device.copy_in(slot, there, copies)
    device.launch(device.compute, add_one(cuda), [slot], [result], NOTHING)
    device.compute.synchronize()
    assert bool((result.tensor == 1).all())


def test_kernels_use_arena_memory_in_place(cuda: FakeCuda, device: CudaAccelerator) -> None:
    arena = device.host_arena(10_000)
    rows, out = arena.take(64, "rows"), arena.take(64, "out")
    rows.host(write=True)[:] = pattern(64)
    out.host(write=True)[:] = 0
    side = device.stream("side")
    device.launch(side, add_one(cuda), [rows.part(8, 8)], [out.part(0, 8)], NOTHING)
    side.synchronize()
    assert out.host()[:9].tolist() == [9, 10, 11, 12, 13, 14, 15, 16, 0]


def test_compute_is_whatever_stream_is_torchs_current_one(cuda: FakeCuda, device: CudaAccelerator) -> None:
    slot = device.allocate(8, "slot")
    used: list[object] = []

    def kernel(_: torch.Tensor) -> None:
        used.append(cuda.current)

    other = cuda.Stream(torch.device("cuda", 0))
    device.launch(device.compute, kernel, [slot], [], NOTHING)
    with cuda.stream(other):
        device.launch(device.compute, kernel, [slot], [], NOTHING)
        event = device.compute.record()
    own = device.stream("own")
    device.launch(own, kernel, [slot], [], NOTHING)
    assert used == [cuda.streams[0], other, own.raw]
    assert vars(event.raw)["stream"] is other
    assert cuda.log.count("device 0") == 2  # the card is selected for compute, too


def test_a_new_buffer_is_free_of_older_work(cuda: FakeCuda, device: CudaAccelerator) -> None:
    cuda.log.clear()
    device.allocate(100, "slots")
    assert cuda.log == ["empty", "synchronize default"]


def test_the_budget_is_hard(cuda: FakeCuda) -> None:
    device = CudaAccelerator(budget=1000)
    device.reserve(300, "the model")
    first = device.allocate(600, "slots")
    for refused in (lambda: device.allocate(101, "more"), lambda: device.reserve(101, "more")):
        with pytest.raises(OutOfDeviceMemoryError, match="more: 101 bytes asked for, 100 left of 1000"):
            refused()
    assert (device.used, device.peak) == (900, 900)
    device.free(first)
    device.reserve(-300, "the model")
    assert (device.used, device.peak) == (0, 900)
    with pytest.raises(ValueError, match="1 bytes given back, 0 are used"):
        device.reserve(-1, "the model")
    device.allocate(1000, "all")
    with pytest.raises(ValueError, match="at least 1"):
        device.allocate(0, "nothing")


def test_the_budget_that_nobody_named_is_what_is_free(cuda: FakeCuda) -> None:
    cuda.reserved, cuda.allocated = 3_000_000, 1_000_000
    assert CudaAccelerator().budget == cuda.free + 2_000_000 - HEAD_ROOM
    cuda.free = 1
    assert CudaAccelerator().budget == 0
    with pytest.raises(ValueError, match=rf"budget of {cuda.total + 1} bytes: .*1080 Ti.*has 0 to {cuda.total}"):
        CudaAccelerator(budget=cuda.total + 1)
    with pytest.raises(ValueError, match="-1 bytes"):
        CudaAccelerator(budget=-1)


def test_out_of_memory_is_no_loss(cuda: FakeCuda, device: CudaAccelerator) -> None:
    cuda.room = 500
    with pytest.raises(OutOfDeviceMemoryError, match="1080 Ti.*Tried to allocate 600 bytes"):
        device.allocate(600, "slots")
    assert device.used == 0
    slot = device.allocate(500, "slots")

    def hungry(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(OutOfDeviceMemoryError, match="2 GiB"):
        device.launch(device.compute, hungry, [slot], [], NOTHING)
    device.compute.synchronize()


def test_given_back_memory_is_gone_whatever_views_exist(device: CudaAccelerator) -> None:
    slots = device.allocate(1000, "slots")
    part = slots.part(100, 50)
    view = part.tensor
    with pytest.raises(ValueError, match="only the whole"):
        device.free(part)
    device.free(slots)
    assert view.untyped_storage().nbytes() == 0
    uses: list[Callable[[], object]] = [lambda: part.tensor, lambda: slots.tensor]
    for use in uses:
        with pytest.raises(ValueError, match="was given back"):
            use()
    with pytest.raises(TypeError, match="given back"):
        device.free(slots)


def test_what_is_no_copy(device: CudaAccelerator) -> None:
    other = CudaAccelerator(budget=1 << 20)
    arena, theirs = device.host_arena(10_000), other.host_arena(10_000)
    host, slot, stream = arena.take(100, "host"), device.allocate(100, "slot"), device.stream("copy")
    cases: list[tuple[Buffer, Buffer, type[Exception], str]] = [
        (slot, host.part(0, 99), ValueError, "99 bytes, slot 100"),
        (slot, theirs.take(100, "theirs"), TypeError, "theirs is not in an arena of this accelerator"),
        (slot, device.allocate(100, "b"), TypeError, "b is not in an arena"),
        (host, host, TypeError, "'host' is not on the device"),
        (other.allocate(100, "foreign"), host, ValueError, "foreign is no memory of this accelerator"),
    ]
    for device_side, host_side, kind, words in cases:
        with pytest.raises(kind, match=words):
            device.copy_in(device_side, host_side, stream)
        with pytest.raises(kind, match=words):
            device.copy_out(host_side, device_side, stream)
    with pytest.raises(TypeError, match="no stream of this accelerator"):
        device.copy_in(slot, host, other.compute)
    with pytest.raises(TypeError, match="no event of this accelerator"):
        stream.wait(other.compute.record())
    with pytest.raises(TypeError, match="copy it out"):
        slot.host()
    for offset, nbytes in [(-1, 5), (0, 0), (0, 101), (99, 2)]:
        with pytest.raises(IndexError, match="are not in its 100 bytes"):
            slot.part(offset, nbytes)


def test_a_lost_device_is_lost_for_good(cuda: FakeCuda, device: CudaAccelerator) -> None:
    arena = device.host_arena(10_000)
    host, slot, stream = arena.take(100, "host"), device.allocate(100, "slot"), device.stream("copy")
    host.host(write=True)[:] = 3
    device.reserve(50, "the model")
    before = stream.record(timed=True)
    cuda.failure = FAULT
    with pytest.raises(DeviceLostError, match="1080 Ti.*an illegal memory access was encountered$"):
        device.copy_in(slot, host, stream)
    cuda.failure = None  # that no call says so again does not bring the memory back
    uses: list[Callable[[], object]] = [
        lambda: device.copy_in(slot, host, stream),
        lambda: device.copy_out(host, slot, stream),
        lambda: device.launch(device.compute, lambda a: None, [slot], [], NOTHING),
        lambda: device.allocate(1, "a"),
        lambda: device.reserve(1, "a"),
        lambda: device.host_arena(1),
        lambda: device.stream("s"),
        lambda: stream.record(),
        lambda: stream.synchronize(),
        lambda: stream.wait(before),
        lambda: before.query(),
        lambda: before.synchronize(),
        lambda: before.time(),
    ]
    for use in uses:
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            use()
    # the host goes on
    assert bool((host.host() == 3).all())
    ran: list[int] = []
    device.run_host(lambda: ran.append(1), NOTHING)
    device.free(slot)
    device.reserve(-50, "the model")
    assert ran == [1] and device.used == 0
    cuda.failure = FAULT
    device.close()
    assert arena.closed


def test_what_the_device_says_while_waiting(cuda: FakeCuda, device: CudaAccelerator) -> None:
    event = device.compute.record()
    cuda.failure = "CUDA error: unspecified launch failure"
    with pytest.raises(DeviceLostError, match="unspecified launch failure"):
        event.synchronize()
    with pytest.raises(DeviceLostError, match="unspecified launch failure"):
        device.allocate(1, "a")


def test_errors_of_a_launched_function_are_its_own(device: CudaAccelerator) -> None:
    slot = device.allocate(10, "slot")

    def wrong(_: torch.Tensor) -> None:
        raise ValueError("shape")

    with pytest.raises(ValueError, match="shape"):
        device.launch(device.compute, wrong, [slot], [], NOTHING)
    with pytest.raises(RuntimeError, match="size of tensor"):
        device.launch(device.compute, lambda a: torch.ones(2) + torch.ones(3), [slot], [], NOTHING)  # type: ignore[arg-type]
    device.compute.synchronize()


class _OfCupy(RuntimeError):
    __module__ = "cupy_backends.cuda.api.runtime"


class _CupyMemory(MemoryError):
    __module__ = "cupy.cuda.memory"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), OutOfDeviceMemoryError),
        (RuntimeError("CUDA error: out of memory\nCompile with"), OutOfDeviceMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), OutOfDeviceMemoryError),
        (_CupyMemory("Out of memory allocating 512 bytes"), OutOfDeviceMemoryError),
        (_OfCupy("cudaErrorMemoryAllocation: out of memory"), OutOfDeviceMemoryError),
        (
            RuntimeError("CUDA driver error: cuMemHostGetDevicePointer: CUDA_ERROR_OUT_OF_MEMORY"),
            OutOfDeviceMemoryError,
        ),
        (RuntimeError(FAULT), DeviceLostError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), DeviceLostError),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), DeviceLostError),
        (_OfCupy("cudaErrorIllegalAddress: an illegal memory access was encountered"), DeviceLostError),
        (_OfCupy("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"), DeviceLostError),
        (DeviceLostError("gone"), DeviceLostError),
        (MemoryError("an arena of 5 bytes"), None),
        (RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"), None),
        (ValueError("CUDA error"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_what_errors_mean(error: BaseException, kind: type[DeviceError] | None) -> None:
    meant = device_error(error, "card")
    assert type(meant) is kind if kind is not None else meant is None
    if meant is not None and meant is not error:
        assert str(meant).startswith("card ") and "\n" not in str(meant)


def test_torchs_own_class_of_device_errors() -> None:
    own = getattr(torch, "AcceleratorError", None)
    if own is None:
        pytest.skip("this torch has none")
    assert isinstance(device_error(own("something new", 999)), DeviceLostError)


def test_events_serve_again_but_not_while_somebody_holds_them(cuda: FakeCuda, device: CudaAccelerator) -> None:
    held = device.compute.record()
    for _ in range(20):
        device.compute.record()
    assert cuda.events <= 3 + 2  # three tie the clocks
    raw = held.raw
    again = device.compute.record()
    assert again.raw is not raw
    timed = device.compute.record(timed=True)
    assert vars(timed.raw)["enable_timing"] and timed.raw is not again.raw


def test_a_wait_is_for_what_the_event_stood_for_then(cuda: FakeCuda, device: CudaAccelerator) -> None:
    a, b = device.stream("a"), device.stream("b")
    ran: list[str] = []

    def note(word: str) -> Callable[[], None]:
        return lambda: cuda.put(lambda: ran.append(word))

    device.launch(a, note("first"), [], [], NOTHING)
    b.wait(a.record())  # the event goes back to the pool here
    device.launch(a, note("second"), [], [], NOTHING)
    a.record()  # and is recorded again
    device.launch(b, note("behind first"), [], [], NOTHING)
    b.synchronize()
    assert ran == ["first", "behind first"]


def test_times_are_on_the_hosts_clock(cuda: FakeCuda, device: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def between() -> None:
        cuda.put(lambda: None)

    first = device.compute.record(timed=True)
    for _ in range(5):
        device.launch(device.compute, between, [], [], NOTHING)
    last = device.compute.record(timed=True)
    with pytest.raises(DeviceError, match="has not passed"):
        first.time()
    last.synchronize()
    assert last.time() - first.time() == pytest.approx(0.006)  # five operations and the event itself
    with pytest.raises(DeviceError, match="timed=True"):
        device.compute.record().time()
    # a base is too far away after some seconds for f32 milliseconds
    later = device.now() + 3600.0
    monkeypatch.setattr(cuda_stream, "time", SimpleNamespace(perf_counter=lambda: later))
    event = device.compute.record(timed=True)
    event.synchronize()
    assert event.time() == pytest.approx(later, abs=0.1)


def test_the_timeline(cuda: FakeCuda, device: CudaAccelerator) -> None:
    arena = device.host_arena(10_000)
    host, slot, copies = arena.take(100, "host"), device.allocate(100, "slot"), device.stream("copy")
    host.host(write=True)[:] = 1
    device.copy_in(slot, host, copies)
    assert device.timeline() == []  # not asked for
    device.keep_timeline(True)
    device.copy_in(slot, host, copies)
    device.launch(device.compute, lambda: cuda.put(lambda: None), [], [], NOTHING, "router")
    device.run_host(lambda: None, NOTHING)
    copies.synchronize()
    spans = device.timeline()
    assert sorted((span.track, span.name) for span in spans) == [
        ("compute", "router"), ("copy", "slot"), ("host", "experts"), ("host", "wait")
    ]  # fmt: skip
    assert all(span.end >= span.start for span in spans)
    lengths = {span.track: span.end - span.start for span in spans}
    assert lengths["copy"] == pytest.approx(0.002) and lengths["compute"] == pytest.approx(0.002)
    assert spans == sorted(spans, key=lambda span: span.start)
    assert device.timeline() == []
    device.keep_timeline(False)
    device.copy_in(slot, host, copies)
    assert device.timeline() == []


def test_closing_waits_first_and_gives_everything_back(cuda: FakeCuda, device: CudaAccelerator) -> None:
    arena = device.host_arena(10_000)
    host, slot = arena.take(100, "host"), device.allocate(100, "slot")
    host.host(write=True)[:] = 1
    view = slot.tensor
    device.copy_in(slot, host, device.stream("copy"))
    cuda.log.clear()
    with device:
        pass
    assert cuda.log == ["synchronize device", "wait before unlocking", "unlock", "empty cache"]
    assert arena.closed and device.used == 0 and view.untyped_storage().nbytes() == 0
    device.close()
    assert len(cuda.log) == 4
    with pytest.raises(DeviceLostError, match="is closed"):
        device.allocate(1, "a")


def test_buffers_made_in_inference_mode_can_be_written_outside_of_it(device: CudaAccelerator) -> None:
    with torch.inference_mode():
        slot = device.allocate(100, "slot")
        part = slot.part(0, 10).tensor
    assert not part.is_inference() and not slot.tensor.is_inference()
