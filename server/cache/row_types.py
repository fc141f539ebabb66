"""Row types: how the D values of one table row stand in its bytes, and how to turn bytes into values and back.

    float32, float16, bfloat16   | v0 v1 … v(D-1) |
    int8                         | q0 … q(D-1) | scale: float32, little endian |       value = q · scale
    float8_e4m3                  | q0 … q(D-1) |                                       value = q · the tensor's scale
    float8_e4m3_e8m0             | q0 … q(D-1) | s0 … s(D/32-1) |                      value = q · 2^(s - 127)

e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN, there is no infinity, the largest value is
448. e8m0: an exponent alone, 0xff is NaN. Both after the OCP 8-bit and microscaling (MX) formats. A product is
rounded to float32 first and then to the model's dtype.

Shapes: N rows, D values a row, R bytes a row; R may exceed the bytes above, the rest is padding.
Knows nothing of files, row ids or layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.errors import TableError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

E4M3_MAX = 448.0
INT8_MAX = 127
BLOCK = 32  # values that share one e8m0 scale
E8M0_BIAS = 127


class RowType(ABC):
    """One way of writing D values as bytes. `name` is what packs and flags call it."""

    name: ClassVar[str]

    @abstractmethod
    def value_bytes(self, dim: int) -> int:
        """Bytes of the D values. Raises TableError for a D this type cannot hold."""

    def scale_bytes(self, dim: int) -> int:
        """Bytes of the scales that follow the values."""
        return 0

    def row_bytes(self, dim: int) -> int:
        return self.value_bytes(dim) + self.scale_bytes(dim)

    def is_stored_as(self, dtype: torch.dtype) -> bool:
        """Whether a row's bytes are already values of `dtype`, so that nothing is left to decode."""
        return False

    @abstractmethod
    def decode(self, raw: Tensor, out: Tensor) -> None:
        """raw uint8[N, R] → out[N, D], contiguous, in the model's dtype. Wide inputs run on several threads."""

    @abstractmethod
    def encode(self, rows: Floats) -> Bytes:
        """float32[N, D] → uint8[N, row_bytes(D)], rounded to nearest, ties to even. Raises TableError where a scaled
        type meets a value that is not finite."""


@dataclass(frozen=True, slots=True)
class Plain(RowType):
    """Values in an IEEE-like type of their own, no scale."""

    dtype: torch.dtype

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.dtype).removeprefix("torch.")

    def value_bytes(self, dim: int) -> int:
        return dim * self.dtype.itemsize

    def is_stored_as(self, dtype: torch.dtype) -> bool:
        return dtype == self.dtype

    def decode(self, raw: Tensor, out: Tensor) -> None:
        out.copy_(raw[:, : self.value_bytes(out.shape[1])].view(self.dtype))

    def encode(self, rows: Floats) -> Bytes:
        return torch.from_numpy(rows).to(self.dtype).contiguous().view(torch.uint8).numpy()


@dataclass(frozen=True, slots=True)
class Int8(RowType):
    """Symmetric 8-bit integers, one float32 scale per row: absmax / 127."""

    name: ClassVar[str] = "int8"

    def value_bytes(self, dim: int) -> int:
        return dim

    def scale_bytes(self, dim: int) -> int:
        return 4

    def decode(self, raw: Tensor, out: Tensor) -> None:
        dim = out.shape[1]
        scale = raw[:, dim : dim + 4].contiguous().view(torch.float32)
        torch.mul(raw[:, :dim].view(torch.int8), scale, out=out)

    def encode(self, rows: Floats) -> Bytes:
        _check_finite(rows)
        scale = (np.abs(rows).max(axis=1, keepdims=True) / INT8_MAX).astype("<f4")
        divisor = np.where(scale > 0, scale, np.float32(1))
        values = np.clip(np.rint(rows / divisor), -INT8_MAX, INT8_MAX).astype(np.int8)
        return np.concatenate([values.view(np.uint8), scale.view(np.uint8)], axis=1)


