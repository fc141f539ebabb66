"""GgufFile: a GGUF file opened in place: its metadata, where its tensors stand, and their rows in fp32.

    magic · version · counts │ key, type, value … │ name, dims, type, offset … │ padding │ tensor data, aligned

Torch-free. It knows the file format and nothing of models. The header is read here in one pass instead of by the gguf
package's reader, which makes one mapped array per vocabulary entry: 1.6 s and 160 MB for SmolLM2, against 0.1 s here.
Dequantisation is the package's. Format: the GGUF specification in ggml's docs, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from server.errors import BrokenModel, UnknownModel, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
LENGTH = struct.Struct("<Q")
MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` outermost first, as numpy and torch count; `offset` from the start of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])


class GgufFile:
    """An opened file. `metadata` by key; `tensors` by name. Raises UnknownModel, BrokenModel or UnsupportedModel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.size = len(data)
                cursor = _Cursor(data, path)
                self.metadata, self.tensors = _read_header(cursor)
        except OSError as error:
            raise UnknownModel(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise BrokenModel(f"{path} is no readable GGUF file: {error}") from None
        self._check_sizes()

    def _check_sizes(self) -> None:
        for name, tensor in self.tensors.items():
            end = tensor.offset + tensor.rows * tensor.row_bytes
            if end > self.size:
                raise BrokenModel(
                    f"{self.path} is truncated: {name} ends at byte {end} and the file has {self.size}; fetch it again"
                )

    def number(self, key: str, default: float | None = None) -> Any:
        """A numeric metadata value, `default` without one. Raises BrokenModel for a value of another type."""
        value = self.metadata.get(key, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise BrokenModel(f"{self.path} has {key} = {str(value)[:40]!r}; it must be a number")
        return value

    def map(self) -> NDArray[np.uint8]:
        """The file's bytes, mapped; released with the last array that looks into them."""
        return np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r"))  # a plain array: slices of it cost less

    def rows(self, data: NDArray[np.uint8], name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of a tensor, dequantised: fp32[stop - start, last dimension]. `data` is `map()`'s."""
        tensor = self.tensors[name]
        first = tensor.offset + start * tensor.row_bytes
        packed = data[first : first + (stop - start) * tensor.row_bytes].reshape(stop - start, tensor.row_bytes)
        if tensor.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            packed = packed.view(np.float32 if tensor.kind == GGMLQuantizationType.F32 else np.float16)
        try:
            return np.require(dequantize(packed, tensor.kind), dtype=np.float32, requirements="W")
        except NotImplementedError:
            raise UnsupportedModel(f"{self.path} stores {name} as {tensor.kind.name}, which cannot be read") from None


class _Cursor:
    """Reads little-endian values one after another; a read past the end says so instead of returning less."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > self.size:
            raise ValueError(f"it is truncated: {count} bytes wanted at byte {self.at} and the file has {self.size}")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def count(self, smallest: int) -> int:
        """A number of items of at least `smallest` bytes each; more than the file could hold is refused at once."""
        (count,) = LENGTH.unpack(self.take(8))
        if count * smallest > self.size - self.at:
            raise ValueError(f"it is truncated: {count} items at byte {self.at} and the file has {self.size} bytes")
        return int(count)

    def unsigned(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def text(self) -> str:
        return self.take(self.count(1)).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.numbers(kind, 1)[0]
        items = self.unsigned()
        if items == STRING:
            return [self.text() for _ in range(self.count(8))]
        if items == ARRAY:
            raise ValueError(f"an array of arrays stands at byte {self.at}")
        return self.numbers(items, self.count(1))

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            raise ValueError(f"unknown value type {kind} at byte {self.at}")
        dtype = np.dtype(SCALARS[kind])
        numbers: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return numbers


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    magic, version = cursor.take(4), cursor.unsigned()
    if magic != MAGIC or version not in VERSIONS:
        raise ValueError(f"it starts with {magic!r}, version {version}; it needs {MAGIC!r}, version 2 or 3")
    tensor_count, value_count = cursor.count(24), cursor.count(12)
    metadata = _named(value_count, lambda: (cursor.text(), cursor.value(cursor.unsigned())))
    found = _named(tensor_count, lambda: _read_tensor(cursor))
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return metadata, {n: GgufTensor(t.shape, t.kind, t.offset + start, t.row_bytes) for n, t in found.items()}


def _named(count: int, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for _ in range(count):
        name, item = read()
        if name in items:
            raise ValueError(f"{name} stands in it twice")
        items[name] = item
    return items


def _read_tensor(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """A tensor's entry; its offset still counts from the start of the data."""
    name, dimensions = cursor.text(), cursor.unsigned()
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(int(d) for d in reversed(np.frombuffer(cursor.take(8 * dimensions), "<u8").tolist()))
    kind = GGMLQuantizationType(cursor.unsigned())
    (offset,) = LENGTH.unpack(cursor.take(8))
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block_values:
        raise ValueError(f"{name} has rows of {shape[-1]} values and {kind.name} packs {block_values} at a time")
    return name, GgufTensor(shape, kind, int(offset), shape[-1] // block_values * block_bytes)
