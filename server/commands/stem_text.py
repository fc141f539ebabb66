"""Reading a text with a model for STEM rows: what a layer sees of it, and how well the model foretells it.

    text ─ pieces ─▶ blocks … with tables in place of up-projections … ─▶ before a layer | its gate g and its u | …

The text stops before a layer, and goes on from there when the next layer is looked at. Shapes: N places, V tokens, H
hidden width, F feed-forward width. Knows batches and blocks; nothing of files, or of how rows are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from server.batch import Batch
from server.errors import PackError
from server.models.decoder import Block
from server.runtime.load import Loaded

PIECE = 1024  # tokens of context that the text is read in
KEPT_BYTES = 1 << 30  # of g and u at once; a longer text is fitted to its beginning
LEAST_TOKENS = 500
SCORED = 128  # places whose scores over the vocabulary are held at once


class Enough(Exception):
    """Raised within a forward pass when the layer that it was for is through."""


@dataclass(frozen=True, slots=True)
class Split:
    """The text's tokens in three. Of every ten pieces one chooses and one reports, so that all kinds of text do."""

    fit: list[list[int]]
    choose: list[list[int]]
    report: list[list[int]]

    @classmethod
    def of(cls, ids: Sequence[int], piece: int, *, held_out: bool) -> Split:
        """`held_out`: whether there are to be the last two. Raises PackError for a text too short for them."""
        if held_out and len(ids) < LEAST_TOKENS:
            raise PackError(
                f"the text has {len(ids)} tokens and --fit needs {LEAST_TOKENS}: a tenth of them chooses between rows, "
                "a tenth tells what came of it"
            )
        if held_out:
            piece = min(piece, len(ids) // 20)
        pieces = [list(ids[i : i + piece]) for i in range(0, len(ids), piece)]
        if not held_out:
            return cls(pieces, [], [])
        fit = [piece for i, piece in enumerate(pieces) if i % 10 < 8]
        return cls(fit, pieces[8::10], pieces[9::10])


class Tables:
    """What the model reads instead of up-projections: a `MemoryStep` over tables that lie in memory."""

    def __init__(self, rows: dict[int, Tensor]) -> None:
        self.rows, self.tokens = rows, torch.zeros(0, dtype=torch.int64)
        self.layers: frozenset[int] = frozenset()

    @property
    def up_layers(self) -> frozenset[int]:
        return frozenset(self.rows)

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def up(self, layer: int, dense: Tensor | None) -> Tensor:
        return F.embedding(self.tokens, self.rows[layer])


class Watch(Tables):
    """As `Tables` below `layer`; there it keeps the up-projection's values and lets the gate through alone."""

    def __init__(self, rows: dict[int, Tensor], layer: int) -> None:
        super().__init__(rows)
        self.layer = layer
        self.gate, self.dense, self.hidden = torch.zeros(0), torch.zeros(0), torch.zeros(0)

    @property
    def up_layers(self) -> frozenset[int]:
        return frozenset(self.rows) | {self.layer}

    def up(self, layer: int, dense: Tensor | None) -> Tensor:
        if layer != self.layer:
            return super().up(layer, dense)
        assert dense is not None
        self.dense = dense.clone()
        return torch.ones_like(dense)

    def arrive(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before the layer."""
        self.hidden = arguments[0].clone()

    def leave(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before the layer's down-projection, which has the gate's values now."""
        self.gate = arguments[0].clone()
        raise Enough


@dataclass(slots=True)
class State:
    """How far the pieces of a text have come: hidden[n, H] of each, before `layer`; nothing before layer 0."""

    layer: int = 0
    hidden: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Places:
    """tokens int64[N]; gate, dense [N, F] in the model's dtype."""

    tokens: Tensor
    gate: Tensor
    dense: Tensor

    def loss(self, rows: Tensor, down: Tensor, at: Tensor) -> Tensor:
        """rows[n, F] of the places `at`[n] → the mean squared error of the block's output, over them."""
        missing = self.gate[at].float() * (rows - self.dense[at].float())
        return F.linear(missing, down).pow(2).sum(-1).mean()


class Reader:
    """Reads pieces of text with a loaded model, one after another, each from its own beginning."""

    def __init__(self, loaded: Loaded, block_size: int) -> None:
        self.loaded, self.block_size = loaded, block_size
        self.piece = min(PIECE, loaded.max_len, (loaded.kv.blocks - 1) * block_size)

    def batch(self, ids: Sequence[int]) -> Batch:
        count = len(ids)
        blocks = np.arange(1, 1 + -(-count // self.block_size))[None]  # block 0 is padding
        where = self.loaded.device
        places = np.arange(count)
        return Batch(
            token_ids=torch.tensor(ids, device=where),
            positions=torch.from_numpy(places).to(where),
            slots=torch.from_numpy(places + self.block_size).to(where),
            block_table=torch.from_numpy(blocks).to(where),
            host_blocks=blocks,
            query_start=np.array([0, count]),
            context_len=np.array([count]),
            views=(),
            view_of=np.zeros(count, np.int64),
            windows=np.zeros((count, 1), np.int64),
            blocked=np.zeros((count, 1), bool),
            sample_at=torch.zeros(0, dtype=torch.int64, device=where),
            block_size=self.block_size,
        )

    def read(self, ids: Sequence[int], tables: Tables) -> Tensor:
        """The last hidden states [N, H]."""
        batch = self.batch(ids)
        tables.tokens = batch.token_ids
        hidden: Tensor = self.loaded.model(batch, self.loaded.attention, tables)
        return hidden

    @torch.inference_mode()
    def perplexity(self, pieces: Sequence[Sequence[int]], tables: Tables, progress: Progress, what: str) -> float:
        """Of every token but each piece's first."""
        total, count = 0.0, 0
        for ids in progress.track(pieces, description=f"perplexity, {what}"):
            hidden = self.read(ids, tables)
            for first in range(0, len(ids) - 1, SCORED):
                wanted = torch.tensor(ids[first + 1 : first + 1 + SCORED], device=hidden.device)
                scores = self.loaded.model.logits(hidden[first : first + len(wanted)])
                total += float(F.cross_entropy(scores, wanted, reduction="sum"))
                count += len(wanted)
        return math.exp(total / max(count, 1))

    @torch.no_grad()
    def places(self, pieces: Sequence[Sequence[int]], watch: Watch, state: State, progress: Progress) -> Places:
        """What the layer sees of the text, until KEPT_BYTES are full. `state` comes to stand before the layer."""
        blocks = [cast(Block, block) for block in self.loaded.model.blocks]
        handles = [
            blocks[watch.layer].register_forward_pre_hook(watch.arrive),
            blocks[watch.layer].down.register_forward_pre_hook(watch.leave),
        ]
        found: list[Places] = []
        states: list[Tensor] = []
        kept = 0
        try:
            for index, ids in enumerate(progress.track(pieces, description=f"layer {watch.layer}: reading")):
                with suppress(Enough), resumed(blocks[: state.layer], state.hidden[index] if state.layer else None):
                    self.read(ids, watch)
                found.append(Places(watch.tokens, watch.gate, watch.dense))
                states.append(watch.hidden)
                kept += watch.gate.nbytes + watch.dense.nbytes
                if kept >= KEPT_BYTES:
                    break
        finally:
            for handle in handles:
                handle.remove()
        state.layer, state.hidden = watch.layer, states
        return Places(*(torch.cat([getattr(part, name) for part in found]) for name in ("tokens", "gate", "dense")))


@contextmanager
def resumed(passed: Sequence[Block], hidden: Tensor | None) -> Iterator[None]:
    """Within the block, the model begins behind the blocks `passed`, with this hidden state."""
    for block in passed:
        block.forward = lambda state, *rest: state if hidden is None else hidden.clone()  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in passed:
            del block.forward
