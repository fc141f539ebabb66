"""Packs of any size that take no room on disk: for experiments where only the places of rows matter, not their values.

Every row reads as zeros, from a page of its own once it was touched. The Engram pack adds nothing to a layer, at the
full price; the STEM pack makes nonsense of the model, at the full price.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from server.cache.row_types import row_type
from server.cache.table_writer import write_sparse_table
from server.commands.attach import fresh_config
from server.memory.engram import Engram
from server.memory.pack import MODULES, StemConfig, engram_shape, table_file
from server.models.source import ModelSource
from server.models.weights import fingerprint

ROW_TYPE = "int8"
HEADS, DIM, ORDERS = 8, 64, (2, 3)


def sparse_engram(source: ModelSource, out: Path, layers: Sequence[int], parameters: int) -> Path:
    """An Engram pack of about so many table parameters over all layers."""
    rows = parameters // (DIM * HEADS * len(ORDERS) * len(layers))
    config = fresh_config(source, layers, rows, DIM, HEADS, ORDERS, 0, ROW_TYPE)
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for layer in config.layer_ids:
        total = sum(sum(order) for order in config.primes[str(layer)])
        write_sparse_table(out / table_file(layer), total, DIM, row_type(ROW_TYPE), layout="packed")
        engram = Engram(engram_shape(config), torch.float32)
        engram.reset(torch.Generator().manual_seed(layer))
        tensors |= {f"layers.{layer}.{name}": p.detach() for name, p in engram.named_parameters()}
    save_file(tensors, out / MODULES)
    config.write(out)
    return out


def sparse_stem(source: ModelSource, out: Path, layers: Sequence[int]) -> Path:
    """A STEM pack for these layers."""
    model = source.config
    out.mkdir()
    for layer in layers:
        path = out / table_file(layer)
        write_sparse_table(path, model.vocab_size, model.intermediate_size, row_type(ROW_TYPE), layout="packed")
    StemConfig(
        layer_ids=tuple(sorted(layers)),
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        backbone={"name": source.name, "fingerprint": fingerprint(source), "num_layers": model.num_layers},
        row_type=ROW_TYPE,
    ).write(out)
    return out
