"""`attach --stem … --fit`: STEM rows fitted to the feed-forward block they serve in; the backbone stays as it is.

    loss = mean over the text's places of | W_d (g · (U[t] − u)) |²        g = silu(W_g x), u = W_u x of that place

From the lowest layer up, each with the tables below it in place, so that a layer learns on the inputs it will meet. The
text goes through the model once in all: up to a layer, whose g and u are kept while it is fitted, and on from there
with the fitted table. Only rows of tokens that occur are touched (sparse Adam, the rate falling along a half cosine
over the layer's share of the time). A tenth of the text chooses the rows that are kept (the best so far, whenever the
time is up or SIGINT comes), and another tenth says what came of it, as perplexity.

Shapes: N places, V tokens, H hidden width, F feed-forward width. Knows nothing of files.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from server.cache.row_types import Floats
from server.commands.stem_text import Places, Reader, Split, State, Tables, Watch

CHUNK = 4096  # rows handed on at once
BATCH = 2048  # places a step
RATE = 0.05  # of the rows' root mean square, at first
CHECK_EVERY = 20  # steps


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


Rows = Callable[[], Iterator[Floats]]  # a layer's calibrated rows, in chunks float32[n, F], made when called


class Fitting:
    """All layers' rows fitted, one after another; within `begun` an interruption only ends the fitting."""

    def __init__(self, reader: Reader, split: Split, minutes: float, progress: Progress) -> None:
        self.reader, self.split, self.minutes, self.progress = reader, split, minutes, progress
        self.served: dict[int, Tensor] = {}  # [V, F] in the model's dtype, of the layers that are done
        self.states = State(), State()
        self.clock = Stopwatch(minutes)
        self.left, self.steps = 0, 0
        self.perplexity: dict[str, float] = {}

    @contextmanager
    def begun(self, rows: Mapping[int, Rows]) -> Iterator[None]:
        self.perplexity["dense"] = self._perplexity("dense")
        self.served = {layer: self._served(whole(made())) for layer, made in rows.items()}
        self.perplexity["calibrated"] = self._perplexity("calibrated")
        self.served, self.left, self.clock = {}, len(rows), Stopwatch(self.minutes)
        with self.clock.watching():
            yield

    def fitted(self, layer: int, calibrated: Rows, down: Tensor) -> Iterator[Floats]:
        """The layer's rows in chunks; to be called for the layers in ascending order. `down` [H, F] fp32."""
        table = whole(calibrated())
        if not self.clock.over:
            until = self.clock.share(self.left)
            table = self._fit(layer, table, down, until)
        self.left -= 1
        self.served[layer] = self._served(table)
        for part in torch.split(table, CHUNK):
            yield part.numpy()

    def said(self) -> dict[str, Any]:
        """What came of it, for config.json and for people."""
        self.perplexity["fitted"] = self._perplexity("fitted")
        tokens = sum(len(piece) - 1 for piece in self.split.report)
        about = {"minutes": self.minutes, "steps": self.steps, "interrupted": self.clock.interrupted}
        return {**about, "tokens": tokens, "perplexity": self.perplexity}

    def _fit(self, layer: int, start: Tensor, down: Tensor, until: float) -> Tensor:
        watch = Watch(self.served, layer)
        parts = zip((self.split.fit, self.split.choose), self.states, strict=True)
        fit, choose = (self.reader.places(pieces, watch, state, self.progress) for pieces, state in parts)
        task = self.progress.add_task(f"layer {layer}: fitting", total=1.0)

        def show(passed: float, error: float) -> None:
            told = f"layer {layer}: error {error:.3f} of the calibrated rows'"
            self.progress.update(task, completed=passed, description=told)

        where = fit.gate.device
        rows, steps = fit_rows(start.to(where), fit, choose, down.to(where), self.clock, until, show)
        self.progress.remove_task(task)
        self.steps += steps
        return rows.cpu()

    def _served(self, table: Tensor) -> Tensor:
        return table.to(self.reader.loaded.device, self.reader.loaded.dtype)

    def _perplexity(self, what: str) -> float:
        return self.reader.perplexity(self.split.report, Tables(self.served), self.progress, what)


def whole(chunks: Iterator[Floats]) -> Tensor:
    return torch.cat([torch.from_numpy(chunk) for chunk in chunks])


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
