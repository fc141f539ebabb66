"""Layouts: where each row of a table lies in the safetensors files that hold it.

    one tensor    table[rows, D]                                          float32, float16, bfloat16, float8
    many shards   P.shard_0.weight … P.shard_<n-1>.weight, in order       any of these
    apart         table[rows, D] and table.scale[rows, ·]                 int8, float8 with e8m0 scales
    packed        table[rows, stride] of uint8: values, scale, padding    one 16-byte-aligned read a row; declared in
                                                                          the file's metadata

All come down to one or two columns, each a run of bytes per row, found in one or more regions of fixed stride.

The header is read by hand (8-byte length, then JSON) because the safetensors library gives tensors, not the file
offsets that a mapping of our own needs, and its Python door copies. Only headers are read: the cost does not depend on
the size of the table. Knows nothing of mappings, row ids or layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from server.cache.row_types import BLOCK, BlockFloat8, Float8, Int8, RowType, row_type
from server.errors import TableError

MAX_HEADER = 100_000_000  # the format's own limit
DTYPE_BYTES = {
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64"), 8),
}
PLAIN_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD = re.compile(r"\.shard_(\d{1,9})\.weight$")

LAYOUT_KEY, ROW_TYPE_KEY, DIM_KEY, SCALE_KEY = "engram.layout", "engram.row_type", "engram.dim", "engram.scale"
PACKED = "packed"
PACKED_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's place: `begin`, `end` are offsets into the file, header included."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Region:
    """`rows` records of `stride` bytes, one after another, from `offset` on."""

    path: Path
    offset: int
    rows: int
    stride: int


@dataclass(frozen=True, slots=True)
class Layout:
    """`columns`: the values, then the scales if they lie apart; each column's regions hold all rows in order."""

    kind: str
    row_type: RowType
    rows: int
    dim: int
    columns: tuple[tuple[Region, ...], ...]

    @property
    def row_bytes(self) -> int:
        """R: the bytes a gathered row takes, padding of the packed layout included."""
        return sum(regions[0].stride for regions in self.columns)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(region.path for regions in self.columns for region in regions))


