"""`pack`: a pack's tables in another layout or row type; config, modules and README go along.

    OUT.partial/   grows table by table; a finished table is never written twice, whatever interrupts
    OUT            appears at the end, whole

A float8 table with one scale takes the scale that its largest value needs, found in a first pass over the rows.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial as bound
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from server.cache.row_table import RowTable
from server.cache.row_types import E4M3_MAX, Floats, RowType, row_type
from server.cache.table_writer import WriteLayout, write_table
from server.errors import PackError, SettingsError
from server.memory.attachment import fingerprint
from server.memory.pack import CONFIG, read_config, table_file, write_config

CHUNK_BYTES = 32 << 20  # of rows decoded at once
STAMP = "source.json"
LAYOUTS = ("packed", "apart")
Count = Callable[[int], None]


def pack(*, source: Path, out: Path, layout: str = "packed", dtype: str = "auto") -> Path:
    """Writes the pack to `out` and returns it. Raises PackError, TableError, or SettingsError for a wrong flag."""
    if layout not in LAYOUTS:
        raise SettingsError(f"--layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if out.exists():
        raise PackError(f"{out} is already there; choose another --out or remove it")
    config = read_config(source)
    tables = {layer: RowTable.open(source / table_file(layer)) for layer in config.layer_ids}
    wanted = config.row_type if dtype == "auto" else dtype
    row_type(wanted)
    partial = begin(source, out, {"layout": layout, "dtype": wanted, "from": fingerprint(source, config.layer_ids)})
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for layer, table in tables.items():
            path = partial / table_file(layer)
            passes = 2 if wanted == "float8_e4m3" else 1
            task = progress.add_task(f"layer {layer}: {table.rows:,} rows", total=passes * table.rows)
            if not path.exists():
                rewrite(table, path, wanted, cast(WriteLayout, layout), bound(progress.advance, task))
            table.close()
    finish(source, partial, wanted)
    partial.rename(out)
    return out


def begin(source: Path, out: Path, stamp: dict[str, str]) -> Path:
    """The folder that grows. What an earlier run left there counts if it came from the same, with the same flags."""
    partial = out.with_name(f"{out.name}.partial")
    text = json.dumps(stamp)
    stamped = partial / STAMP
    if partial.exists() and (not stamped.is_file() or stamped.read_text(encoding="utf-8") != text):
        raise PackError(f"{partial} is left from another run: remove it, or finish that run with its own flags")
    partial.mkdir(parents=True, exist_ok=True)
    stamped.write_text(text, encoding="utf-8")
    return partial


def rewrite(table: RowTable, path: Path, wanted: str, layout: WriteLayout, count: Count) -> None:
    kind: RowType = row_type(wanted)
    if wanted == "float8_e4m3":
        largest = max((float(np.abs(chunk).max(initial=0)) for chunk in chunks(table, count)), default=0.0)
        kind = row_type(wanted, largest / E4M3_MAX if largest else 1.0)
    write_table(path, chunks(table, count), table.rows, table.dim, kind, layout=layout)


def chunks(table: RowTable, count: Count) -> Iterator[Floats]:
    """All rows in order, as float32. Raises TableError for values that are not finite."""
    size = max(1, CHUNK_BYTES // (4 * table.dim))
    for start in range(0, table.rows, size):
        ids = np.arange(start, min(start + size, table.rows))
        raw = np.empty((len(ids), table.row_bytes), np.uint8)
        table.gather(ids, raw)
        values = torch.empty(len(ids), table.dim)
        table.row_type.decode(torch.from_numpy(raw), values)
        if not math.isfinite(float(values.sum())):
            bad = int(ids[int((~torch.isfinite(values).all(1)).nonzero()[0])])
            raise PackError(f"{table.files[0].path} holds NaN or infinity in row {bad}; the pack is damaged")
        yield values.numpy()
        count(len(ids))


def finish(source: Path, partial: Path, wanted: str) -> None:
    """Everything but the tables; the configuration says the new row type."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith("table-") and file.name != CONFIG:
            shutil.copyfile(file, partial / file.name)
    content = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    write_config(partial, {**content, "row_type": wanted})
    (partial / STAMP).unlink()
