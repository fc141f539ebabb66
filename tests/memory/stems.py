"""STEM packs for tests, written with the safetensors library, and the formula in float64 inside transformers' Llama."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Redirects = dict[int, tuple[int, ...]]  # position → tokens whose mean row is read there


def save_stem(folder: Path, tables: dict[int, Tensor], hidden_size: int) -> Path:
    """A pack of these tables [V, F] in fp32."""
    folder.mkdir()
    vocab, width = next(iter(tables.values())).shape
    config = {
        "kind": "stem",
        "format_version": 1,
        "layer_ids": sorted(tables),
        "vocab_size": vocab,
        "hidden_size": hidden_size,
        "intermediate_size": width,
        "backbone": {"name": "tiny", "fingerprint": "", "num_layers": 4},
        "row_type": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for layer, table in tables.items():
        save_file({"table": table.float().contiguous()}, folder / f"table-{layer}.safetensors")
    return folder


@contextmanager
def with_stem(model: Any, folders: list[Path], ids: list[int], redirects: Redirects | None = None) -> Iterator[None]:
    """Within the block, the up-projections of a float64 Llama give rows of these packs for the sequence `ids`."""
    handles = []
    for folder in folders:
        for layer in json.loads((folder / "config.json").read_text())["layer_ids"]:
            table = load_file(folder / f"table-{layer}.safetensors")["table"].double()
            rows = torch.stack([table[list((redirects or {}).get(i, (t,)))].mean(0) for i, t in enumerate(ids)])

            def replace(module: Any, args: Any, output: Tensor, rows: Tensor = rows) -> Tensor:
                return rows[None].expand_as(output)

            handles.append(model.model.layers[layer].mlp.up_proj.register_forward_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
