"""A taught memory as a pack: the source pack's files with new rows, modules and step count, in any row type.

Rows that the data did not address stay as the source has them; those of a pack never taught before are written zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from server.cache.row_table import Table
from server.cache.row_types import E4M3_MAX, Floats, row_type
from server.cache.table_writer import write_table
from server.memory.pack import MODULES, PackConfig, table_file
from server.training.engram import TaughtEngram
from server.training.memory import TaughtMemory
from server.training.rows import TrainedRows, decoded
from server.training.start import Opened

CHUNK = 1 << 16  # rows written at once


def write_taught(
    folder: Path, opened: Opened, memory: TaughtMemory, dtype: str, steps: int, about: dict[str, Any]
) -> None:
    """Fills an existing, empty folder. `dtype`: row type, "auto" for the source pack's. Raises TableError."""
    config = opened.config
    wanted = config.row_type if dtype == "auto" else dtype
    for layer, table in opened.tables.items():
        rows = memory.rows[layer]
        kind = row_type(wanted)
        if wanted == "float8_e4m3":
            largest = max(
                (float(np.abs(chunk).max(initial=0)) for chunk in chunks(table, rows, opened.fresh)), default=0
            )
            kind = row_type(wanted, largest / E4M3_MAX if largest else 1.0)
        write_table(folder / table_file(layer), chunks(table, rows, opened.fresh), table.rows, table.dim, kind)
    if isinstance(memory, TaughtEngram):
        tensors = {
            f"layers.{layer}.{name}": parameter.detach().cpu().contiguous()
            for layer, module in memory.modules.items()
            for name, parameter in module.named_parameters()
        }
        save_file(tensors, folder / MODULES)
    done = config.trained_steps + steps
    if isinstance(config, PackConfig):
        replace(config, row_type=wanted, trained_steps=done, extra={**config.extra, "training": about}).write(folder)
    else:
        replace(config, row_type=wanted, trained_steps=done).write(folder)


def chunks(table: Table, rows: TrainedRows, fresh: bool) -> Iterator[Floats]:
    """All rows of the table, in order, float32 [≤ CHUNK, D]."""
    taught = rows.values[: len(rows.taught)].detach().cpu().numpy()
    for start in range(0, table.rows, CHUNK):
        ids = np.arange(start, min(start + CHUNK, table.rows))
        values = np.zeros((len(ids), table.dim), np.float32) if fresh else decoded(table, ids).numpy()
        first, last = np.searchsorted(rows.taught, [start, start + len(ids)])
        values[rows.taught[first:last] - start] = taught[first:last]
        yield values
