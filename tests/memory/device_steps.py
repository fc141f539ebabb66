"""The same decode steps for the host and for the device: ragged sequences, blocks far apart, dummies at the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from server.batch import Batch, Bools, DecodeBatch, Ints
from server.memory.memories import Memories
from server.view import MemoryView

BLOCK, DUMMIES = 4, 2


class Decoding:
    """Sequences ids[b], one token a step at starts[b], starts[b] + 1, …, for the packs of `memories`."""

    def __init__(self, memories: Memories, ids: Sequence[Ints], views: Sequence[MemoryView], pad: int = 5) -> None:
        self.memories, self.ids, self.views, self.pad = memories, list(ids), list(views), pad
        count = len(ids) + DUMMIES
        longest = max(map(len, ids))
        self.tokens = np.zeros((count, pad + longest), np.int64)
        for row, sequence in enumerate(ids):
            self.tokens[row, pad : pad + len(sequence)] = sequence
        pages = -(-longest // BLOCK)
        self.blocks = 1 + np.arange(count * pages)[::-1].reshape(count, pages)  # block 0 is the padding's

    @property
    def slots(self) -> int:
        return (self.blocks.max() + 1) * BLOCK

    def _slots(self, rows: Ints, positions: Ints) -> Ints:
        return self.blocks[rows, positions // BLOCK] * BLOCK + positions % BLOCK

    def host(self, positions: Ints) -> Batch:
        """positions[B]: where each sequence is."""
        rows = np.arange(len(self.ids))
        at = positions[:, None] - np.arange(self.memories.window)
        distinct = list({id(view): view for view in self.views}.values())
        return Batch(
            token_ids=torch.from_numpy(self.tokens[rows, self.pad + positions]),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(self._slots(rows, positions)),
            block_table=torch.from_numpy(self.blocks[rows]),
            host_blocks=self.blocks[rows],
            query_start=np.arange(len(rows) + 1),
            context_len=positions + 1,
            views=tuple(distinct),
            view_of=np.array([distinct.index(view) for view in self.views]),
            windows=self.tokens[rows[:, None], self.pad + at],
            blocked=at < 0,
            sample_at=torch.zeros(0, dtype=torch.int64),
            block_size=BLOCK,
        )

    def device(self, positions: Ints, sees: Bools, dummies: int = DUMMIES) -> DecodeBatch:
        """The same step, dummies behind it; sees[K, B]."""
        rows = np.arange(len(self.tokens))
        at = np.concatenate([positions, np.zeros(dummies, np.int64)])
        everyone = np.concatenate([sees, np.zeros((len(sees), dummies), bool)], axis=1)
        return DecodeBatch(
            tokens=torch.from_numpy(self.tokens),
            pad=self.pad,
            row_of=torch.from_numpy(rows),
            positions=torch.from_numpy(at),
            block_table=torch.from_numpy(self.blocks),
            context_len=torch.from_numpy(at + 1),
            slots=torch.from_numpy(self._slots(rows, at)),
            sees=torch.from_numpy(everyone),
            block_size=BLOCK,
        )
