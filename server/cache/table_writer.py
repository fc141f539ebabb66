"""Writing table files: streamed, aligned, and never half-written under the final name.

    | 8: length | header JSON, spaces | table: values | padding | table.scale |
                                      ▲ 4096·k                  ▲ 4096·m

Every tensor starts on a 4,096-byte boundary: the header is filled up with spaces, and since the format allows no holes
between tensors, the gap before scales is a uint8 tensor of its own. The file grows under a temporary name in the same
folder, is synced, and then renamed.

Shapes: chunks are float32[n, D], any n, `rows` in all. Knows nothing of what the rows mean.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from server.cache.layouts import DIM_KEY, LAYOUT_KEY, PACKED, ROW_TYPE_KEY, SCALE_KEY, packed_stride
from server.cache.row_types import BlockFloat8, Bytes, Float8, Floats, Int8, Plain, RowType
from server.errors import TableError

WriteLayout = Literal["apart", "packed"]
ALIGNMENT = 4096
RANDOM_BLOCK = 4096  # rows drawn from one generator
SIGMA = 0.02  # of fresh rows, as embeddings are usually initialised
PLAIN_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file to be: `nbytes` from `offset`, an offset into the data, on."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def write_table(
    path: Path,
    chunks: Iterable[Floats],
    rows: int,
    dim: int,
    row_type: RowType,
    *,
    layout: WriteLayout = "apart",
    tensor: str = "table",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes float32 rows, encoded, as the table `tensor` of a safetensors file at `path`, replacing what was there.

    "apart" stores values and, if the type has any, scales as two tensors; "packed" puts both into one 16-byte-aligned
    row. Raises TableError if the chunks do not add up to `rows`, or the disk is full; `path` is then as it was before.
    """
    plan = _Placement.of(rows, dim, row_type, layout, tensor, metadata)
    with _new_file(path, plan.nbytes) as fd:
        _write(fd, plan.header, 0)
        done = 0
        for chunk in chunks:
            if chunk.ndim != 2 or chunk.shape[1] != dim or done + len(chunk) > rows:
                raise TableError(f"{path} is to hold {rows} rows of {dim}; after {done} came a chunk {chunk.shape}")
            plan.put(fd, row_type.encode(np.ascontiguousarray(chunk, np.float32)), done)
            done += len(chunk)
        if done != rows:
            raise TableError(f"{path} is to hold {rows} rows; {done} came")
        plan.end(fd)


