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
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from server.cache.layouts import SHARD, Header, Layout, find_layout, read_header
from server.cache.row_table import RowTable
from server.commands.pack import chunks
from server.errors import PackError, TableError
from server.memory.addressing import Addresser, from_config
from server.memory.pack import CONFIG, MODULES, PackConfig, read_config, table_file

# name, the field that tells it, and how its tables are called
FAMILIES = (
    ("engram-peft", "engram_vocab_size_per_ngram", r"(?:^|\.){layer}\.multi_head_embedding\.embedding\.weight$"),
    ("deepseek-v4.1", "engram_layer_ids", r"(?:^|\.)layers\.{layer}\.engram\.embed\.weight$"),
    (
        "qwen-ple",
        "ple_layer_ids",
        r"(?:^|\.)layers\.{layer}\.ple\.ple_embedding\.ngram_embedding(?:\.shard_\d+)?\.weight$",
    ),
)
# Row counts need neither the compression nor the pad, which need a tokenizer.
WITHOUT_TOKENIZER = {"pad_id": 0, "engram_pad_token_id": 0}


def summary(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Family, layers, orders, heads, rows, bytes, row type, where each table lies, and the checks that passed.

    `verify` reads every row besides. Raises PackError or TableError for what does not hold together.
    """
    content = read_content(path)
    if "format_version" in content:
        found, addresser, layouts = pack_summary(path)
    else:
        found, addresser, layouts = checkpoint_summary(path, content)
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
        **found,
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


def read_content(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        content = json_module.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise PackError(f"{path} is no memory pack: it has no readable {CONFIG}") from None
    except ValueError as error:
        raise PackError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise PackError(f"{file} holds a {type(content).__name__}; a config is needed")
    inner = content.get("text_config")
    return {**content, **inner} if isinstance(inner, dict) else content


def pack_summary(path: Path) -> tuple[dict[str, Any], Addresser, dict[int, Layout]]:
    config = read_config(path)
    addresser = from_config(config.addressing() | {"pad_id": 0})
    layouts = {}
    for layer in config.layer_ids:
        layouts[layer] = find_layout([read_header(path / table_file(layer))], "table")
    if isinstance(config, PackConfig) and not (path / MODULES).is_file():
        raise PackError(f"{path} has no {MODULES}")
    about = ("vocab_size", "compressed_vocab_size", "compression_sha256", "calibration", "backbone", "trained_steps")
    found = {"family": config.kind, "format_version": config.format_version}
    return found | {n: getattr(config, n) for n in about if hasattr(config, n)}, addresser, layouts


def checkpoint_summary(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any], Addresser, dict[int, Layout]]:
    known = [(family, pattern) for family, field, pattern in FAMILIES if content.get(field) is not None]
    if not known:
        fields = ", ".join(field for _, field, _ in FAMILIES)
        raise PackError(f"{path / CONFIG} has no format_version, so it is no pack's, and none of {fields}")
    family, pattern = known[0]
    addresser = from_config({"compressed_vocab_size": 1, **content, **WITHOUT_TOKENIZER})
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise TableError(f"{path} holds no .safetensors file")
    headers = [read_header(file) for file in files]
    layouts = {layer: layout_of(headers, pattern, layer, path) for layer in addresser.layer_ids}
    found = {"family": family, "vocab_size": content.get("vocab_size"), "compressed_vocab_size": None}
    if family == "deepseek-v4.1":
        found["compressed_vocab_size"] = content.get("engram_compressed_vocab_size")
    return {name: value for name, value in found.items() if value is not None}, addresser, layouts


def layout_of(headers: list[Header], pattern: str, layer: int, path: Path) -> Layout:
    wanted = re.compile(pattern.replace("{layer}", str(layer)))
    names = [name for header in headers for name in header.tensors if wanted.search(name)]
    if not names:
        raise TableError(f"{path} holds no table of layer {layer}: no tensor is called {wanted.pattern}")
    return find_layout(headers, SHARD.sub("", names[0]))


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
