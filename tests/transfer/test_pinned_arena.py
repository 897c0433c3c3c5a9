"""The arena over memory that is not really locked, and the calls that would lock it."""

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.transfer.accelerator import DeviceError
from moe_offload.transfer.page_locker import CudaPageLocker
from moe_offload.transfer.pinned_arena import PinnedArena

SEGMENT = 8192


class FakeLocker:
    """Locks at most `most` ranges; the device's view is the memory itself."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most = most
        self.locked: dict[int, int] = {}
        self.views = self.waits = 0

    def lock(self, address: int, nbytes: int) -> str | None:
        if len(self.locked) >= self.most:
            return "CUDA_ERROR_OUT_OF_MEMORY"
        assert nbytes > 0 and address not in self.locked
        assert address % mmap.PAGESIZE == 0 and nbytes % mmap.PAGESIZE == 0
        self.locked[address] = nbytes
        return None

    def unlock(self, address: int) -> str | None:
        return "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED" if self.locked.pop(address, None) is None else None

    def wait(self) -> str | None:
        self.waits += 1
        return None

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        self.views += 1
        assert nbytes <= self.locked[address]  # no view reaches beyond what was locked
        data = memoryview((ctypes.c_uint8 * nbytes).from_address(address))
        return torch.from_numpy(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("nbytes", [1, 4096, 8192, 8193, 50_001])
def test_every_byte_lies_in_one_locked_segment(nbytes: int) -> None:
    locker = FakeLocker()
    arena = PinnedArena(nbytes, locker, segment=SEGMENT, threads=3)
    ranges = sorted(locker.locked.items())
    assert all(size <= SEGMENT for _, size in ranges)
    assert all(a + size == b for (a, size), (b, _) in zip(ranges, ranges[1:], strict=False))
    assert nbytes <= sum(size for _, size in ranges) < nbytes + mmap.PAGESIZE
    arena.close()
    assert not locker.locked and locker.waits == 1


@given(st.lists(st.integers(1, SEGMENT), min_size=1, max_size=12), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_buffers_are_aligned_apart_and_within_a_segment(sizes: list[int], segments: int) -> None:
    with_room = segments * SEGMENT - 100  # the last segment is not whole
    arena = PinnedArena(with_room, FakeLocker(), segment=SEGMENT, threads=1)
    base = int(arena.array(0, 1).ctypes.data)
    end = 0
    for number, size in enumerate(sizes):
        try:
            buffer = arena.take(size, f"buffer {number}")
        except MemoryError:
            # refused only where it would not have fitted
            start = -(-end // 4096) * 4096
            if start // SEGMENT != (start + size - 1) // SEGMENT:
                start = -(-start // SEGMENT) * SEGMENT
            assert start + size > with_room
            continue
        first = int(buffer.host().ctypes.data) - base
        assert first % 4096 == 0 and first >= end and first + size <= with_room
        assert first // SEGMENT == (first + size - 1) // SEGMENT
        assert buffer.nbytes == size and not buffer.on_device
        end = first + size
    arena.close()


def test_parts_are_views_of_the_same_bytes() -> None:
    locker = FakeLocker()
    arena = PinnedArena(20_000, locker, segment=1 << 20)
    buffer = arena.take(10_000, "experts")
    buffer.host(write=True)[:] = np.arange(10_000) % 251
    part = buffer.part(300, 40).part(5, 30)
    assert part.name == "experts[300:340][5:35]"
    np.testing.assert_array_equal(part.host(), buffer.host()[305:335])
    part.tensor.fill_(7)
    assert bool((part.seen == 7).all()) and bool((buffer.host()[305:335] == 7).all())
    assert part.seen is part.seen and bool((buffer.part(305, 30).seen == 7).all())
    assert locker.views == 1  # a segment is asked for once
    for offset, nbytes in [(-1, 5), (0, 0), (0, 10_001), (9_999, 2)]:
        with pytest.raises(IndexError, match="are not in its 10000 bytes"):
            buffer.part(offset, nbytes)


def test_the_device_sees_every_buffer_where_it_is() -> None:
    arena = PinnedArena(3 * SEGMENT - 100, FakeLocker(), segment=SEGMENT)
    buffers = [arena.take(size, f"buffer {size}") for size in (5000, 3000, 4096, 4000, 10)]
    for number, buffer in enumerate(buffers):
        buffer.host(write=True)[:] = number
    for number, buffer in enumerate(buffers):
        assert buffer.seen.numel() == buffer.nbytes and bool((buffer.seen == number).all())
        assert buffer.seen.data_ptr() == buffer.tensor.data_ptr() == buffer.host().ctypes.data
    arena.close()


def test_a_refusal_half_way_gives_everything_back_and_says_how_much_there_is() -> None:
    locker = FakeLocker(most=3)
    with pytest.raises(MemoryError, match="locks 24576 of 50000 bytes.*CUDA_ERROR_OUT_OF_MEMORY.*at most 24576"):
        PinnedArena(50_000, locker, segment=SEGMENT)
    assert not locker.locked


def test_an_interrupt_while_locking_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    locker = FakeLocker()
    lock = locker.lock

    def interrupted(address: int, nbytes: int) -> str | None:
        if len(locker.locked) == 2:
            raise KeyboardInterrupt
        return lock(address, nbytes)

    monkeypatch.setattr(locker, "lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PinnedArena(50_000, locker, segment=SEGMENT)
    assert not locker.locked


def test_bad_sizes() -> None:
    arena = PinnedArena(3 * SEGMENT, FakeLocker(), segment=SEGMENT)
    with pytest.raises(ValueError, match="at least 1"):
        arena.take(0, "nothing")
    with pytest.raises(MemoryError, match="has at most 8192"):
        arena.take(SEGMENT + 1, "long")
    arena.take(SEGMENT, "a")
    arena.take(1, "b")
    with pytest.raises(MemoryError, match="d: 8192 bytes asked for, 0 left of an arena of 24576"):
        arena.take(4097, "c") and arena.take(SEGMENT, "d")
    with pytest.raises(ValueError, match="at least 1"):
        PinnedArena(0, FakeLocker())
    with pytest.raises(ValueError, match="multiple of 4096"):
        PinnedArena(10, FakeLocker(), segment=5000)
    with pytest.raises(MemoryError, match="no room"):
        PinnedArena(1 << 60, FakeLocker())


def test_closed_is_closed() -> None:
    locker = FakeLocker()
    arena = PinnedArena(10_000, locker)
    buffer = arena.take(100, "a")
    held = buffer.host(write=True)
    held[:] = 5
    assert buffer.tensor.numel() == buffer.seen.numel() == 100  # cached from here on
    arena.close()
    arena.close()
    assert locker.waits == 1 and not held.any()  # the memory went back although somebody holds an array
    for use in (lambda: arena.take(1, "b"), lambda: buffer.host(), lambda: buffer.tensor, lambda: buffer.seen):
        with pytest.raises(DeviceError, match="closed"):
            use()


def test_what_was_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    buffer = PinnedArena(100, FakeLocker()).take(100, "a")
    with torch.inference_mode():
        first, second = buffer.tensor, buffer.seen
    first.copy_(torch.ones(100, dtype=torch.uint8))
    second.copy_(torch.ones(100, dtype=torch.uint8))


class FakeDriver:
    """libcuda: checks the arguments as ctypes would, and writes the calls down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.codes: dict[str, int] = {}

    def __getattr__(self, name: str) -> "FakeFunction":
        function = FakeFunction(self, name)
        setattr(self, name, function)
        return function


class FakeFunction:
    argtypes: Sequence[Any] = ()
    restype: Any = None

    def __init__(self, driver: FakeDriver, name: str) -> None:
        self.driver, self.name = driver, name

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes) and self.restype is ctypes.c_int
        for kind, argument in zip(self.argtypes, arguments, strict=True):
            kind.from_param(argument)
        self.driver.calls.append((self.name, arguments))
        outputs = {"cuDevicePrimaryCtxRetain": 77, "cuMemHostGetDevicePointer_v2": 0x7000, "cuDeviceGet": 3}
        if self.name in outputs:
            arguments[0]._obj.value = outputs[self.name]
        if self.name == "cuGetErrorName":
            arguments[1]._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
        return self.driver.codes.get(self.name, 0)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()

    def load(name: str) -> FakeDriver:
        assert name == "libcuda.so.1"
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    return driver


def test_the_driver_is_called_in_the_context_that_torch_uses(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    locker = CudaPageLocker(1)
    assert [name for name, _ in driver.calls] == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert driver.calls[1][1][1] == 1 and driver.calls[2][1][1].value == 3
    driver.calls.clear()
    assert locker.lock(0x1000, 4096) is None and locker.unlock(0x1000) is None and locker.wait() is None
    names = [name for name, _ in driver.calls]
    around = ["cuMemHostRegister_v2", "cuMemHostUnregister", "cuCtxSynchronize"]
    assert names == [step for call in around for step in ("cuCtxPushCurrent_v2", call, "cuCtxPopCurrent_v2")]
    assert driver.calls[0][1][0].value == 77
    assert driver.calls[1][1] == (0x1000, 4096, 3)  # portable and mapped

    seen: list[Any] = []
    monkeypatch.setattr(torch, "as_tensor", lambda data, device: seen.append((data, device)))
    locker.view(0x1000, 64)
    data, device = seen[0]
    assert device == torch.device("cuda", 1)
    assert data.__cuda_array_interface__ == {
        "shape": (64,), "typestr": "|u1", "data": (0x7000, False), "strides": None, "version": 2
    }  # fmt: skip


def test_refusals_of_the_driver(driver: FakeDriver) -> None:
    locker = CudaPageLocker(0)
    driver.codes["cuMemHostRegister_v2"] = 2
    assert locker.lock(0x1000, 4096) == "CUDA_ERROR_OUT_OF_MEMORY"
    assert driver.calls[-1][0] == "cuGetErrorName" or driver.calls[-1][0] == "cuCtxPopCurrent_v2"
    assert [name for name, _ in driver.calls].count("cuCtxPopCurrent_v2") == 1  # the context is put back all the same
    driver.codes.update(cuGetErrorName=1, cuMemHostUnregister=713)
    assert locker.unlock(0x1000) == "CUDA error 713"
    driver.codes["cuMemHostGetDevicePointer_v2"] = 1
    with pytest.raises(RuntimeError, match="CUDA driver error: cuMemHostGetDevicePointer: CUDA error 1"):
        locker.view(0x1000, 4096)
    driver.codes["cuCtxPushCurrent_v2"] = 709
    assert locker.wait() == "CUDA error 709" and driver.calls[-2][0] == "cuCtxPushCurrent_v2"
    driver.codes["cuInit"] = 100
    with pytest.raises(RuntimeError, match="cuInit: CUDA error 100"):
        CudaPageLocker(0)
