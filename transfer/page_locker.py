"""Page-locking of host memory for a CUDA device, by the driver's own calls.

torch binds cudaHostRegister, but not cudaHostGetDevicePointer, without which a kernel cannot reach the memory, nor
cudaGetLastError: a call of the runtime that fails leaves an error behind, and the next kernel launch of anybody reports
it. The driver's calls say what happened in their return code alone. The runtime is made of them, so memory that is
locked here is page-locked to torch too (`is_pinned()` asks the driver) and its copies are asynchronous.
"""

import ctypes
from typing import Any, Protocol

import torch

# usable in every context of the process, and by kernels
_PORTABLE, _DEVICEMAP = 1, 2

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(ctypes.c_void_p),),
    "cuCtxSynchronize": (),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuMemHostGetDevicePointer_v2": (ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


class PageLocker(Protocol):
    """Makes memory page-locked. Reasons are the driver's names, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def lock(self, address: int, nbytes: int) -> str | None:
        """None, or why not."""

    def unlock(self, address: int) -> str | None:
        """Undo `lock` of that address. None, or why not."""

    def wait(self) -> str | None:
        """Until the device is through with everything it was given. None, or why not."""

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        """Locked memory as the device sees it: a uint8 tensor [nbytes] on the device, valid until `unlock`.

        RuntimeError, "CUDA driver error", when the device refuses.
        """


class CudaPageLocker:
    """For the device that torch calls cuda:`index`. From any thread."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._driver: Any = ctypes.CDLL("libcuda.so.1")  # by this name torch has loaded it already
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._driver, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        ordinal = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._check("cuInit", self._reason(self._driver.cuInit(0)))
        self._check("cuDeviceGet", self._reason(self._driver.cuDeviceGet(ctypes.byref(ordinal), index)))
        # The context that the runtime, and so torch, uses. Never released, as torch never does.
        retained = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), ordinal)
        self._check("cuDevicePrimaryCtxRetain", self._reason(retained))

    def lock(self, address: int, nbytes: int) -> str | None:
        return self._call("cuMemHostRegister_v2", address, nbytes, _PORTABLE | _DEVICEMAP)

    def unlock(self, address: int) -> str | None:
        return self._call("cuMemHostUnregister", address)

    def wait(self) -> str | None:
        return self._call("cuCtxSynchronize")

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        seen = ctypes.c_uint64()
        self._check(
            "cuMemHostGetDevicePointer", self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(seen), address, 0)
        )
        return torch.as_tensor(_DeviceBytes(seen.value, nbytes), device=self._device)

    def _call(self, name: str, *arguments: Any) -> str | None:
        """Call it in our context: a thread that has not used CUDA yet has none."""
        why = self._reason(self._driver.cuCtxPushCurrent_v2(self._context))
        if why is not None:
            return why
        try:
            return self._reason(getattr(self._driver, name)(*arguments))
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _check(self, call: str, why: str | None) -> None:
        if why is not None:
            raise RuntimeError(f"CUDA driver error: {call}: {why}")

    def _reason(self, code: int) -> str | None:
        if code == 0:
            return None
        name = ctypes.c_char_p()
        if self._driver.cuGetErrorName(code, ctypes.byref(name)) != 0 or name.value is None:
            return f"CUDA error {code}"
        return name.value.decode()


class _DeviceBytes:
    """What torch takes for an array on the device. Nothing is copied."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }
