"""Gate traces: how far each token let each memory in, and how long the n-gram was that asked.

    traced tokens ─► the layer's own rows and hidden state ─► gate, mean over branches ─► Gate per layer

Computed beside the layer's forward, for the traced tokens alone: a step that traces nothing pays one comparison per
layer, and tracing changes no value. STEM rows have no gate and do not appear. Knows nothing of text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.batch import Ints

if TYPE_CHECKING:
    from server.memory.reading import Reading


class Gate(NamedTuple):
    """One token at one layer of one pack. `ngram`: ids in its longest n-gram, the token's own included; 0: none."""

    memory: str
    layer: int
    ngram: int
    gate: float


class GateTrace:
    """The gates of the tokens at the indices `tokens` (ascending) of one step's flat batch."""

    def __init__(self, tokens: Ints) -> None:
        self.tokens = tokens
        self._taken: list[tuple[str, int, Ints, Ints, Tensor]] = []

    def take(self, layer: int, reading: Reading, hidden: Tensor, rows: Tensor) -> None:
        """hidden[T, H] as the layer reads it; rows[S, C · D] of the S tokens that see the pack."""
        seen = reading.seen
        if seen.tokens is None:
            at, among = self.tokens, self.tokens
        else:
            at, among, _ = np.intersect1d(seen.tokens, self.tokens, return_indices=True)
        if not len(at):
            return
        index = torch.from_numpy(among).to(rows.device)
        dead = None if reading.dead is None else reading.dead.index_select(0, index)
        own = hidden.index_select(0, torch.from_numpy(at).to(hidden.device))
        gates = reading.pack.modules[layer].gates(own, rows.index_select(0, index), dead)
        ngrams = reading.pack.addresser.ngram_lengths(seen.windows[among], seen.blocked[among])
        self._taken.append((reading.pack.name, layer, at, ngrams, gates))

    def of_tokens(self) -> dict[int, tuple[Gate, ...]]:
        """Index in the batch → the token's gates, in layer order. Waits for the device."""
        found: dict[int, list[Gate]] = {index: [] for index in self.tokens.tolist()}
        for memory, layer, at, ngrams, gates in self._taken:
            for index, ngram, gate in zip(at.tolist(), ngrams.tolist(), gates.tolist(), strict=True):
                found[index].append(Gate(memory, layer, ngram, gate))
        return {index: tuple(gates) for index, gates in found.items()}
