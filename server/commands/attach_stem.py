"""`attach --stem`: STEM rows for a model of today, from what its up-projections give on a text.

    U_l[t] = W_u x̂_t        x̂_t = (n_t · x̄_t + k · p(E[t])) / (n_t + k)

x̄_t is the mean of the feed-forward inputs x over the n_t occurrences of token t; p a linear map from token embeddings
E to x̄, fitted to the tokens that occur (ridge regression, weight n / (n + k)). A token that never occurs gets p(E[t]),
and a rare one a blend. Since W_u is linear, means of x do for means of W_u x, and take an F / H-th of the memory.
Measured against two simpler rules: docs/stem.md. Shapes: V tokens, H hidden width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from server.cache.row_types import Floats, row_type
from server.cache.table_writer import write_table
from server.commands.fit_stem import Fitting
from server.commands.folders import new_folder
from server.commands.stem_text import Reader, Split, Tables
from server.errors import PackError
from server.memory.pack import StemConfig, table_file
from server.models.config import ModelConfig
from server.models.decoder import Block, Decoder
from server.models.source import ModelSource, open_source
from server.models.weights import EMBEDDING, fingerprint, tensors
from server.runtime.load import load
from server.settings import DEFAULT_MODEL, Settings

CHUNK = 4096  # rows computed at once
PRIOR = 1.0  # k: how many occurrences the prediction from the embedding counts for
RIDGE = 1e-2  # of the mean squared embedding value


@dataclass(slots=True)
class Inputs:
    """What one text gave: counts[V], and per layer the sum over occurrences of the feed-forward input: [V, H] fp32."""

    counts: Tensor
    sums: dict[int, Tensor]

    @classmethod
    def empty(cls, config: ModelConfig, layers: Iterable[int]) -> Inputs:
        size = (config.vocab_size, config.hidden_size)
        return cls(torch.zeros(config.vocab_size), {layer: torch.zeros(size) for layer in layers})


def attach_stem(
    *,
    model: str = DEFAULT_MODEL,
    out: Path,
    layers: Sequence[int],
    calibrate: Path,
    dtype: str = "bfloat16",
    fit: float = 0.0,
) -> Path:
    """Writes the pack to `out` and returns it. `fit`: minutes of fitting after the calibration.

    Raises PackError, ModelError.
    """
    stored = row_type(dtype)
    source = open_source(model)
    check_layers(source, layers)
    layers = sorted(layers)
    with new_folder(out) as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        ids = source.tokenizer.encode(read_text(calibrate))
        reader = Reader(
            load(Settings(model=model, max_num_seqs=1, prefix_cache="off", cpu_kernels="off")), Settings().block_size
        )
        split = Split.of(ids, reader.piece, held_out=bool(fit))
        seen = inputs_of(reader, layers, split.fit, progress)
        embedding, ups = weights_of(source, layers)
        rows = {layer: partial(rows_of, seen, layer, embedding, *ups[layer]) for layer in layers}
        config = stem_config(source, layers, dtype, calibrate, seen)
        fitting = Fitting(reader, split, fit, progress) if fit else None
        size = config.vocab_size, config.intermediate_size
        with nullcontext() if fitting is None else fitting.begun(rows):
            for layer, chunks in rows.items():
                task = progress.add_task(f"layer {layer}: rows", total=config.vocab_size)
                made = chunks() if fitting is None else fitting.fitted(layer, chunks, down_of(source, layer))
                write_table(folder / table_file(layer), track(progress, task, made), *size, stored)
        if fitting is not None:
            said = fitting.said()
            config = replace(config, calibration={**config.calibration, "fit": said}, trained_steps=said["steps"])
        config.write(folder)
        (folder / "README.md").write_text(readme(config), encoding="utf-8")
    if fitting is not None:
        Console().print(report(config.calibration["fit"]))
    return out


def report(said: dict[str, Any]) -> Table:
    """What fitting came to."""
    made = Table(title=f"perplexity over {said['tokens']:,} tokens of the text held out")
    for name in ("rows", "perplexity", "over dense"):
        made.add_column(name, justify="right")
    told = said["perplexity"]
    for name, value in told.items():
        made.add_row(name, f"{value:.2f}", f"{value / told['dense'] - 1:+.1%}")
    return made


def check_layers(source: ModelSource, layers: Sequence[int]) -> None:
    count = source.config.num_layers
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise PackError(f"--stem is {','.join(map(str, layers))}; name layers of 0..{count - 1}, each once")


def read_text(path: Path) -> str:
    """Raises PackError for a file that is no text, or an empty one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(f"--calibrate {path} is no readable UTF-8 text: {error}") from None
    if not text.strip():
        raise PackError(f"--calibrate {path} is empty; give a text of the kind that the model will read")
    return text