def packed_stride(row_bytes: int) -> int:
    return -(-row_bytes // PACKED_ALIGNMENT) * PACKED_ALIGNMENT


def safetensors_files(path: Path | str | Sequence[Path | str]) -> list[Path]:
    """A file, all *.safetensors of a folder, or the files listed. Raises TableError if there are none."""
    if not isinstance(path, (str, Path)):
        return [file for part in path for file in safetensors_files(part)]
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise TableError(f"{path} holds no .safetensors file")
        return files
    if not path.exists():
        raise TableError(f"{path} does not exist")
    return [path]


def read_header(path: Path) -> Header:
    """Raises TableError if the file is no safetensors file, or is shorter or longer than its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > MAX_HEADER:
                raise TableError(f"{path} ({size} bytes) is no safetensors file")
            text = file.read(length)
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror}") from None
    if len(text) < length:
        raise TableError(f"{path} has {size} bytes; its safetensors header alone takes {8 + length}")
    try:
        content = json.loads(text)
        metadata = _texts(content.pop("__metadata__", {}))
        tensors = {name: _entry(path, name, spec, 8 + length) for name, spec in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise TableError(f"{path} ({size} bytes) is no safetensors file: its header is not valid") from None
    needed = max((entry.end for entry in tensors.values()), default=8 + length)
    if needed != size:
        state = "truncated" if size < needed else "longer than it should be"
        raise TableError(f"{path} is {state}: it has {size} bytes, its header describes {needed}")
    return Header(path, tensors, metadata)


def find_layout(headers: Sequence[Header], tensor: str) -> Layout:
    """The layout of the table called `tensor`, or whose shards are called `tensor`.shard_<i>.weight.

    Raises TableError if the files hold no such table, or one of a shape or type that is not a table's.
    """
    tensors = {name: entry for header in headers for name, entry in header.tensors.items()}
    where = ", ".join(str(header.path) for header in headers)
    parts = _parts(tensors, tensor, where)
    metadata = next(header.metadata for header in headers if header.path == parts[0].path)
    if metadata.get(LAYOUT_KEY) == PACKED and not SHARD.search(parts[0].name):
        return _packed(parts[0], metadata)
    first = parts[0]
    for part in parts:
        if len(part.shape) != 2 or part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
            wanted = ", ".join(map(str, ("·", *first.shape[1:])))
            raise TableError(
                f"tensor {part.name!r} in {part.path} is {part.dtype} {list(part.shape)}; "
                f"a table needs [rows, values] of one type, here {first.dtype} [{wanted}]"
            )
    dim = first.shape[1]
    scales = [_scale_of(tensors, part) for part in parts]
    kind, rows = ("shards" if len(parts) > 1 else "tensor"), sum(part.shape[0] for part in parts)
    if not rows or not dim:
        raise TableError(f"table {tensor!r} in {first.path} has no rows: its shape is [{rows}, {dim}]")
    if first.dtype not in (*PLAIN_TYPES, "F8_E4M3", "I8"):
        raise TableError(
            f"tensor {first.name!r} in {first.path} is {first.dtype}; "
            f"this server reads {', '.join(PLAIN_TYPES)}, I8 and F8_E4M3 tables"
        )
    values = tuple(_region(part) for part in parts)
    if first.dtype in PLAIN_TYPES:
        return Layout(kind, row_type(PLAIN_TYPES[first.dtype]), rows, dim, (values,))
    if first.dtype == "F8_E4M3" and all(scale is None or math.prod(scale.shape) == 1 for scale in scales):
        return Layout(kind, Float8(_tensor_scale(scales)), rows, dim, (values,))
    apart: RowType
    scale_dtypes: tuple[str, ...]
    if first.dtype == "F8_E4M3":
        apart, scale_dtypes, width = BlockFloat8(), ("F8_E8M0", "U8"), dim // BLOCK
    else:
        apart, scale_dtypes, width = Int8(), ("F32",), 1
    apart.row_bytes(dim)
    columns = (values, tuple(_scale_region(p, s, scale_dtypes, width) for p, s in zip(parts, scales, strict=True)))
    return Layout("apart", apart, rows, dim, columns)


def _entry(path: Path, name: str, spec: dict[str, Any], data: int) -> TensorEntry:
    dtype, shape = str(spec["dtype"]), tuple(int(n) for n in spec["shape"])
    begin, end = (data + int(offset) for offset in spec["data_offsets"])
    size = DTYPE_BYTES.get(dtype)
    if not data <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(name)
    if size is not None and end - begin != math.prod(shape) * size:
        raise TableError(
            f"tensor {name!r} in {path} has {end - begin} bytes; its shape {list(shape)} of {dtype} needs "
            f"{math.prod(shape) * size}"
        )
    return TensorEntry(name, path, dtype, shape, begin, end)


def _texts(metadata: Any) -> dict[str, str]:
    """Raises ValueError for metadata that is no object of texts."""
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__")
    return metadata


def _parts(tensors: dict[str, TensorEntry], tensor: str, where: str) -> list[TensorEntry]:
    """The tensors that hold the rows, in order."""
    if tensor in tensors:
        return [tensors[tensor]]
    shards: dict[int, TensorEntry] = {}
    for name, entry in tensors.items():
        match = SHARD.search(name)
        if match and name[: match.start()] == tensor:
            shards[int(match[1])] = entry
    if not shards:
        names = _some(tensors)
        raise TableError(f"{where} holds no table {tensor!r}; its tensors are {names}")
    missing = next((i for i in range(len(shards)) if i not in shards), None)
    if missing is not None:
        raise TableError(f"{where} lacks shard {missing} of {tensor!r}: it has {len(shards)} of {max(shards) + 1}")
    return [shards[i] for i in range(len(shards))]


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def _scale_names(name: str) -> tuple[str, ...]:
    beside = name.removesuffix("weight") + "scale" if name.endswith(".weight") else name + ".scale"
    return beside, name + "_scale", name + "_scale_inv"


def _scale_of(tensors: dict[str, TensorEntry], part: TensorEntry) -> TensorEntry | None:
    return next((tensors[name] for name in _scale_names(part.name) if name in tensors), None)


def _tensor_scale(scales: Sequence[TensorEntry | None]) -> float:
    """The one scale of the whole table; 1 where none is stored."""
    found = {1.0 if scale is None else _read_scalar(scale) for scale in scales}
    if len(found) > 1:
        raise TableError(f"the shards' scales differ ({min(found)} to {max(found)}); one scale per table is read")
    return found.pop()


def _read_scalar(entry: TensorEntry) -> float:
    with entry.path.open("rb") as file:
        file.seek(entry.begin)
        raw = file.read(entry.end - entry.begin)
    if entry.dtype == "F32":
        return float(np.frombuffer(raw, "<f4")[0])
    if entry.dtype == "BF16":
        return float(np.frombuffer(b"\0\0" + raw, "<f4")[0])
    raise TableError(f"scale {entry.name!r} in {entry.path} is {entry.dtype}; F32 or BF16 is read")


def _region(entry: TensorEntry) -> Region:
    return Region(entry.path, entry.begin, entry.shape[0], entry.shape[1] * DTYPE_BYTES[entry.dtype])


def _scale_region(part: TensorEntry, scale: TensorEntry | None, dtypes: tuple[str, ...], width: int) -> Region:
    if scale is None:
        names = ", ".join(_scale_names(part.name))
        raise TableError(
            f"{part.dtype} tensor {part.name!r} in {part.path} has no scales beside it (looked for {names})"
        )
    rows = part.shape[0]
    shapes = ((rows, width), (rows,)) if width == 1 else ((rows, width),)
    if scale.shape not in shapes or scale.dtype not in dtypes:
        raise TableError(
            f"scale {scale.name!r} in {scale.path} is {scale.dtype} {list(scale.shape)}; "
            f"{part.name!r} needs {' or '.join(dtypes)} [{rows}, {width}]"
        )
    return Region(scale.path, scale.begin, rows, width * DTYPE_BYTES[scale.dtype])


def _packed(entry: TensorEntry, metadata: dict[str, str]) -> Layout:
    try:
        dim = int(metadata[DIM_KEY])
        kind = row_type(metadata[ROW_TYPE_KEY], float(metadata.get(SCALE_KEY, "1")))
    except (KeyError, ValueError):
        raise TableError(f"{entry.path} is declared packed but does not say {ROW_TYPE_KEY} and {DIM_KEY}") from None
    needed = packed_stride(kind.row_bytes(dim))
    if dim < 1 or entry.dtype != "U8" or len(entry.shape) != 2 or not entry.shape[0] or entry.shape[1] != needed:
        raise TableError(
            f"packed tensor {entry.name!r} in {entry.path} is {entry.dtype} {list(entry.shape)}; "
            f"{kind.name} rows of {dim} values need U8 [rows, {needed}]"
        )
    return Layout(PACKED, kind, entry.shape[0], dim, ((_region(entry),),))
