"""A pack whose tables are too large to make with care: every byte is real and on the disk, none means anything.

For experiments about disks and memory: int8 rows, packed, random values with a scale that keeps them small. The
backbone answers nonsense with it, at the speed it would answer with a trained one of the same size.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from server.cache.layouts import find_layout, read_header
from server.cache.row_types import Bytes, row_type
from server.cache.table_writer import write_sparse_table
from server.commands.attach import fresh_config
from server.errors import CapacityError
from server.memory.engram import Engram
from server.memory.pack import MODULES, engram_shape, table_file
from server.models.source import open_source

HEADS, DIM, ORDERS, ROW_TYPE, STRIDE = 8, 64, (2, 3), "int8", 80
FILL_BYTES = 64 << 20
SCALE = np.float32(1e-3)


def cache_folder() -> Path:
    """Where experiments build what they need."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "engram-server"


@contextlib.contextmanager
def big_pack(model: str, layers: Sequence[int], table_bytes: int, folder: Path | None, keep: bool) -> Iterator[Path]:
    """A pack with a table of at least `table_bytes` at every layer, removed at the end unless `keep`.

    Made below `folder`, or the cache folder. One that was kept is used again. Raises CapacityError without room.
    """
    parent = folder or cache_folder()
    parent.mkdir(parents=True, exist_ok=True)
    out = parent / f"big-{'-'.join(map(str, layers))}-{table_bytes}"
    try:
        if not out.exists():
            build(model, layers, table_bytes, out)
        yield out
    finally:
        if not keep:
            shutil.rmtree(out, ignore_errors=True)


def build(model: str, layers: Sequence[int], table_bytes: int, out: Path) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < 1.1 * table_bytes * len(layers):
        raise CapacityError(
            f"{table_bytes * len(layers)} bytes of tables are needed and {out.parent} has {free} free: set --dir"
        )
    rows = -(-table_bytes // (STRIDE * HEADS * len(ORDERS)))
    config = fresh_config(open_source(model), layers, rows, DIM, HEADS, ORDERS, 0, ROW_TYPE)
    with tempfile.TemporaryDirectory(prefix=".big-", dir=out.parent) as made:
        folder = Path(made) / "pack"
        folder.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        with Progress(transient=True, console=Console(stderr=True)) as progress:
            for layer in layers:
                total = sum(sum(order) for order in config.primes[str(layer)])
                task = progress.add_task(f"table of layer {layer}: {total * STRIDE:,} bytes", total=total)
                for count in fill(folder / table_file(layer), total, layer):
                    progress.advance(task, count)
                engram = Engram(engram_shape(config), torch.float32)
                engram.reset(torch.Generator().manual_seed(layer))
                tensors |= {f"layers.{layer}.{name}": p.detach() for name, p in engram.named_parameters()}
        save_file(tensors, folder / MODULES)
        config.write(folder)
        folder.rename(out)


def fill(path: Path, rows: int, seed: int) -> Iterator[int]:
    """Writes `rows` rows; yields how many were just written."""
    write_sparse_table(path, rows, DIM, row_type(ROW_TYPE), layout="packed")
    begin = find_layout([read_header(path)], "table").columns[0][0].offset
    generator, step = np.random.default_rng(seed), FILL_BYTES // STRIDE
    with path.open("r+b", buffering=0) as file:
        file.seek(begin)
        for first in range(0, rows, step):
            raw = rows_of(generator, min(step, rows - first))
            left = memoryview(raw.reshape(-1).data)
            while left:
                left = left[file.write(left) :]
            yield len(raw)
        os.fsync(file.fileno())


def rows_of(generator: np.random.Generator, count: int) -> Bytes:
    """Random packed int8 rows uint8[count, STRIDE]."""
    raw = np.frombuffer(generator.bytes(count * STRIDE), np.uint8).reshape(count, STRIDE).copy()
    raw[:, DIM : DIM + 4] = np.frombuffer(SCALE.tobytes(), np.uint8)
    raw[:, DIM + 4 :] = 0
    return raw
