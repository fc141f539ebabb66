"""Which n-grams open a memory's gate: what every Engram layer does to every token that the engine computes.

    α       the gate, 0 … 1
    share   length of what the layer adds over the length of the stream it adds to: what a token really gets

Watched from outside, while the engine works. Knows the engine's modules and batches; nothing of facts or text kinds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from server.memory.attached import AttachedPack
from server.memory.engram import Engram
from server.models.decoder import Decoder
from server.training.curves import figure

Floats = npt.NDArray[np.float32]
BINS = 40
NAMED = 10  # n-grams a table lists


@dataclass(slots=True)
class Watched:
    """Per layer and kind of text: α and share of every token, and the window [n] it was computed at."""

    alphas: dict[tuple[int, str], list[Floats]] = field(default_factory=lambda: defaultdict(list))
    shares: dict[tuple[int, str], list[Floats]] = field(default_factory=lambda: defaultdict(list))
    windows: dict[tuple[int, str], list[tuple[tuple[int, ...], ...]]] = field(default_factory=lambda: defaultdict(list))

    def flat(self, layer: int, kind: str) -> tuple[Floats, Floats, list[tuple[int, ...]]]:
        """(α[T], share[T], windows: newest id last, without what lies before the start) of all tokens seen."""
        key = layer, kind
        empty = np.zeros(0, np.float32)
        windows = [window for step in self.windows[key] for window in step]
        return np.concatenate([empty, *self.alphas[key]]), np.concatenate([empty, *self.shares[key]]), windows


@contextmanager
def watching(model: Decoder, pack: AttachedPack, seen: Watched, kind: str) -> Iterator[None]:
    """Within the block, every token that reads the pack is noted as text of this kind. All tokens must read it."""
    now: list[tuple[tuple[int, ...], ...]] = []

    def begin(module: Any, arguments: tuple[Any, ...]) -> None:
        batch = arguments[0]
        n = pack.addresser.n
        now[:] = [
            tuple(
                tuple(int(token) for token, out in zip(row[::-1], gone[::-1], strict=True) if not out)
                for row, gone in zip(batch.windows[:, :n], batch.blocked[:, :n], strict=True)
            )
        ]

    def note(layer: int) -> Any:
        def hook(module: Engram, arguments: tuple[Any, ...], added: Tensor) -> None:
            hidden, rows = arguments[0], arguments[1]
            alpha, _ = module.gate(module.branches_of(hidden), rows)
            share = added.float().norm(dim=-1) / hidden.float().norm(dim=-1)
            seen.alphas[layer, kind].append(alpha.mean(1)[:, 0].cpu().numpy())
            seen.shares[layer, kind].append(share.cpu().numpy())
            seen.windows[layer, kind].append(now[0])

        return hook

    handles = [model.register_forward_pre_hook(begin)]
    handles += [
        module.register_forward_hook(note(layer))
        for layer, module in pack.modules.items()
        if isinstance(module, Engram)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def widest(seen: Watched, layer: int, kind: str) -> list[tuple[tuple[int, ...], float, float, int]]:
    """The n-grams with the largest mean share: (ids, α, share, occurrences), largest first."""
    alphas, shares, windows = seen.flat(layer, kind)
    sums: dict[tuple[int, ...], list[float]] = {}
    for window, alpha, share in zip(windows, alphas.tolist(), shares.tolist(), strict=True):
        entry = sums.setdefault(window, [0.0, 0.0, 0.0])
        entry[0], entry[1], entry[2] = entry[0] + alpha, entry[1] + share, entry[2] + 1
    means = [(window, a / count, s / count, int(count)) for window, (a, s, count) in sums.items()]
    return sorted(means, key=lambda each: -each[2])[:NAMED]


def summary(seen: Watched, layer: int, kind: str) -> dict[str, float]:
    """Mean and 90th percentile of α and share; tokens."""
    alphas, shares, _ = seen.flat(layer, kind)
    if not len(alphas):
        return {"tokens": 0}
    return {
        "tokens": len(alphas),
        "alpha": float(alphas.mean()),
        "alpha_p90": float(np.quantile(alphas, 0.9)),
        "share": float(shares.mean()),
        "share_p90": float(np.quantile(shares, 0.9)),
    }


def draw(seen: Watched, layers: tuple[int, ...], kinds: tuple[str, ...], path: Path) -> None:
    """One PNG: how α and share are distributed, a row per layer, a curve per kind of text. Needs matplotlib."""
    drawn, axes = figure(len(layers), 2, (9, 2.4 * len(layers)))
    for row, layer in zip(np.atleast_2d(axes), layers, strict=True):
        for kind in kinds:
            alphas, shares, _ = seen.flat(layer, kind)
            for axis, values, top in ((row[0], alphas, 1.0), (row[1], shares, 1.5)):
                bins = np.linspace(0, top, BINS + 1)
                axis.hist(np.clip(values, 0, top), bins, density=True, histtype="step", label=kind)
        row[0].set(title=f"layer {layer}: gate", ylabel="density")
        row[1].set(title=f"layer {layer}: added / stream")
        row[1].legend()
    drawn.savefig(path, dpi=110)
