"""`attach`: makes a fresh Engram pack for a backbone. It changes nothing until it is taught, and can be taught at once.

Rows are random (σ 0.02), the value projection and the convolution zero: the memory reads rows for every token and
adds exactly nothing. The folder appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from server.cache.row_types import Floats, row_type
from server.cache.table_writer import random_rows, write_table
from server.commands.folders import new_folder
from server.errors import PackError
from server.memory.addressing import from_config
from server.memory.compression import compression_map, map_sha256
from server.memory.engram import Engram
from server.memory.pack import MODULES, PackConfig, engram_shape, table_file
from server.models.source import ModelSource, open_source
from server.models.weights import fingerprint
from server.settings import DEFAULT_MODEL

ROW_SIGMA = 0.02


def attach(
    *,
    model: str = DEFAULT_MODEL,
    out: Path,
    layers: Sequence[int] = (1, 15),
    rows: int = 20_000,
    dim: int = 64,
    heads: int = 8,
    orders: Sequence[int] = (2, 3),
    seed: int = 0,
    dtype: str = "bfloat16",
) -> Path:
    """Writes the pack to `out` and returns it. `rows`: base rows per head and order. Raises PackError, ModelError."""
    check(layers, rows, dim, heads, orders, out)
    source = open_source(model)
    config = fresh_config(source, layers, rows, dim, heads, orders, seed, dtype)
    with new_folder(out) as folder:
        write_pack(folder, config)
    return out


def check(layers: Sequence[int], rows: int, dim: int, heads: int, orders: Sequence[int], out: Path) -> None:
    """Refuses what no pack can be. Raises PackError naming the flag."""
    for flag, value in (("--rows", rows), ("--dim", dim), ("--heads", heads)):
        if value < 1:
            raise PackError(f"{flag} is {value}; it must be at least 1")
    if list(orders) != list(range(2, len(orders) + 2)):
        raise PackError(f"--orders is {','.join(map(str, orders))}; write 2 up to the longest, such as 2,3")
    if not layers or len(set(layers)) != len(layers):
        raise PackError(f"--layers is {','.join(map(str, layers))}; name each layer once")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PackError(f"{out} is already there; choose another --out or remove it")


def fresh_config(
    source: ModelSource,
    layers: Sequence[int],
    rows: int,
    dim: int,
    heads: int,
    orders: Sequence[int],
    seed: int,
    dtype: str,
) -> PackConfig:
    """Constants for this tokenizer and these sizes, computed once and stored."""
    model, mapping = source.config, compression_map(source.tokenizer.backend)
    pad_id = model.eos_token_ids[0] if model.eos_token_ids else 0
    addressing = {
        "layer_ids": sorted(layers),
        "max_ngram_size": max(orders),
        "n_head_per_ngram": heads,
        "engram_vocab_size": [rows] * len(orders),
        "pad_id": pad_id,
        "seed": seed,
    }
    addresser = from_config(addressing, tokenizer=source.tokenizer.backend)
    config = PackConfig(
        layer_ids=tuple(sorted(layers)),
        max_ngram_size=max(orders),
        n_head_per_ngram=heads,
        engram_vocab_size=(rows,) * len(orders),
        head_dim=dim,
        pad_id=pad_id,
        seed=seed,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        compressed_vocab_size=int(mapping.max()) + 1,
        compression_sha256=map_sha256(mapping),
        multipliers={str(layer): list(map(int, m)) for layer, m in addresser.multipliers.items()},
        primes={str(layer): [list(map(int, order)) for order in p] for layer, p in addresser.primes.items()},
        backbone={"name": source.name, "fingerprint": fingerprint(source), "num_layers": model.num_layers},
        row_type=dtype,
        norm_eps=model.rms_norm_eps,
    )
    config.check_backbone(hidden_size=model.hidden_size, num_layers=model.num_layers, vocab_size=model.vocab_size)
    return config


def write_pack(folder: Path, config: PackConfig) -> None:
    """All files of a fresh pack, into an existing folder."""
    generator = torch.Generator().manual_seed(config.seed)
    tensors: dict[str, torch.Tensor] = {}
    stored = row_type(config.row_type)
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        for layer in config.layer_ids:
            engram = Engram(engram_shape(config), torch.float32)
            engram.reset(generator)
            tensors |= {f"layers.{layer}.{name}": p.detach() for name, p in engram.named_parameters()}
            rows = sum(sum(order) for order in config.primes[str(layer)])
            chunks = random_rows(rows, config.head_dim, seed=config.seed + layer, sigma=ROW_SIGMA)
            task = f"layer {layer}: {rows:,} rows"
            write_table(folder / table_file(layer), track(progress, chunks, rows, task), rows, config.head_dim, stored)
    save_file(tensors, folder / MODULES)
    config.write(folder)
    (folder / "README.md").write_text(readme(config), encoding="utf-8")


def track(progress: Progress, chunks: Iterable[Floats], rows: int, what: str) -> Iterable[Floats]:
    task = progress.add_task(what, total=rows)
    for chunk in chunks:
        yield chunk
        progress.advance(task, len(chunk))


def readme(config: PackConfig) -> str:
    rows = sum(sum(sum(order) for order in layer) for layer in config.primes.values())
    return f"""# An Engram memory for {config.backbone["name"]}

{rows:,} rows of {config.head_dim} values ({config.row_type}) at layers {", ".join(map(str, config.layer_ids))},
n-grams of 2 to {config.max_ngram_size} tokens, {config.n_head_per_ngram} heads each.
Trained steps: {config.trained_steps}. A pack that was not trained yet changes nothing.

    engram-server serve --model {config.backbone["name"]} --memory THIS_FOLDER
"""
