"""`inspect`: what a memory pack is, from its config and its tables' headers alone; no row is read."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.cache.row_table import RowTable
from server.errors import PackError
from server.memory.addressing import from_config
from server.memory.pack import MODULES, PackConfig, table_file


def summary(path: Path) -> dict[str, Any]:
    """Family, layers, orders, heads, rows, bytes, row type, where each table lies, and the checks that passed.

    Raises PackError or TableError for what does not hold together.
    """
    config = PackConfig.read(path)
    addresser = from_config(config.addressing() | {"pad_id": 0})  # no tokenizer here: only row counts are wanted
    tables = []
    for layer in config.layer_ids:
        table = RowTable.open(path / table_file(layer), name=f"layer {layer}")
        expected = addresser.rows_per_table[layer]
        if table.rows != expected:
            raise PackError(f"{path / table_file(layer)} holds {table.rows} rows; the primes add up to {expected}")
        file, row_type = str(table.files[0].path), table.row_type.name
        tables.append({"layer": layer, "file": file, "rows": table.rows, "bytes": table.nbytes, "row_type": row_type})
        table.close()
    if not (path / MODULES).is_file():
        raise PackError(f"{path} has no {MODULES}")
    return {
        "path": str(path),
        "family": config.kind,
        "format_version": config.format_version,
        "layers": list(config.layer_ids),
        "orders": list(range(2, config.max_ngram_size + 1)),
        "heads": config.n_head_per_ngram,
        "head_dim": config.head_dim,
        "rows": sum(table["rows"] for table in tables),
        "bytes": sum(table["bytes"] for table in tables),
        "rows_per_token": addresser.columns * len(tables),
        "trained_steps": config.trained_steps,
        "backbone": config.backbone,
        "vocab_size": config.vocab_size,
        "compressed_vocab_size": config.compressed_vocab_size,
        "compression_sha256": config.compression_sha256,
        "tables": tables,
        "checks": ["headers", "row counts equal the primes' sums", "constants follow from the seed"],
    }


def inspect(*, path: Path, json: bool = False) -> dict[str, Any]:
    """Prints the summary, as a table or as JSON, and returns it."""
    found = summary(path)
    console = Console()
    if json:
        console.print_json(json_module.dumps(found))
        return found
    made = Table(title=f"memory pack {path}", show_header=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for key, value in found.items():
        if key != "tables":
            made.add_row(key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    for table in found["tables"]:
        size = f"{table['rows']:,} rows, {table['bytes']:,} bytes, {table['row_type']}"
        made.add_row(f"table {table['layer']}", f"{size}, {table['file']}")
    console.print(made)
    return found
