"""Triton, where it is installed and of use; without it kernels are plain functions that nobody calls.

`from kernels.language import jit, tl` in every op: modules import on any machine, and `available` says whether their
kernels can run or be compiled. Triton takes half a second to import, so a machine without a GPU leaves it alone unless
TRITON_INTERPRET is in the environment before the first import: 1 makes Triton run the kernels on the CPU, one program
after another, as tests do; 0 is for compiling without running them.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


class NoLanguage:
    """What kernel signatures name."""

    constexpr = None


triton: Any = None
tl: Any = NoLanguage()
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    with suppress(ImportError):
        triton = importlib.import_module("triton")
        tl = importlib.import_module("triton.language")

available = triton is not None
interpreting = available and os.environ.get("TRITON_INTERPRET") == "1"


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, or the function as it is where Triton is not installed."""
    return triton.jit(kernel) if available else kernel


def jit_for_any(*varying: str) -> Callable[[Callable[..., None]], Any]:
    """`jit` for a kernel some of whose arguments vary from launch to launch: one compilation serves all their values.
    Triton makes another where an integer is 1 or 16 divides a number or an address, in the midst of serving."""

    def made(kernel: Callable[..., None]) -> Any:
        assert set(varying) <= set(inspect.signature(kernel).parameters), varying
        plain = {"do_not_specialize": varying, "do_not_specialize_on_alignment": varying}
        return triton.jit(kernel, **plain) if available else kernel

    return made


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels run on this tensor's device: CUDA, or anything while interpreting."""
    return available and (tensor.is_cuda or interpreting)


def power_of_two(size: int) -> int:
    """The least power of two that holds `size`: what block shapes are made of."""
    return 1 << max(0, size - 1).bit_length()


def blocks(size: int, block: int) -> int:
    """How many blocks of `block` cover `size`."""
    return -(-size // block)
