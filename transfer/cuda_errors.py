"""What an exception of torch or CuPy says about the device, in our words.

CUDA reports a fault in a kernel at some later call, any call, and from then on at all of them: the context is dead, and
with it what the device's memory held. Only running out of memory leaves everything else as it was. Other refusals (no
code for this card, a bad configuration) would let the context live, but what was asked for did not happen: they end the
use of the device, too.
"""

from types import TracebackType

import torch

from moe_offload.transfer.accelerator import DeviceError, DeviceLostError, OutOfDeviceMemoryError

_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY",
           "CUBLAS_STATUS_ALLOC_FAILED")  # fmt: skip
_FAULTS = ("CUDA error", "cudaError", "CUDA_ERROR_", "CUBLAS_STATUS_", "cuDNN error", "CUDA driver error")
# torch 2.6 has no such class and raises RuntimeError
_AcceleratorError: type[BaseException] | None = getattr(torch, "AcceleratorError", None)


def device_error(error: BaseException, device: str = "the device") -> DeviceError | None:
    """The DeviceError that `error` means, which is to be raised from it; None when it is not about the device."""
    if isinstance(error, DeviceError):
        return error
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    text = str(error)
    line = text.strip().partition("\n")[0]
    of_cupy = type(error).__module__.partition(".")[0] in ("cupy", "cupy_backends")
    if isinstance(error, torch.OutOfMemoryError) or any(mark in text for mark in _MEMORY):
        return OutOfDeviceMemoryError(f"{device} is out of memory: {line}")
    if isinstance(error, MemoryError):
        return OutOfDeviceMemoryError(f"{device} is out of memory: {line}") if of_cupy else None
    if (_AcceleratorError is not None and isinstance(error, _AcceleratorError)) or any(
        mark in text for mark in _FAULTS
    ):
        return DeviceLostError(f"{device} does not answer any more: {line}")
    return None


class Health:
    """Around every call of the device: `with health:`. Once the device is lost, each of them raises DeviceLostError."""

    __slots__ = ("device", "gone")

    def __init__(self, device: str) -> None:
        self.device = device
        self.gone: str | None = None  # why nothing works any more

    def __enter__(self) -> None:
        if self.gone is not None:
            raise DeviceLostError(self.gone)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        meant = device_error(error, self.device)
        if isinstance(meant, DeviceLostError):
            self.gone = str(meant)
        if meant is not None and meant is not error:
            raise meant from error
