"""Tables of any size made up in RAM: random bytes that are valid values, in a memfd that the device may read itself.

    threads ─ a block of random rows, turned on for each run ─→ memfd, mapped shared ─→ registered in chunks (CUDA)

`TABLE_GIB` says how large all tables of a memory are together: 93 GiB are 100 billion parameters of fp8. What this
machine has no room for is scaled down, and the scale is said. Rows repeat every few hundred megabytes; where they lie
does not, and only that costs anything.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from server.bench.gpu.device import memory_available, processors
from server.cache import cuda_memory
from server.cache.pinned_table import CHUNK, PinnedTable
from server.cache.row_types import Bytes, Float8, Int8, Plain, RowType, row_type
from server.errors import CapacityError

logger = logging.getLogger(__name__)

TABLE_GIB = 93.0
SPARE = 12 << 30  # bytes of RAM left to the process, the page tables of the table, and others
RUN_BYTES = 32 << 20
ALIGNMENT = 16  # of a row's beginning: as many bytes as a device reads at once
SCALE = 2.0**-10  # of fp8 and int8 values: rows stay small beside a hidden state


@dataclass(frozen=True, slots=True)
class MadeUp:
    """A table to be made up; attributes as RowTable's."""

    name: str
    rows: int
    dim: int
    row_type: RowType
    seed: int = 0

    @property
    def row_bytes(self) -> int:
        return -(-self.row_type.row_bytes(self.dim) // ALIGNMENT) * ALIGNMENT

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


def of_type(name: str) -> RowType:
    """The row type, its values scaled to be small."""
    return row_type(name, SCALE)


def table_bytes(wanted: float, free: int) -> tuple[int, str]:
    """Bytes that all tables may take together, of `wanted` GiB, and what to say of it; `free` bytes of RAM."""
    asked, room = int(wanted * (1 << 30)), free - SPARE
    if asked <= room:
        return asked, f"{wanted:g} GiB of table"
    if room < 1 << 30:
        raise CapacityError(
            f"TABLE_GIB is {wanted:g} and {free / (1 << 30):.1f} GiB of RAM are free, {SPARE >> 30} of which are left "
            f"to others; set TABLE_GIB={max(free / (1 << 30) / 4, 0.001):.3f}"
        )
    return room, f"{room / (1 << 30):.1f} GiB of table: TABLE_GIB={wanted:g} does not fit into this machine's RAM"


@dataclass(frozen=True, slots=True)
class Made:
    """A table, and how long it took: seconds to fill and to register."""

    table: PinnedTable
    fill_s: float
    register_s: float

    def figures(self) -> dict[str, float | int | str]:
        gigabytes = self.table.nbytes / 1e9
        return {
            "bytes": self.table.nbytes,
            "fill_s": self.fill_s,
            "fill_gb_per_s": gigabytes / self.fill_s,
            "register_s": self.register_s,
            "register_gb_per_s": gigabytes / self.register_s if self.register_s else 0.0,
            "note": self.table.note,
        }


def make(shape: MadeUp, device: torch.device) -> Made:
    """Fills the table with all processors and registers it. Raises CapacityError if registration is refused."""
    times = [time.perf_counter()]

    def filled(source: MadeUp, out: Bytes) -> None:
        fill(source, out)
        times.append(time.perf_counter())

    driver = (cuda_memory.register, cuda_memory.unregister) if device.type == "cuda" else (None, None)
    table = PinnedTable(shape, *driver, fill=filled, reserve=False)
    times.append(time.perf_counter())
    if device.type == "cuda" and not table.registered:
        raise CapacityError(
            f"table {shape.name}: {table.note}; raise the limit on locked memory (ulimit -l) or lower "
            f"TABLE_GIB to {shape.nbytes / 2 / (1 << 30):.1f}; chunks are {CHUNK >> 30} GiB"
        )
    return Made(table, times[1] - times[0], times[2] - times[1] if table.registered else 0.0)


def fill(shape: MadeUp, out: Bytes) -> None:
    """Random rows → out uint8[rows, R], by as many threads as there are processors."""
    per_run = max(1, RUN_BYTES // shape.row_bytes)
    local, numbers = threading.local(), itertools.count(shape.seed << 16)

    def run(first: int) -> None:
        if not hasattr(local, "block"):
            local.block = random_rows(np.random.default_rng(next(numbers)), min(per_run, shape.rows), shape)
        part, turn = out[first : first + per_run], first // per_run % len(local.block)
        head = min(len(part), len(local.block) - turn)
        part[:head] = local.block[turn : turn + head]
        part[head:] = local.block[: len(part) - head]

    with ThreadPoolExecutor(processors()) as pool:
        for _ in pool.map(run, range(0, shape.rows, per_run)):
            pass


def random_rows(generator: np.random.Generator, count: int, shape: MadeUp) -> Bytes:
    """Rows of the shape's type, uint8[count, R], every value finite; bytes after a row are zero."""
    raw = np.zeros((count, shape.row_bytes), np.uint8)
    kind, dim = shape.row_type, shape.dim
    if isinstance(kind, Plain):
        values = generator.standard_normal((count, dim), np.float32) * np.float32(SCALE)
        raw[:, : kind.row_bytes(dim)] = kind.encode(values)
        return raw
    raw[:, :dim] = generator.integers(0, 256, (count, dim), np.uint8)
    if isinstance(kind, Int8):
        raw[:, :dim][raw[:, :dim] == 128] = 127  # -128 is no value of a symmetric type
        raw[:, dim : dim + 4] = np.frombuffer(np.float32(SCALE).tobytes(), np.uint8)
        return raw
    raw[:, :dim][raw[:, :dim] & 0x7F == 0x7F] = 0  # e4m3's NaN
    if not isinstance(kind, Float8):
        raw[:, dim : kind.row_bytes(dim)] = generator.integers(108, 118, (count, kind.scale_bytes(dim)), np.uint8)
    return raw


def room_for_tables(wanted: float) -> tuple[int, str]:
    return table_bytes(wanted, memory_available())


def said(made: Mapping[int, Made]) -> str:
    """One line for people."""
    total = sum(each.table.nbytes for each in made.values())
    filled, registered = sum(m.fill_s for m in made.values()), sum(m.register_s for m in made.values())
    words = f"{total / (1 << 30):.2f} GiB of table filled in {filled:.1f} s ({total / 1e9 / filled:.1f} GB/s)"
    return words + (f", registered in {registered:.1f} s ({total / 1e9 / registered:.1f} GB/s)" if registered else "")
