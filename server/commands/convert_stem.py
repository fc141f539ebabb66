"""`convert-stem`: the tables of a STEM reference checkpoint as a pack.

    IN/params.json                            model: stem_layers, dim, n_layers, vocab_size
    IN/stem_shards/stem_model_mp<rank>.pt     stem_embeddings.<i>.weight [V, F / shards], i the place in stem_layers

Shards are columns and go side by side in the order of their ranks, numerically. Pickles are read with
`weights_only=True`: tensors and nothing that could run. Source: the repository released with arXiv 2601.10639.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from server.cache.row_types import Floats, row_type
from server.cache.table_writer import write_table
from server.commands.folders import new_folder
from server.errors import PackError
from server.json_text import parsed
from server.memory.pack import StemConfig, is_whole, table_file

SHARDS = "stem_shards"
SHARD = re.compile(r"stem_model_mp(\d+)\.pt$")
TENSOR = re.compile(r"(?:.*\.)?stem_embeddings\.(\d{1,9})\.weight$")
CHUNK = 4096  # rows put together at once


def convert_stem(*, source: Path, out: Path, dtype: str = "bfloat16") -> Path:
    """Writes the pack to `out` and returns it. Raises PackError with both values of what does not agree."""
    stored, params = row_type(dtype), read_params(source)
    shards = [read_shard(path) for path in shard_files(source)]
    layers = params["stem_layers"] or range(1, params["n_layers"])  # the reference's default: all but the first
    check(source, shards, layers)
    vocab = len(shards[0][0])
    width = sum(shard[0].shape[1] for shard in shards)
    config = StemConfig(
        layer_ids=tuple(layers),
        vocab_size=vocab,
        hidden_size=params["dim"],
        intermediate_size=width,
        backbone={"name": source.resolve().name, "fingerprint": "", "num_layers": params["n_layers"]},
        row_type=dtype,
    )
    with new_folder(out) as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        for index, layer in progress.track(list(enumerate(layers)), description="tables"):
            rows = side_by_side([shard[index] for shard in shards])
            write_table(folder / table_file(layer), rows, vocab, width, stored)
        config.write(folder)
    return out


def read_params(folder: Path) -> dict[str, Any]:
    """params.json's model section. Raises PackError if it is not there or lacks a field."""
    path = folder / "params.json"
    try:
        content = parsed(path.read_text(encoding="utf-8"))
        model = content.get("model", content)
        found = {"stem_layers": model.get("stem_layers"), "dim": model["dim"], "n_layers": model["n_layers"]}
        if not all(map(is_whole, [*(found["stem_layers"] or ()), found["dim"], found["n_layers"]])):
            raise ValueError(found)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PackError(
            f"{path} is no readable JSON with dim and n_layers; {folder} needs a STEM checkpoint's"
        ) from None


def shard_files(folder: Path) -> list[Path]:
    """In the order of their ranks. Raises PackError if there are none, or one is missing."""
    found = {int(match[1]): path for path in (folder / SHARDS).glob("*.pt") if (match := SHARD.fullmatch(path.name))}
    if sorted(found) != list(range(len(found))) or not found:
        raise PackError(f"{folder / SHARDS} has shards of the ranks {sorted(found)}; it needs 0 and all up to the last")
    return [found[rank] for rank in range(len(found))]


def read_shard(path: Path) -> list[Tensor]:
    """One table part per STEM layer, in order, mapped from the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle fails in whatever way the unpickler meets it
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise PackError(f"{path} is no file of tensors: {said}") from None
    content = content.get("model", content) if isinstance(content, dict) else {}
    named = content.items() if isinstance(content, dict) else ()
    parts = {int(match[1]): part for name, part in named if (match := TENSOR.match(str(name)))}
    if not all(isinstance(part, Tensor) and part.layout == torch.strided for part in parts.values()):
        raise PackError(f"{path} has stem_embeddings that are no dense tensors")
    if sorted(parts) != list(range(len(parts))):
        raise PackError(f"{path} has stem_embeddings {sorted(parts)}; it needs 0 and all up to the last")
    return [parts[index] for index in range(len(parts))]


def check(source: Path, shards: Sequence[Sequence[Tensor]], layers: Sequence[int]) -> None:
    for rank, shard in enumerate(shards):
        if len(shard) != len(layers):
            raise PackError(f"rank {rank} of {source} has {len(shard)} tables; params.json names {len(layers)} layers")
        for index, part in enumerate(shard):
            if part.dim() != 2 or len(part) != len(shards[0][0]):
                raise PackError(
                    f"stem_embeddings.{index} of rank {rank} has shape {list(part.shape)}; rank 0's first has "
                    f"{list(shards[0][0].shape)}, and the rows must agree"
                )


def side_by_side(parts: Sequence[Tensor]) -> Iterator[Floats]:
    for start in range(0, len(parts[0]), CHUNK):
        yield torch.cat([part[start : start + CHUNK].float() for part in parts], dim=1).numpy()