@dataclass(frozen=True, slots=True)
class Float8(RowType):
    """e4m3 values, one scale for the whole tensor; it lies beside the table, not in the row."""

    scale: float = 1.0
    name: ClassVar[str] = "float8_e4m3"

    def value_bytes(self, dim: int) -> int:
        return dim

    def decode(self, raw: Tensor, out: Tensor) -> None:
        _look_up(_e4m3_values(self.scale, out.dtype), raw[:, : out.shape[1]], out)

    def encode(self, rows: Floats) -> Bytes:
        _check_finite(rows)
        return _to_e4m3(rows / np.float32(self.scale))


@dataclass(frozen=True, slots=True)
class BlockFloat8(RowType):
    """e4m3 values, an e8m0 scale for every 32 of them."""

    name: ClassVar[str] = "float8_e4m3_e8m0"

    def value_bytes(self, dim: int) -> int:
        if dim % BLOCK:
            raise TableError(f"{self.name} rows need a dimension divisible by {BLOCK}; this table's is {dim}")
        return dim

    def scale_bytes(self, dim: int) -> int:
        return dim // BLOCK

    def decode(self, raw: Tensor, out: Tensor) -> None:
        rows, dim = out.shape
        blocks = dim // BLOCK
        values = torch.empty(rows, dim)
        _look_up(_e4m3_values(1.0, torch.float32), raw[:, :dim], values)
        scales = torch.empty(rows, blocks)
        _look_up(_e8m0_values(), raw[:, dim : dim + blocks], scales)
        torch.mul(values.view(rows, blocks, BLOCK), scales.unsqueeze(-1), out=out.view(rows, blocks, BLOCK))

    def encode(self, rows: Floats) -> Bytes:
        _check_finite(rows)
        blocks = rows.reshape(len(rows), -1, BLOCK)
        absmax = np.abs(blocks).max(axis=2, keepdims=True).astype(np.float64)
        # The smallest power of two that brings the block's largest value to 448 or below.
        mantissa, exponent = np.frexp(absmax / E4M3_MAX)
        power = np.where(mantissa == 0.5, exponent - 1, exponent)
        power = np.where(absmax > 0, np.clip(power, -E8M0_BIAS, 127), 0)
        values = _to_e4m3(np.ldexp(blocks.astype(np.float64), -power).astype(np.float32).reshape(rows.shape))
        scales = (power + E8M0_BIAS).astype(np.uint8).reshape(len(rows), -1)
        return np.concatenate([values, scales], axis=1)


ROW_TYPES: dict[str, RowType] = {
    t.name: t
    for t in (Plain(torch.float32), Plain(torch.float16), Plain(torch.bfloat16), Int8(), Float8(), BlockFloat8())
}


def row_type(name: str, scale: float = 1.0) -> RowType:
    """The row type packs call `name`; `scale` is the tensor's, for float8_e4m3. Raises TableError on unknown names."""
    if name not in ROW_TYPES:
        raise TableError(f"{name!r} is no row type; this server reads {', '.join(ROW_TYPES)}")
    return Float8(scale) if name == Float8.name else ROW_TYPES[name]


def _look_up(lut: Tensor, codes: Tensor, out: Tensor) -> None:
    torch.index_select(lut.to(codes.device), 0, codes.reshape(-1).int(), out=out.view(-1))


@cache
def _e4m3_values(scale: float, dtype: torch.dtype) -> Tensor:
    """[256] the value of every e4m3 byte times `scale`."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return (codes.float() * torch.tensor(scale, dtype=torch.float32)).to(dtype)


@cache
def _e8m0_values() -> Tensor:
    """[256] the power of two of every e8m0 byte."""
    powers = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - E8M0_BIAS).float()
    powers[255] = torch.nan
    return powers


def _to_e4m3(values: Floats) -> Bytes:
    # Beyond 448 the cast would give NaN, not the largest value.
    clipped = torch.from_numpy(np.clip(values, -E4M3_MAX, E4M3_MAX))
    return clipped.to(torch.float8_e4m3fn).contiguous().view(torch.uint8).numpy()


def _check_finite(rows: Floats) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise TableError(f"row {int(np.argmin(finite))} of those to write holds a value that is not finite")
