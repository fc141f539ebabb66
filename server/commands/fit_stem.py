"""`attach --stem … --fit`: STEM rows fitted to the feed-forward block they serve in; the backbone stays as it is.

    loss = mean over the text's places of | W_d (g · (U[t] − u)) |²        g = silu(W_g x), u = W_u x of that place

From the lowest layer up, each with the tables below it in place, so that a layer learns on the inputs it will meet. The
text goes through the model once in all: up to a layer, whose g and u are kept while it is fitted, and on from there
with the fitted table. Only rows of tokens that occur are
touched (sparse Adam, the rate falling along a half cosine over the layer's share of the time). A tenth of the text
chooses the rows that are kept (the best so far, whenever the time is up or SIGINT comes), and another tenth says what
came of it, as perplexity.

Shapes: N places, V tokens, H hidden width, F feed-forward width. Knows nothing of files.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
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
BATCH = 2048  # places a step
RATE = 0.05  # of the rows' root mean square, at first
CHECK_EVERY = 20  # steps
LEAST_TOKENS = 500


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
            for first in range(0, len(ids) - 1, 128):
                wanted = torch.tensor(ids[first + 1 : first + 129], device=hidden.device)
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


class Stopwatch:
    """Whether there is time left: until a moment, or until SIGINT, which within the block only says so."""

    def __init__(self, minutes: float) -> None:
        self.end, self.interrupted = self.now() + 60 * minutes, False

    def now(self) -> float:
        return time.monotonic()

    @property
    def over(self) -> bool:
        return self.interrupted or self.now() >= self.end

    def share(self, layers_left: int) -> float:
        """The moment at which the next of so many layers has to be done."""
        now = self.now()
        return now + max(0.0, self.end - now) / layers_left

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self.interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def fit_layer(
    reader: Reader,
    below: dict[int, Tensor],
    layer: int,
    start: Tensor,
    down: Tensor,
    split: Split,
    states: tuple[State, State],
    clock: Stopwatch,
    until: float,
    progress: Progress,
) -> tuple[Tensor, int]:
    """start[V, F] fp32 → the best rows found by the moment `until`, and the steps taken.

    `below`: the tables of lower layers; `down` [H, F] fp32; `states`: of the text that is fitted and that chooses.
    """
    watch = Watch(below, layer)
    fit, choose = (
        reader.places(pieces, watch, state, progress)
        for pieces, state in zip((split.fit, split.choose), states, strict=True)
    )
    task = progress.add_task(f"layer {layer}: fitting", total=1.0)

    def show(passed: float, error: float) -> None:
        progress.update(task, completed=passed, description=f"layer {layer}: error {error:.3f} of the calibrated rows'")

    found = fit_rows(start.to(fit.gate.device), fit, choose, down.to(fit.gate.device), clock, until, show)
    progress.remove_task(task)
    return found[0].cpu(), found[1]


def fit_rows(
    start: Tensor,
    fit: Places,
    choose: Places,
    down: Tensor,
    clock: Stopwatch,
    until: float,
    show: Callable[[float, float], None],
) -> tuple[Tensor, int]:
    """The optimisation alone; `show(passed, error)` hears of the best so far, relative to the start."""
    touched, index = torch.unique(fit.tokens, return_inverse=True)
    where = torch.full((len(start),), -1, device=start.device)
    where[touched] = torch.arange(len(touched), device=start.device)
    chosen = where[choose.tokens]
    known = torch.nonzero(chosen >= 0)[:, 0]  # only where rows are fitted can they be chosen between
    rows = nn.Embedding(len(touched), start.shape[1], sparse=True, _weight=start[touched].clone())
    rate = RATE * max(float(start[touched].pow(2).mean().sqrt()), 1e-3)
    optimizer = torch.optim.SparseAdam(rows.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def judged() -> float:
        losses = [float(choose.loss(rows(chosen[at]), down, at)) * len(at) for at in torch.split(known, BATCH)]
        return sum(losses) / max(len(known), 1)

    begun, first, step = clock.now(), judged(), 0
    best, kept = first, rows.weight.detach().clone()
    while not clock.over and clock.now() < until:
        order = torch.randperm(len(index), generator=generator).to(start.device)
        for at in torch.split(order, BATCH):
            passed = (clock.now() - begun) / max(until - begun, 1e-9)
            if passed >= 1 or clock.over:
                break
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * passed)) / 2
            optimizer.zero_grad()
            fit.loss(rows(index[at]), down, at).backward()  # type: ignore[no-untyped-call]
            optimizer.step()  # type: ignore[no-untyped-call]
            step += 1
            if step % CHECK_EVERY == 0:
                now = judged()
                if now < best:
                    best, kept = now, rows.weight.detach().clone()
                show(passed, best / max(first, 1e-30))
    if step and judged() < best:
        kept = rows.weight.detach().clone()
    return start.index_copy(0, touched, kept), step
