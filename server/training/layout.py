"""Sequences side by side without padding: how one training batch lies in flat tensors.

    tokens   a0 a1 a2 a3 | b0 b1 | c0 c1 c2        [T], all linear maps run on this
    padded   a0 a1 a2 a3
             b0 b1  ·  ·                           [B, L], attention alone; causal, so padding is never seen
             c0 c1 c2  ·

Shapes: B sequences, T tokens in all, L the longest. Knows ids and places; nothing of models or rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.batch import Ints


@dataclass(frozen=True, slots=True)
class Layout:
    """token_ids, positions [T]; `cells` [T] places in the padded grid B · L, None where nothing is padded."""

    token_ids: Tensor
    positions: Tensor
    cells: Tensor | None
    batch: int
    longest: int

    @classmethod
    def of(cls, sequences: Sequence[Ints], device: torch.device) -> Layout:
        lengths = np.array([len(sequence) for sequence in sequences])
        longest = int(lengths.max())
        positions = np.concatenate([np.arange(length) for length in lengths])
        cells = None
        if lengths.min() < longest:
            starts = np.repeat(np.arange(len(lengths)) * longest, lengths)
            cells = torch.from_numpy(starts + positions).to(device)
        return cls(
            torch.from_numpy(np.concatenate(sequences).astype(np.int64)).to(device),
            torch.from_numpy(positions).to(device),
            cells,
            len(sequences),
            longest,
        )

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def pad(self, flat: Tensor) -> Tensor:
        """[T, …] → [B, L, …], zero where there is no token."""
        if self.cells is None:
            return flat.view(self.batch, self.longest, *flat.shape[1:])
        padded = flat.new_zeros(self.batch * self.longest, *flat.shape[1:])
        return padded.index_copy(0, self.cells, flat).view(self.batch, self.longest, *flat.shape[1:])

    def flatten(self, padded: Tensor) -> Tensor:
        """[B, L, …] → [T, …]."""
        flat = padded.reshape(self.batch * self.longest, *padded.shape[2:])
        return flat if self.cells is None else flat.index_select(0, self.cells)

    def back(self, distance: int) -> Tensor:
        """[T] 1 + the index of each token's predecessor `distance` places before it; 0 where its sequence has none."""
        index = torch.arange(self.tokens, device=self.positions.device) + 1 - distance
        return index.masked_fill(self.positions < distance, 0)
