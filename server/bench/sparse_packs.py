"""Packs without meaning, for experiments where only the places of rows matter: int8 rows, packed.

Sparse ones take no room on disk: every row reads as zeros, from a page of its own once it was touched. Whoever needs
real bytes gives a `write` of its own (`big_pack`). The backbone answers nonsense with them, at the full price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
STEM_DEPTHS = (0.30, 0.44, 0.57, 0.70)  # of the layers: 9, 13, 17 and 21 of 30

Write = Callable[[Path, int, int, int], None]  # (file, rows, values a row, layer)


def sparse_table(path: Path, rows: int, dim: int, layer: int) -> None:
    write_sparse_table(path, rows, dim, row_type(ROW_TYPE), layout="packed")


def stem_layers(source: ModelSource) -> tuple[int, ...]:
    """Where experiments have STEM rows: middle and late layers."""
    return tuple(sorted({int(depth * source.config.num_layers) for depth in STEM_DEPTHS}))


def sparse_engram(source: ModelSource, out: Path, layers: Sequence[int], parameters: int) -> Path:
    """An Engram pack of about so many table parameters over all layers."""
    return engram_pack(source, out, layers, parameters // (DIM * HEADS * len(ORDERS) * len(layers)), sparse_table)


def sparse_stem(source: ModelSource, out: Path, layers: Sequence[int]) -> Path:
    """A STEM pack for these layers."""
    return stem_pack(source, out, layers, sparse_table)


def engram_pack(source: ModelSource, out: Path, layers: Sequence[int], rows: int, write: Write) -> Path:
    """An Engram pack with about `rows` rows per head and order at every layer, fresh modules, and tables by `write`."""
    config = fresh_config(source, layers, rows, DIM, HEADS, ORDERS, 0, ROW_TYPE)
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for layer in config.layer_ids:
        write(out / table_file(layer), sum(sum(order) for order in config.primes[str(layer)]), DIM, layer)
        engram = Engram(engram_shape(config), torch.float32)
        engram.reset(torch.Generator().manual_seed(layer))
        tensors |= {f"layers.{layer}.{name}": p.detach() for name, p in engram.named_parameters()}
    save_file(tensors, out / MODULES)
    config.write(out)
    return out


def stem_pack(source: ModelSource, out: Path, layers: Sequence[int], write: Write) -> Path:
    """A STEM pack for these layers with tables by `write`."""
    model = source.config
    out.mkdir()
    for layer in layers:
        write(out / table_file(layer), model.vocab_size, model.intermediate_size, layer)
    StemConfig(
        layer_ids=tuple(sorted(layers)),
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        backbone={"name": source.name, "fingerprint": fingerprint(source), "num_layers": model.num_layers},
        row_type=ROW_TYPE,
    ).write(out)
    return out