def inputs_of(reader: Reader, layers: Sequence[int], pieces: Sequence[Sequence[int]], progress: Progress) -> Inputs:
    """Reads the text with the whole model, piece by piece, and sums what these layers were fed."""
    found = Inputs.empty(reader.loaded.source.config, layers)
    count = sum(map(len, pieces))
    with torch.inference_mode(), watched(reader.loaded.model, found):
        for piece in progress.track(pieces, description=f"reading {count:,} tokens"):
            reader.read(piece, Tables({}))
    return found


@contextmanager
def watched(model: Decoder, found: Inputs) -> Iterator[None]:
    """Within the block, every token that `model` computes adds its feed-forward inputs to `found`."""
    now: list[Tensor] = []

    def begin(module: Any, arguments: tuple[Any, ...]) -> None:
        now[:] = [arguments[0].token_ids.cpu()]
        found.counts += torch.bincount(now[0], minlength=len(found.counts))

    def keep(sums: Tensor) -> Callable[[Any, Any, Tensor], None]:
        def add(module: Any, arguments: Any, x: Tensor) -> None:
            sums.index_add_(0, now[0], x.float().cpu())

        return add

    handles: list[RemovableHandle] = [model.register_forward_pre_hook(begin)]
    for layer, sums in found.sums.items():
        block = model.blocks[layer]
        assert isinstance(block, Block)
        handles.append(block.mlp_norm.register_forward_hook(keep(sums)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights_of(source: ModelSource, layers: Sequence[int]) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor | None]]]:
    """The embedding [V, H], and each layer's up-projection [F, H] and its bias."""
    wanted = {EMBEDDING} | {
        f"model.layers.{layer}.mlp.up_proj.{kind}" for layer in layers for kind in ("weight", "bias")
    }
    found = {name: tensor.clone() for name, tensor in tensors(source, torch.float32) if name in wanted}
    path = "model.layers.{}.mlp.up_proj.{}"
    ups = {layer: (found[path.format(layer, "weight")], found.get(path.format(layer, "bias"))) for layer in layers}
    return found[EMBEDDING], ups


def down_of(source: ModelSource, layer: int) -> Tensor:
    """The layer's down-projection [H, F] in fp32."""
    wanted = f"model.layers.{layer}.mlp.down_proj.weight"
    return next(tensor.clone() for name, tensor in tensors(source, torch.float32) if name == wanted)


def predictor(seen: Inputs, layer: int, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map p from embeddings to mean inputs: weight [H, H] and offset [H]. x = e · weight + offset."""
    occur = seen.counts > 0
    counts, known = seen.counts[occur].double(), embedding[occur].double()
    means = seen.sums[layer][occur].double() / counts[:, None]
    share = (counts / (counts + PRIOR))[:, None]
    share = share / share.sum()
    center, middle = (share * known).sum(0), (share * means).sum(0)
    known, means = known - center, means - middle
    gram = known.T @ (share * known)
    gram += torch.eye(len(gram)) * gram.diagonal().mean() * RIDGE
    weight = torch.linalg.solve(gram, known.T @ (share * means))
    return weight.float(), (middle - center @ weight).float()


@torch.no_grad()
def rows_of(seen: Inputs, layer: int, embedding: Tensor, up: Tensor, bias: Tensor | None) -> Iterator[Floats]:
    """U_l in chunks of float32 [≤ CHUNK, F]."""
    weight, offset = predictor(seen, layer, embedding)
    for start in range(0, len(embedding), CHUNK):
        part = slice(start, start + CHUNK)
        expected = embedding[part] @ weight + offset
        x = (seen.sums[layer][part] + PRIOR * expected) / (seen.counts[part, None] + PRIOR)
        yield torch.nn.functional.linear(x, up, bias).numpy()


def track(progress: Progress, task: Any, chunks: Iterable[Floats]) -> Iterator[Floats]:
    for chunk in chunks:
        yield chunk
        progress.advance(task, len(chunk))


def stem_config(source: ModelSource, layers: Sequence[int], dtype: str, text: Path, seen: Inputs) -> StemConfig:
    model = source.config
    return StemConfig(
        layer_ids=tuple(layers),
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        backbone={"name": source.name, "fingerprint": fingerprint(source), "num_layers": model.num_layers},
        row_type=dtype,
        calibration={
            "text": text.name,
            "tokens": int(seen.counts.sum()),
            "distinct": int((seen.counts > 0).sum()),
            "unseen": "predicted from the token's embedding",
            "prior": PRIOR,
        },
    )


def readme(config: StemConfig) -> str:
    name = config.backbone["name"]
    return f"""# A STEM memory for {name}

{config.vocab_size:,} rows of {config.intermediate_size} values ({config.row_type}), one per token, at each of the
layers {", ".join(map(str, config.layer_ids))}. They replace the up-projections there. Made from
{config.calibration["tokens"]:,} tokens of {config.calibration["text"]}, {config.calibration["distinct"]:,} of them
distinct.

    engram-server serve --model {name} --memory THIS_FOLDER
"""
