"""The functions of decode.c over tensors, in the model's type: fp32 or bf16.

Shapes: T tokens, B sequences, Hq query heads, Hk key-value heads, D values a head, H hidden width, F inner width.
Widths are multiples of the processor's vectors (`serves`); tensors are on the CPU and, rows apart, contiguous. A call
takes 2 to 3 µs beside its work: pointers are passed as they are and nothing is checked but here, once.
"""

from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.cpu.build import Built

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
KINDS = {"silu": 0, "gelu_pytorch_tanh": 1}

Ints = npt.NDArray[np.int64]
ENGRAM_WEIGHTS = "gain", "conv_gain", "conv"


class Shape(Structure):
    """What attention needs of a model's layer; `Shape` in decode.c."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "kv_heads", "width", "block_size", "window")),
        ("scale", c_float),
        ("threads", c_int32),
    )


class Step(Structure):
    """What attention needs of a step; `Step` in decode.c. Holds on to what it points at."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "sequences", "table_stride")),
        *((name, c_void_p) for name in ("slots", "table", "lengths")),
    )

    def __init__(self, slots: Tensor, table: Ints, lengths: Ints) -> None:
        """slots[T] of all tokens; table[B, ·] and lengths[B] of the first B of them, one a sequence."""
        table, lengths = np.ascontiguousarray(table), np.ascontiguousarray(lengths)
        super().__init__(
            len(slots), len(lengths), table.shape[1], slots.data_ptr(), table.ctypes.data, lengths.ctypes.data
        )
        self.held = (slots, table, lengths)


class EngramLayer(Structure):
    """What an Engram layer is made of; `Engram` in decode.c. Holds on to what it points at."""

    _fields_ = (
        *((name, c_int64) for name in ("branches", "width", "kernel")),
        *((name, c_float) for name in ("key_eps", "query_eps", "conv_eps")),
        ("threads", c_int32),
        *((name, c_void_p) for name in ENGRAM_WEIGHTS),
    )

    def __init__(self, gain: Tensor, conv_gain: Tensor, conv: Tensor, *eps: float) -> None:
        """gain[C, H], the product of the key's and the query's norms; conv_gain[C, H]; conv[C · H, K], all fp32; the
        three norms' eps in this order."""
        held = gain.contiguous(), conv_gain.contiguous(), conv.T.contiguous()
        super().__init__(*gain.shape, conv.shape[1], *eps, 1, *(weight.data_ptr() for weight in held))
        self.held = held


class CpuKernels:
    """`dtype`: of weights and activations, one of SUFFIXES."""

    def __init__(self, built: Built, dtype: torch.dtype) -> None:
        self.built, self.dtype = built, dtype
        library, pointer = built.library, c_void_p
        self._lanes, self._widest, self.few = library.lanes(), library.widest(), library.few()
        # as they are in decode.c: addresses and counts
        self.add_norm = self._function("add_norm", *(pointer,) * 3, c_float, pointer, c_int64, c_int64, c_int32)
        self.rotate = self._function("rotate", pointer, pointer, *(c_int64,) * 4, c_int32)
        self.product = self._function("gated", *(pointer,) * 3, *(c_int64,) * 4, c_int32, c_int32)
        self.at_once = getattr(library, f"at_once_{SUFFIXES[dtype]}")()
        self._multiply = self._function("multiply", *(pointer,) * 4, *(c_int64,) * 3, c_int32)
        self._engram = self._function("engram", POINTER(EngramLayer), pointer, pointer, c_int64, *(pointer,) * 5)
        self._attend = self._function("attend", POINTER(Shape), POINTER(Step), pointer, pointer, pointer)

    def _function(self, name: str, *types: Any) -> Any:
        function = getattr(self.built.library, f"{name}_{SUFFIXES[self.dtype]}")
        function.argtypes, function.restype = types, None
        return function

    def serves(self, head_dim: int, *widths: int) -> bool:
        """Whether heads of this size, and rows of these, can be computed."""
        return head_dim <= self._widest and not any(width % self._lanes for width in (head_dim, *widths))

    def multiplies(self, weight: Tensor) -> bool:
        """Whether `multiply` knows weights of this shape and type."""
        return weight.dtype == self.dtype and weight.is_contiguous() and not weight.shape[1] % self.at_once

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x[T, K] · weight[N, K]ᵀ + bias[N]: [T, N], for T from 1 to `few`; x contiguous."""
        (tokens, width), rows = x.shape, len(weight)
        out = torch.empty(tokens, rows, dtype=self.dtype)
        self._multiply(
            x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
            tokens, rows, width, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def norm(self, stream: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
        """stream fp32 [T, H], to which delta[T, H] is added in place if it is given → RMS norm · weight[H]: [T, H]."""
        out = torch.empty_like(stream, dtype=self.dtype)
        self.add_norm(
            stream.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            *stream.shape,
            torch.get_num_threads(),
        )
        return out

    def rotate_(self, heads: Tensor, rotation: Tensor) -> None:
        """heads[T, N, D] in place, rows of T may be apart: neighbouring pairs times rotation[T, 1, D / 2]."""
        tokens, count, width = heads.shape
        stride = heads.stride(0)
        self.rotate(heads.data_ptr(), rotation.data_ptr(), tokens, stride, count, width, torch.get_num_threads())

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """activation(gate) · up: [T, F], rows of T may be apart; `activation` is one of KINDS. `up` of any type."""
        tokens, width = gate.shape
        up = up.to(self.dtype)
        out = torch.empty(tokens, width, dtype=self.dtype)
        self.product(
            gate.data_ptr(), up.data_ptr(), out.data_ptr(), tokens, width, gate.stride(0), up.stride(0),
            KINDS[activation], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def attend(self, shape: Shape, step: Step, qkv: Tensor, cache: Tensor, out: Tensor) -> None:
        """Keys and values of qkv[T, (Hq + 2 Hk) · D] to the step's slots of cache[·, block_size, 2 · Hk · D]; then the
        attention of its first B tokens to out[T, Hq · D].
        """
        self._attend(byref(shape), byref(step), qkv.data_ptr(), cache.data_ptr(), out.data_ptr())

    def engram(
        self,
        layer: EngramLayer,
        hidden: Tensor,
        wide: Tensor,
        inputs: Tensor,
        slots: Tensor,
        taps: Tensor,
        total: Tensor | None,
    ) -> Tensor:
        """hidden fp32 [T, C · H], wide[T, (C + 1) · H]: keys, then the value → fp32 like hidden: total, if it is given,
        + α · value + SiLU(convolution).

        The convolution's inputs are written to slots[T] of inputs[·, C · H] and read from taps[K, T].
        """
        out = torch.empty_like(hidden)
        layer.threads = torch.get_num_threads()
        self._engram(
            byref(layer),
            hidden.data_ptr(),
            wide.data_ptr(),
            len(slots),
            slots.data_ptr(),
            taps.data_ptr(),
            inputs.data_ptr(),
            None if total is None else total.data_ptr(),
            out.data_ptr(),
        )
        return out
