"""Host memory that a CUDA device may read itself: registration through the driver's own calls; sending without waiting.

The driver's interface, not the runtime's: a refusal by cudaHostRegister stays behind as an error that blows up some
later, unrelated call. Registered memory counts as pinned for torch and for Triton kernels.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import numpy as np
import torch

PORTABLE_AND_MAPPED = 1 | 2  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP


def register(address: int, nbytes: int) -> None:
    """Makes [address, address + nbytes) readable by the device. Raises OSError with the driver's words."""
    torch.zeros(1, device="cuda")  # the driver's call needs this thread's context
    _check(_driver().cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), PORTABLE_AND_MAPPED))


def unregister(address: int) -> None:
    """Undoes `register` of the same address, once nothing on the device reads it any more. Raises OSError."""
    with suppress(RuntimeError):  # of a device that broke, and reads nothing
        torch.cuda.synchronize()
    _check(_driver().cuMemHostUnregister(ctypes.c_void_p(address)))


def send(array: np.ndarray[Any, np.dtype[Any]], device: torch.device) -> torch.Tensor:
    """The array on the device, in the current stream's order. The host does not wait, as it would for memory that is
    not pinned, and may change the array at once, except where the device is the CPU.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        words = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(words))
        raise OSError(code, (words.value or b"unknown error").decode())
