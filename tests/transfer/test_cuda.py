"""The CUDA accelerator on a real card: `pytest -m gpu`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_offload.gpu_kernels.cupy_kernels import CupyKernels
from moe_offload.gpu_kernels.fused_experts import join
from moe_offload.transfer.accelerator import NOTHING, Buffer, OutOfDeviceMemoryError
from moe_offload.transfer.cuda import CudaAccelerator
from moe_offload.transfer.cuda_stream import CudaStream
from moe_offload.transfer.find_device import CudaFacts, cuda_problem, detect_cuda, open_accelerator, parse_device
from moe_offload.transfer.page_locker import CudaPageLocker
from moe_offload.transfer.pinned_arena import PinnedArena, PinnedBuffer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_problem(detect_cuda(), 0) is not None, reason=str(cuda_problem(detect_cuda(), 0))),
]
MIB = 1 << 20


@pytest.fixture
def device() -> Iterator[CudaAccelerator]:
    with CudaAccelerator(0, budget=1 << 30) as device:
        yield device


def noise(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)


def delay(device: CudaAccelerator, stream: CudaStream, cycles: int = 100_000_000) -> None:
    """Keep a stream busy for tens of milliseconds."""
    device.launch(stream, lambda: torch.cuda._sleep(cycles), [], [], NOTHING, "delay")  # type: ignore[no-untyped-call]


def test_there_and_back(device: CudaAccelerator) -> None:
    arena = device.host_arena(64 * MIB)
    there, back = arena.take(20 * MIB + 3, "there"), arena.take(20 * MIB + 3, "back")
    there.host(write=True)[:] = noise(there.nbytes)
    back.host(write=True)[:] = 0
    slot, result = device.allocate(there.nbytes, "slot"), device.allocate(there.nbytes, "result")
    assert slot.tensor.data_ptr() % 256 == 0
    copies = device.stream("copy")
    delay(device, copies)
    device.copy_in(slot, there, copies)
    device.compute.wait(copies.record())

    def add_one(source: torch.Tensor, target: torch.Tensor) -> None:
        torch.add(source, 1, out=target)

    device.launch(device.compute, add_one, [slot], [result], NOTHING)
    copies.wait(device.compute.record())
    device.copy_out(back, result, copies)
    copies.synchronize()
    np.testing.assert_array_equal(back.host(), there.host() + np.uint8(1))


def test_copies_of_an_arena_are_asynchronous(device: CudaAccelerator) -> None:
    host = device.host_arena(256 * MIB).take(256 * MIB, "host")
    assert host.tensor.is_pinned()
    slot, copies = device.allocate(host.nbytes, "slot"), device.stream("copy")
    delay(device, copies)
    device.copy_in(slot, host, copies)
    device.copy_out(host, slot, copies)
    done = copies.record()
    assert not done.query()
    done.synchronize()
    assert done.query()


def test_kernels_read_and_write_arena_memory_in_place(device: CudaAccelerator) -> None:
    arena = device.host_arena(3 * MIB)
    rows, out = arena.take(MIB, "rows"), arena.take(MIB, "out")
    rows.host(write=True)[:] = noise(MIB)
    out.host(write=True)[:] = 0

    def flip(source: torch.Tensor, target: torch.Tensor) -> None:
        assert source.is_cuda and target.is_cuda
        torch.bitwise_not(source, out=target)

    side = device.stream("side")
    device.launch(side, flip, [rows.part(4096, 1000)], [out.part(512, 1000)], NOTHING)
    side.synchronize()
    np.testing.assert_array_equal(out.host()[512:1512], ~rows.host()[4096:5096])
    assert not out.host()[:512].any() and not out.host()[1512:].any()


def test_segments_lie_behind_each_other(device: CudaAccelerator) -> None:
    """Copies and kernels reach every segment, up to its ends."""
    arena = PinnedArena(5 * MIB + 100, CudaPageLocker(0), segment=MIB)
    buffers: list[PinnedBuffer] = [arena.take(MIB, f"segment {number}") for number in range(5)]
    for number, buffer in enumerate(buffers):
        buffer.host(write=True)[:] = number + 1
        assert buffer.tensor.is_pinned() and int(buffer.seen.sum(dtype=torch.int64)) == MIB * (number + 1)
    arena.close()
    assert not torch.from_numpy(np.zeros(MIB, np.uint8)).is_pinned()


def test_a_refused_lock_leaves_no_error_behind(device: CudaAccelerator) -> None:
    locker = CudaPageLocker(0)
    arena = PinnedArena(MIB, locker)
    address = int(arena.array(0, 1).ctypes.data)
    assert locker.lock(address, 4096) == "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
    assert locker.unlock(address + MIB * 64) is not None
    assert int(torch.ones(10, device="cuda:0").sum()) == 10
    arena.close()


def test_memory_is_the_cards(device: CudaAccelerator) -> None:
    before = torch.cuda.memory_allocated(0)
    slots = device.allocate(100 * MIB, "slots")
    view = slots.part(5, 10).tensor
    assert torch.cuda.memory_allocated(0) - before == 100 * MIB
    with pytest.raises(OutOfDeviceMemoryError):
        device.allocate(1 << 30, "more than the budget")
    device.free(slots)
    assert torch.cuda.memory_allocated(0) == before and view.untyped_storage().nbytes() == 0


def test_the_card_is_smaller_than_asked_for() -> None:
    total = torch.cuda.mem_get_info(0)[1]
    with pytest.raises(ValueError, match=str(total)):
        CudaAccelerator(0, budget=total + 1)
    with CudaAccelerator(0) as device:
        assert 0 < device.budget < total
    with CudaAccelerator(0, budget=total) as device, pytest.raises(OutOfDeviceMemoryError):
        device.allocate(total, "everything")  # the context takes some


def test_times(device: CudaAccelerator) -> None:
    start = device.now()
    first = device.compute.record(timed=True)
    delay(device, device.compute)
    last = device.compute.record(timed=True)
    last.synchronize()
    end = device.now()
    assert start - 0.001 < first.time() < last.time() < end + 0.001
    assert last.time() - first.time() > 0.005


def test_copies_overlap_kernels(device: CudaAccelerator) -> None:
    host = device.host_arena(64 * MIB).take(64 * MIB, "host")
    host.host(write=True)[:] = 1
    slot, copies = device.allocate(host.nbytes, "slot"), device.stream("copy")
    device.copy_in(slot, host, copies)
    copies.synchronize()
    device.keep_timeline(True)
    delay(device, device.compute)
    device.copy_in(slot, host, copies)
    kernel, copy = sorted(device.timeline(), key=lambda span: span.track)
    assert (kernel.track, copy.track) == ("compute", "copy")
    assert copy.end < kernel.end  # issued behind it, over before it


def test_a_copy_is_as_fast_as_one_of_torch(device: CudaAccelerator) -> None:
    nbytes = 256 * MIB
    host, slot = device.host_arena(nbytes).take(nbytes, "host"), device.allocate(nbytes, "slot")
    host.host(write=True)[:] = 1
    copies = device.stream("copy")
    plain = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)

    def seconds(of_torch: bool) -> float:
        start = copies.record(timed=True)
        if of_torch:
            with copies.entered():
                slot.tensor.copy_(plain, non_blocking=True)
        else:
            device.copy_in(slot, host, copies)
        end = copies.record(timed=True)
        end.synchronize()
        return end.time() - start.time()

    ours = min(seconds(False) for _ in range(6))
    theirs = min(seconds(True) for _ in range(6))
    assert ours < theirs / 0.95


def test_opening_by_name() -> None:
    for request in ("auto", "cuda", "cuda:0"):
        device = open_accelerator(parse_device(request), 100 * MIB)
        assert isinstance(device, CudaAccelerator) and device.budget == 100 * MIB
        device.close()
    facts = detect_cuda()
    assert isinstance(facts, CudaFacts) and facts.cards[0].name == torch.cuda.get_device_name(0)


def test_our_kernels_on_streams(device: CudaAccelerator) -> None:
    pytest.importorskip("cupy")
    kernels = CupyKernels(device.index)
    slot: Buffer = device.allocate(400, "slot")
    for stream in (device.compute, device.stream("side")):

        def join_three(data: torch.Tensor) -> None:
            out, threes = data.view(torch.float32).view(1, 100), torch.full((1, 100), 3.0, device=data.device)
            join(kernels, out, threes, None)

        device.launch(stream, join_three, [], [slot], NOTHING)
        out = device.host_arena(4096).take(400, "out")
        device.copy_out(out, slot, stream)
        stream.synchronize()
        assert bool((out.host().view(np.float32) == 3).all())


_LOSE = """
import numpy as np, pytest, torch
from moe_offload.transfer.accelerator import NOTHING, DeviceLostError
from moe_offload.transfer.cuda import CudaAccelerator

device = CudaAccelerator(0, budget=1 << 28)
host = device.host_arena(1 << 20).take(1 << 20, "host")
host.host(write=True)[:] = 7
slot = device.allocate(1 << 20, "slot")
copies = device.stream("copy")

def fault(data):
    torch.take(data, torch.full((1,), 1 << 40, device=data.device))

with pytest.raises(DeviceLostError):
    device.launch(device.compute, fault, [slot], [], NOTHING)
    device.compute.synchronize()
for use in (lambda: device.copy_in(slot, host, copies), lambda: device.allocate(1, "a"), lambda: copies.record()):
    with pytest.raises(DeviceLostError):
        use()
assert (host.host() == 7).all()
device.free(slot)
device.close()
device.close()
print("the host went on")
"""


def test_a_lost_device_leaves_the_host_alive() -> None:
    """In a process of its own: a faulted context cannot be mended."""
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", _LOSE], cwd=root, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and "the host went on" in ran.stdout, ran.stderr[-2000:]
