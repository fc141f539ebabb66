"""`inspect`: what a pack, an adapter or a checkpoint folder holds, from its config and its files' headers alone.

    family          known by                       table of layer l
    pack            format_version                 table-<l>.safetensors: table
    engram-peft     engram_vocab_size_per_ngram    <l>.multi_head_embedding.embedding.weight
    deepseek-v4.1   engram_layer_ids               … layers.<l>.engram.embed.weight, .scale beside it
    qwen-ple        ple_layer_ids                  … layers.<l>.ple.ple_embedding.ngram_embedding[.shard_<i>].weight

No row is read, so that the time does not depend on the tables' size; `verify` reads all of them.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from server.cache.layouts import Layout, find_layout, read_header
from server.cache.row_table import RowTable
from server.commands.pack import chunks
from server.errors import PackError
from server.memory.attached import read_memory
from server.memory.pack import PackConfig, StemConfig, table_file
from server.memory.stored import Stored, counting


def summary(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Family, layers, orders, heads, rows, bytes, row type, where each table lies, and the checks that passed.

    `verify` reads every row besides. Raises PackError or TableError for what does not hold together.
    """
    memory = read_memory(path)
    layouts: Mapping[int, Layout]
    config: PackConfig | StemConfig
    if isinstance(memory, StemConfig):
        family, config, layouts = "stem", memory, stem_layouts(path, memory)
    else:
        family, config, layouts = memory.family, memory.config, memory.layouts
    addresser = counting(config.addressing())
    if isinstance(memory, Stored):
        memory.check_rule(addresser)
    checks = ["headers", f"row counts equal {'the vocabulary' if addresser.orders == (1,) else 'the primes'}"]
    for layer, layout in layouts.items():
        if layout.rows != addresser.rows_per_table[layer]:
            raise PackError(
                f"the table of layer {layer} in {layout.paths[0]} holds {layout.rows} rows; its config needs "
                f"{addresser.rows_per_table[layer]}"
            )
    if verify:
        for layer, layout in layouts.items():
            scan(layer, layout)
        checks.append("every value is finite")
    tables = [described(layer, layout) for layer, layout in layouts.items()]
    return {
        "path": str(path),
        "family": family,
        **about(config, own=isinstance(memory, StemConfig) or not memory.foreign),
        "layers": list(addresser.layer_ids),
        "orders": list(addresser.orders),
        "heads": addresser.heads,
        "head_dim": next(iter(layouts.values())).dim,
        "rows": sum(table["rows"] for table in tables),
        "bytes": sum(table["bytes"] for table in tables),
        "rows_per_token": addresser.columns * len(tables),
        "tables": tables,
        "checks": checks,
    }


def stem_layouts(path: Path, config: StemConfig) -> dict[int, Layout]:
    return {layer: find_layout([read_header(path / table_file(layer))], "table") for layer in config.layer_ids}


def about(config: PackConfig | StemConfig, *, own: bool) -> dict[str, Any]:
    """What the config says besides shapes; what it does not say is left out. `own`: it is a pack's."""
    names = ["vocab_size", "compressed_vocab_size", "compression_sha256", "calibration", "backbone"]
    said = {name: getattr(config, name, None) for name in (["format_version", *names] if own else names)}
    steps = {"trained_steps": config.trained_steps} if own else {}
    return {name: value for name, value in said.items() if value not in (None, "", {}, 0)} | steps


def described(layer: int, layout: Layout) -> dict[str, Any]:
    return {
        "layer": layer,
        "file": ", ".join(map(str, layout.paths)),
        "offset": layout.columns[0][0].offset,
        "layout": layout.kind,
        "rows": layout.rows,
        "bytes": layout.rows * layout.row_bytes,
        "row_type": layout.row_type.name,
    }


def scan(layer: int, layout: Layout) -> None:
    """Reads every row. Raises PackError for NaN and infinity, in values or scales."""
    table = RowTable(f"layer {layer}", layout, "mmap")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"layer {layer}: {table.rows:,} rows", total=table.rows)
        for _ in chunks(table, lambda rows: progress.advance(task, rows)):
            pass
    table.close()


def inspect(*, path: Path, json: bool = False, verify: bool = False) -> dict[str, Any]:
    """Prints the summary, as a table or as JSON, and returns it."""
    found = summary(path, verify=verify)
    console = Console()
    if json:
        console.print_json(json_module.dumps(found))
        return found
    made = Table(title=f"{found['family']} memory in {path}", show_header=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for key, value in found.items():
        if key != "tables":
            made.add_row(key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    for table in found["tables"]:
        size = f"{table['rows']:,} rows, {table['bytes']:,} bytes, {table['row_type']}, {table['layout']}"
        made.add_row(f"table {table['layer']}", f"{size}, {table['file']} at byte {table['offset']}")
    console.print(made)
    return found
