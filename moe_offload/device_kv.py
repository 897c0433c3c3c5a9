"""Attention of a model with a device, as the scheduler sees it: what it costs on either side, and what it did cost.

Decode attention reads the keys and values once, so it is a rate of bytes and a start on either side. At first a share
of what either memory gives, which is measured at once (a virtual accelerator's clock is asked); on the host then what
the kernel reaches in use.
"""

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload.attention_layers import AttentionLayer
from moe_offload.cpu_kernels.bandwidth import measure_read_bandwidth
from moe_offload.cpu_kernels.team import Team
from moe_offload.device_attention import AttentionObserver
from moe_offload.transfer.accelerator import Accelerator, OutOfDeviceMemoryError, Work

if TYPE_CHECKING:
    from moe_offload.device_side import DeviceSide

_RECENT = 31  # measurements that a rate is the median of
_LEAST_BYTES = 1 << 20  # of keys and values: below, the start is what is measured
_SHARE = 0.5  # of a memory's rate that decode attention reaches, until it is known
_PROBE = 64 << 20  # bytes


class AttentionWork(AttentionObserver):
    """Implements `AttentionObserver` and `kv_placement.AttentionCosts`."""

    def __init__(
        self, accelerator: Accelerator, layers: tuple[AttentionLayer, ...], itemsize: int, team: Team | None = None
    ) -> None:
        self._accelerator = accelerator
        self._width = {layer.index: layer.width * itemsize for layer in layers}
        # By whether it is the host's: bytes per second, and seconds that attention of any length takes.
        self._rate = {True: 1.0, False: 1.0}
        self._start = {True: 0.0, False: 0.0}
        self._seen: dict[bool, list[float]] = {True: [], False: []}
        self.host_calls = self.device_calls = 0
        self.host_seconds = 0.0
        self._ended = False
        if accelerator.simulated:
            self._ask_the_clock()
        elif team is not None:
            self._measure(team)

    def attended(
        self, layer_idx: int, on_host: bool, batch: int, queries: int, length: int,
        run: Callable[[], torch.Tensor], *, link_bytes: int,
    ) -> torch.Tensor:  # fmt: skip
        """As of `AttentionObserver`: the work is told to the accelerator, and what the host did is measured."""
        if self._ended:
            return run()
        accelerator, compute = self._accelerator, self._accelerator.compute
        if not on_host:
            self.device_calls += 1
            if accelerator.simulated:
                accelerator.launch(
                    compute, _nothing, (), (), self._work(layer_idx, batch, queries, length), "attention"
                )
            return run()
        self.host_calls += 1
        began = accelerator.now()
        if accelerator.simulated:  # queries come, and the result goes back, over mapped memory
            accelerator.launch(compute, _nothing, (), (), Work(link_bytes=link_bytes, rows=()), "queries to the host")
        compute.synchronize()
        result: list[torch.Tensor] = []
        if accelerator.simulated:
            accelerator.run_host(
                lambda: result.append(run()), self._work(layer_idx, batch, queries, length), "attention"
            )
            accelerator.launch(compute, _nothing, (), (), Work(rows=()), "attention's result")
        else:
            result.append(run())
        seconds = accelerator.now() - began
        self.host_seconds += seconds
        self._learn(self._bytes(layer_idx, batch, length), seconds)
        return result[0]

    def end(self) -> None:
        """The device is gone. Copies of the model still come here."""
        self._ended = True

    def host(self, layer: int, batch: int, length: int) -> float:
        """Seconds of a step's attention of a layer on the host."""
        return self._start[True] + self._bytes(layer, batch, length) / self._rate[True]

    def device(self, layer: int, batch: int, length: int) -> float:
        """Likewise on the device."""
        return self._start[False] + self._bytes(layer, batch, length) / self._rate[False]

    def _bytes(self, layer: int, batch: int, length: int) -> int:
        return self._width.get(layer, 0) * batch * length

    def _work(self, layer: int, batch: int, queries: int, length: int) -> Work:
        nbytes = self._bytes(layer, batch, length)
        # a query multiplies with every element of the keys and values that it sees, half of them in a prompt
        return Work(nbytes, nbytes if queries == 1 else nbytes // 2, (queries,), launches=2)

    def _learn(self, nbytes: int, seconds: float) -> None:
        if nbytes < _LEAST_BYTES:
            return
        seen = self._seen[True]
        seen.append(nbytes / max(seconds - self._start[True], 0.1 * seconds))
        del seen[:-_RECENT]
        self._rate[True] = median(seen)

    def _measure(self, team: Team) -> None:
        """A share of what the memories give, and what a launch and a wait take."""
        accelerator, compute = self._accelerator, self._accelerator.compute
        self._rate[True] = _SHARE * measure_read_bandwidth(team, 256, 0.1) * 1e9
        probe = torch.zeros(_PROBE // 4, device=accelerator.torch_device)
        for _ in range(3):  # the first one finds its kernel
            start = compute.record(timed=True)
            probe.sum()
            end = compute.record(timed=True)
            end.synchronize()
            self._rate[False] = _SHARE * _PROBE / max(end.time() - start.time(), 1e-9)
        began = accelerator.now()
        probe[:1].sum()
        compute.synchronize()
        self._start[True] = self._start[False] = accelerator.now() - began
        self._start[True] *= 2  # queries come over, and the result goes back

    def _ask_the_clock(self) -> None:
        """A virtual accelerator's own clock says what both sides take, without any work done."""
        accelerator, compute = self._accelerator, self._accelerator.compute

        def on_host(nbytes: int) -> None:
            compute.synchronize()
            accelerator.run_host(_nothing, Work(nbytes, nbytes), "attention")
            accelerator.launch(compute, _nothing, (), (), Work(rows=()), "attention's result")

        def on_device(nbytes: int) -> None:
            accelerator.launch(compute, _nothing, (), (), Work(nbytes, nbytes, launches=2), "attention")
            compute.synchronize()

        for host, act in ((True, on_host), (False, on_device)):
            times = []
            for nbytes in (0, 64 << 20):
                began = accelerator.now()
                act(nbytes)
                times.append(accelerator.now() - began)
            self._start[host] = times[0]
            self._rate[host] = (64 << 20) / max(times[1] - times[0], 1e-9)


class SlotBook:
    """The expert slots as `kv_placement.ExpertSlots` sees them: those beyond the `least` that have to be there."""

    def __init__(self, side: "DeviceSide", least: int) -> None:
        self._side, self._least = side, least

    @property
    def slot_bytes(self) -> int:
        return self._side.slots.slot_bytes

    @property
    def count(self) -> int:
        return max(len(self._side.slots) - self._least, 0)

    def seconds(self) -> NDArray[np.float64]:
        """What the first, the second, ... slot saves in a step."""
        return self._side.dispatcher.slot_worth()[self._least :]

    def resize(self, count: int) -> None:
        """Have so many, or some fewer where slabs go whole. OutOfDeviceMemoryError: there is no memory for more."""
        before = self.count
        self._side.resize(count + self._least)
        if before < count > self.count:
            raise OutOfDeviceMemoryError(f"{self.count} of {count} expert slots fit")


def _nothing() -> None:
    pass
