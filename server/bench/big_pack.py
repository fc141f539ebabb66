"""Packs for experiments about disks and memory: every byte is real and on the disk, none means anything.

int8 rows, packed, random values with a scale that keeps them small. `memories_on_disk` has what `bench cold` and
`bench limit` measure: an Engram of many gigabytes, STEM rows for four layers, and both on one model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from server.bench.sparse_packs import HEADS, ORDERS, engram_pack, sparse_table, stem_layers, stem_pack
from server.cache.layouts import find_layout, read_header
from server.cache.row_table import Table
from server.cache.row_types import Bytes
from server.errors import CapacityError
from server.models.source import ModelSource, open_source
from server.runtime.engine import Engine
from server.settings import cache_folder

STRIDE = 80  # bytes of a packed int8 row of DIM values
FILL_BYTES = 64 << 20
SCALE = np.float32(1e-3)

Memories = dict[str, tuple[str, ...]]  # arm → --memory


@contextlib.contextmanager
def memories_on_disk(
    model: str, layers: Sequence[int], table_bytes: int, folder: Path | None, keep: bool
) -> Iterator[Memories]:
    """The packs of every arm: "engram" as `big_pack`, "stem" at the usual layers, and "engram+stem"."""
    with big_pack(model, layers, table_bytes, folder, keep) as engram, big_stem(model, folder, keep) as stem:
        one, other = f"engram={engram}", f"stem={stem}"
        yield {"engram": (one,), "stem": (other,), "engram+stem": (one, other)}


def tables_of(engine: Engine) -> list[Table]:
    """All tables of the engine's packs."""
    assert engine.runner.memories is not None
    return [table for pack in engine.runner.memories.packs for table in pack.tables.values()]


def big_pack(
    model: str, layers: Sequence[int], table_bytes: int, folder: Path | None, keep: bool
) -> contextlib.AbstractContextManager[Path]:
    """A pack with a table of at least `table_bytes` at every layer, removed at the end unless `keep`.

    Made below `folder`, or the cache folder. One that was kept is used again. Raises CapacityError without room.
    """
    rows = -(-table_bytes // (STRIDE * HEADS * len(ORDERS)))

    def build(source: ModelSource, out: Path) -> Path:
        return engram_pack(source, out, layers, rows, filled_table)

    name = f"big-{'-'.join(map(str, layers))}-{table_bytes}"
    return built(model, name, table_bytes * len(layers), build, folder, keep)


def big_stem(model: str, folder: Path | None, keep: bool) -> contextlib.AbstractContextManager[Path]:
    """As `big_pack`, a STEM pack, as large as the vocabulary makes it."""
    config, layers = open_source(model).config, stem_layers(open_source(model))

    def build(source: ModelSource, out: Path) -> Path:
        return stem_pack(source, out, layers, filled_table)

    name = f"big-stem-{'-'.join(map(str, layers))}-{config.vocab_size}-{config.intermediate_size}"
    return built(model, name, config.vocab_size * config.intermediate_size * len(layers), build, folder, keep)


@contextlib.contextmanager
def built(
    model: str,
    name: str,
    nbytes: int,
    build: Callable[[ModelSource, Path], Path],
    folder: Path | None,
    keep: bool,
) -> Iterator[Path]:
    """The pack `name` of about so many bytes: there already, or built beside its place and then moved there."""
    parent = folder or cache_folder()
    parent.mkdir(parents=True, exist_ok=True)
    out = parent / name
    try:
        if not out.exists():
            free = shutil.disk_usage(parent).free
            if free < 1.1 * nbytes:
                raise CapacityError(f"{nbytes} bytes of tables are needed and {parent} has {free} free: set --dir")
            with tempfile.TemporaryDirectory(prefix=".big-", dir=parent) as made:
                build(open_source(model), Path(made) / "pack").rename(out)
        yield out
    finally:
        if not keep:
            shutil.rmtree(out, ignore_errors=True)


def filled_table(path: Path, rows: int, dim: int, layer: int) -> None:
    """Writes every byte, and shows how far it is."""
    sparse_table(path, rows, dim, layer)
    column = find_layout([read_header(path)], "table").columns[0][0]
    generator, step = np.random.default_rng(layer), FILL_BYTES // column.stride
    with Progress(transient=True, console=Console(stderr=True)) as progress, path.open("r+b", buffering=0) as file:
        task = progress.add_task(f"table of layer {layer}: {rows * column.stride:,} bytes", total=rows)
        file.seek(column.offset)
        for first in range(0, rows, step):
            raw = rows_of(generator, min(step, rows - first), dim, column.stride)
            left = memoryview(raw.reshape(-1).data)
            while left:
                left = left[file.write(left) :]
            progress.advance(task, len(raw))
        os.fsync(file.fileno())


def rows_of(generator: np.random.Generator, count: int, dim: int, stride: int) -> Bytes:
    """Random packed int8 rows uint8[count, stride]."""
    raw = np.frombuffer(generator.bytes(count * stride), np.uint8).reshape(count, stride).copy()
    raw[:, dim : dim + 4] = np.frombuffer(SCALE.tobytes(), np.uint8)
    raw[:, dim + 4 :] = 0
    return raw