def grow_table(
    path: Path,
    encoded: Callable[[int], Iterator[Bytes]],
    rows: int,
    dim: int,
    row_type: RowType,
    *,
    layout: WriteLayout = "apart",
) -> None:
    """As `write_table`, from encoded rows uint8[n, R], and so that a run cut off at any moment can be gone on with.

    PATH.growing holds the rows so far, PATH.rows how many of them are on disk for certain. `encoded(first)` gives the
    rows from `first` on. Who goes on must know that the rows are the same as before.
    """
    plan = _Placement.of(rows, dim, row_type, layout, "table", None)
    growing, counter = path.with_name(f"{path.name}.growing"), path.with_name(f"{path.name}.rows")
    done = _rows_on_disk(growing, counter, rows)
    fd = os.open(growing, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not done:
            os.ftruncate(fd, 0)
            _write(fd, plan.header, 0)
        for raw in encoded(done):
            plan.put(fd, raw, done)
            done += len(raw)
            os.fdatasync(fd)
            _note(counter, done)
        if done != rows:
            raise TableError(f"{path} is to hold {rows} rows; {done} came")
        plan.end(fd)
        os.fsync(fd)
    except OSError as error:
        raise _write_error(error, path, plan.nbytes) from None
    finally:
        os.close(fd)
    os.replace(growing, path)
    counter.unlink()
    _sync_folder(path.parent)


def _rows_on_disk(growing: Path, counter: Path, rows: int) -> int:
    """What an earlier run left; 0 if it left nothing that counts."""
    try:
        done = int(counter.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return done if growing.exists() and 0 <= done <= rows else 0


def _note(counter: Path, done: int) -> None:
    partial = counter.with_name(f"{counter.name}.new")
    partial.write_text(str(done), encoding="utf-8")
    partial.replace(counter)


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where a table's rows go in its file. `stride`: bytes from one row's values to the next row's."""

    tensors: dict[str, _Tensor]
    header: bytes
    row_type: RowType
    value_bytes: int
    stride: int
    values_at: int
    scales_at: int | None  # None: the rows carry their scales, or there are none
    tensor_scale_at: int | None

    @classmethod
    def of(
        cls,
        rows: int,
        dim: int,
        row_type: RowType,
        layout: WriteLayout,
        tensor: str,
        metadata: Mapping[str, str] | None,
    ) -> _Placement:
        tensors, header = _plan(rows, dim, row_type, layout, tensor, metadata)
        main, scale = tensors[tensor], tensors.get(f"{tensor}.scale")
        value_bytes = row_type.value_bytes(dim)
        apart = layout == "apart" and row_type.row_bytes(dim) > value_bytes
        at = None if scale is None else len(header) + scale.offset
        return cls(
            tensors,
            header,
            row_type,
            value_bytes,
            stride=main.nbytes // rows if rows else 0,
            values_at=len(header) + main.offset,
            scales_at=at if apart else None,
            tensor_scale_at=None if apart else at,
        )

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.tensors.values())

    def put(self, fd: int, raw: Bytes, first: int) -> None:
        """Encoded rows, from row `first` on."""
        at = self.values_at + first * self.stride
        if self.scales_at is None:
            _write(fd, _padded(raw, self.stride), at)
            return
        _write(fd, raw[:, : self.value_bytes], at)
        _write(fd, raw[:, self.value_bytes :], self.scales_at + first * (raw.shape[1] - self.value_bytes))

    def end(self, fd: int) -> None:
        """What follows the rows."""
        if self.tensor_scale_at is not None:
            _write(fd, struct.pack("<f", _tensor_scale(self.row_type)), self.tensor_scale_at)


def write_sparse_table(
    path: Path,
    rows: int,
    dim: int,
    row_type: RowType,
    *,
    layout: WriteLayout = "apart",
    tensor: str = "table",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A table whose bytes are all zero and take no room on disk, of any size: for tests and benchmarks."""
    tensors, header = _plan(rows, dim, row_type, layout, tensor, metadata)
    with _new_file(path, len(header)) as fd:
        _write(fd, header, 0)
        os.ftruncate(fd, len(header) + sum(entry.nbytes for entry in tensors.values()))


def random_rows(rows: int, dim: int, seed: int, sigma: float = SIGMA) -> Iterator[Floats]:
    """Normal rows, in chunks that take little memory: float32[≤ 4096, D].

    Block i is drawn from a Philox generator keyed (seed, i), so that any part can be made again by itself.
    """
    for block, first in enumerate(range(0, rows, RANDOM_BLOCK)):
        generator = np.random.Generator(np.random.Philox(key=[seed & 0xFFFF_FFFF_FFFF_FFFF, block]))
        chunk = generator.standard_normal((min(RANDOM_BLOCK, rows - first), dim), np.float32)
        chunk *= np.float32(sigma)
        yield chunk


def _plan(
    rows: int, dim: int, row_type: RowType, layout: WriteLayout, tensor: str, metadata: Mapping[str, str] | None
) -> tuple[dict[str, _Tensor], bytes]:
    """The file's tensors and its header, whose length is a multiple of 4,096."""
    about = dict(metadata or {})
    about |= {LAYOUT_KEY: layout, ROW_TYPE_KEY: row_type.name, DIM_KEY: str(dim)}
    row_bytes = row_type.row_bytes(dim)
    specs: list[tuple[str, str, tuple[int, ...], int]]
    if layout == PACKED:
        stride = packed_stride(row_bytes)
        about[SCALE_KEY] = repr(_tensor_scale(row_type))
        specs = [(tensor, "U8", (rows, stride), rows * stride)]
    else:
        dtype, scale_dtype, scale_shape, scale_bytes = _stored(rows, dim, row_type)
        value_bytes = rows * row_type.value_bytes(dim)
        specs = [(tensor, dtype, (rows, dim), value_bytes)]
        if scale_dtype:
            gap = -value_bytes % ALIGNMENT
            if gap:
                specs.append((f"{tensor}.padding", "U8", (gap,), gap))
            specs.append((f"{tensor}.scale", scale_dtype, scale_shape, scale_bytes))
    tensors, offset = {}, 0
    for name, dtype, shape, nbytes in specs:
        tensors[name] = _Tensor(dtype, shape, offset, nbytes)
        offset += nbytes
    content: dict[str, Any] = {"__metadata__": about}
    for name, entry in tensors.items():
        offsets = [entry.offset, entry.offset + entry.nbytes]
        content[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(content).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return tensors, len(text).to_bytes(8, "little") + text


def _stored(rows: int, dim: int, row_type: RowType) -> tuple[str, str, tuple[int, ...], int]:
    """Safetensors dtype of the values; dtype, shape and bytes of the scales, "" if there are none."""
    match row_type:
        case Plain():
            return PLAIN_DTYPES[row_type.name], "", (), 0
        case Int8():
            return "I8", "F32", (rows, 1), rows * 4
        case Float8():
            return "F8_E4M3", "F32", (1,), 4
        case BlockFloat8():
            width = row_type.scale_bytes(dim)
            return "F8_E4M3", "F8_E8M0", (rows, width), rows * width
    raise TableError(f"{row_type.name} rows cannot be written")


def _tensor_scale(row_type: RowType) -> float:
    return row_type.scale if isinstance(row_type, Float8) else 1.0


def _padded(raw: Bytes, stride: int) -> Bytes:
    if raw.shape[1] == stride:
        return raw
    padded = np.zeros((len(raw), stride), np.uint8)
    padded[:, : raw.shape[1]] = raw
    return padded


def _write(fd: int, data: bytes | Bytes, offset: int) -> None:
    left = memoryview(data if isinstance(data, bytes) else data.tobytes())
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


@contextmanager
def _new_file(path: Path, nbytes: int) -> Iterator[int]:
    """A file under a temporary name beside `path`; renamed to `path` at the end, removed on any error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    fd = -1
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        yield fd
        os.fsync(fd)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(error, path, nbytes) from None
    finally:
        if fd >= 0:
            os.close(fd)
        temporary.unlink(missing_ok=True)


def _write_error(error: OSError, path: Path, nbytes: int) -> TableError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return TableError(f"no room for {path}: it needs {nbytes} bytes, {path.parent} has {free} free")
    return TableError(f"{path} cannot be written: {error.strerror}")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
