"""`pack`: a memory's tables in another layout or row type, as a pack of its own. Of a checkpoint, only the memory.

    IN             a pack, an engram-peft adapter, or the folder of a Qwen or DeepSeek-V4.1 checkpoint
    OUT.partial/   grows chunk by chunk; what is on disk is never written twice, whatever interrupts
    OUT            appears at the end, whole

Rows that keep their type are copied as they are, bit for bit. A float8 table with one scale takes the scale that its
largest value needs, found in a first pass over the rows.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial as bound
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from server.cache.row_table import RowTable
from server.cache.row_types import E4M3_MAX, Bytes, Floats, RowType, row_type
from server.cache.table_writer import WriteLayout, grow_table
from server.errors import PackError, SettingsError
from server.memory.attached import read_memory
from server.memory.attachment import fingerprint
from server.memory.pack import MODULES, StemConfig, table_file, write_config
from server.memory.stored import Stored, counting

CHUNK_BYTES = 32 << 20  # of rows decoded at once
STAMP = "source.json"
LAYOUTS = ("packed", "apart")
README = "README.md"
Count = Callable[[int], None]


def pack(*, source: Path, out: Path, layout: str = "packed", dtype: str = "auto") -> Path:
    """Writes the pack to `out` and returns it. Raises PackError, TableError, or SettingsError for a wrong flag."""
    if layout not in LAYOUTS:
        raise SettingsError(f"--layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if out.exists():
        raise PackError(f"{out} is already there; choose another --out or remove it")
    memory = read_memory(source)
    tables = open_tables(source, memory)
    wanted = next(iter(tables.values())).row_type.name if dtype == "auto" else dtype
    row_type(wanted)
    stamp = {"layout": layout, "dtype": wanted, "from": print_of(source, memory)}
    partial = begin(out, stamp)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for layer, table in tables.items():
            path = partial / table_file(layer)
            passes = 2 if scans(table, wanted) else 1
            task = progress.add_task(f"layer {layer}: {table.rows:,} rows", total=passes * table.rows)
            if not path.exists():
                rewrite(table, path, wanted, cast(WriteLayout, layout), bound(progress.advance, task))
            table.close()
    finish(source, memory, partial, wanted)
    partial.rename(out)
    return out


def open_tables(source: Path, memory: Stored | StemConfig) -> Mapping[int, RowTable]:
    """Raises PackError with both sizes for a table that is not as the config says."""
    if isinstance(memory, StemConfig):
        return {layer: RowTable.open(source / table_file(layer)) for layer in memory.layer_ids}
    memory.check_shape()
    memory.check_rows(counting(memory.config.addressing()))
    return memory.open_tables(source.name)


def print_of(source: Path, memory: Stored | StemConfig) -> str:
    return fingerprint(source, memory.layer_ids) if isinstance(memory, StemConfig) else memory.fingerprint


def begin(out: Path, stamp: dict[str, str]) -> Path:
    """The folder that grows. What an earlier run left there counts if it came from the same, with the same flags."""
    partial = out.with_name(f"{out.name}.partial")
    text = json.dumps(stamp)
    stamped = partial / STAMP
    if partial.exists() and (not stamped.is_file() or stamped.read_text(encoding="utf-8") != text):
        raise PackError(f"{partial} is left from another run: remove it, or finish that run with its own flags")
    partial.mkdir(parents=True, exist_ok=True)
    stamped.write_text(text, encoding="utf-8")
    return partial


def scans(table: RowTable, wanted: str) -> bool:
    """Whether all values must be seen before the first is written."""
    return wanted == "float8_e4m3" and table.row_type.name != wanted


def rewrite(table: RowTable, path: Path, wanted: str, layout: WriteLayout, count: Count) -> None:
    """The table, from where an earlier run left it."""
    same = table.row_type.name == wanted
    kind: RowType = (
        table.row_type if same else row_type(wanted, scale_for(table, path, count) if scans(table, wanted) else 1.0)
    )

    def encoded(first: int) -> Iterator[Bytes]:
        count(first)
        for raw, values in chunks(table, count, first):
            yield raw[:, : kind.row_bytes(table.dim)] if same else kind.encode(values)

    grow_table(path, encoded, table.rows, table.dim, kind, layout=layout)
    scale_file(path).unlink(missing_ok=True)


def scale_for(table: RowTable, path: Path, count: Count) -> float:
    """The whole table's scale, found once and kept until the table is written."""
    kept = scale_file(path)
    if kept.exists():
        count(table.rows)
        return float(kept.read_text(encoding="utf-8"))
    largest = max((float(np.abs(values).max(initial=0)) for _, values in chunks(table, count)), default=0.0)
    scale = float(np.float32(largest / E4M3_MAX)) if largest else 1.0  # as files hold it
    partial = kept.with_name(f"{kept.name}.new")
    partial.write_text(repr(scale), encoding="utf-8")
    partial.replace(kept)
    return scale


def scale_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.scale")


def chunks(table: RowTable, count: Count, first: int = 0) -> Iterator[tuple[Bytes, Floats]]:
    """The rows from `first` on, in order: as stored, uint8[n, R], and as float32[n, D].

    Raises PackError for values that are not finite, and TableError.
    """
    size = max(1, CHUNK_BYTES // (4 * table.dim))
    for start in range(first, table.rows, size):
        ids = np.arange(start, min(start + size, table.rows))
        raw = np.empty((len(ids), table.row_bytes), np.uint8)
        table.gather(ids, raw)
        values = torch.empty(len(ids), table.dim)
        table.row_type.decode(torch.from_numpy(raw), values)
        if not math.isfinite(float(values.sum())) and not values.isfinite().all():
            bad = int(ids[int((~torch.isfinite(values).all(1)).nonzero()[0])])
            raise PackError(f"{table.files[0].path} holds NaN or infinity in row {bad}; the pack is damaged")
        yield raw, values.numpy()
        count(len(ids))


def finish(source: Path, memory: Stored | StemConfig, partial: Path, wanted: str) -> None:
    """Everything but the tables; the configuration says the new row type."""
    config = memory if isinstance(memory, StemConfig) else memory.config
    if isinstance(memory, Stored):
        tensors = {
            f"layers.{layer}.{name}": tensor.contiguous()
            for layer in memory.config.layer_ids
            for name, tensor in memory.modules(layer).items()
        }
        save_file(tensors, partial / MODULES)
    if isinstance(memory, Stored) and memory.foreign:
        (partial / README).write_text(about(memory), encoding="utf-8")
    elif (source / README).is_file():
        shutil.copyfile(source / README, partial / README)
    write_config(partial, asdict(replace(config, row_type=wanted)))
    (partial / STAMP).unlink()


def about(memory: Stored) -> str:
    config = memory.config
    rows = sum(layout.rows for layout in memory.layouts.values())
    return f"""# The memory of {memory.folder.resolve().name}

Taken out of a {memory.family} folder: {rows:,} rows of {config.head_dim} values at layers
{", ".join(map(str, config.layer_ids))}, for a hidden size of {config.hidden_size} and {config.branches} residual
stream(s).

    engram-server serve --model MODEL --memory THIS_FOLDER
"""
