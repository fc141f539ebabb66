"""Token table: the ids of every running sequence, by [row, position], and the block table beside it.

A batch's ids, n-gram windows and slots are reads of these two arrays at (row, position). Windows go by position, so
prefix hits, preemption and rewinds need no bookkeeping.

    row 3   · · 12 845 77 9 …          n - 1 columns of padding, then position 0, 1, 2, …
"""

from __future__ import annotations

import numpy as np

from server.batch import Bools, Ints
from server.runtime.sequence import Sequence


class TokenTable:
    def __init__(self, rows: int, max_len: int, block_size: int, window: int) -> None:
        self.block_size, self.window = block_size, window
        self.pad = window - 1
        self.tokens = np.zeros((rows, self.pad + max_len), np.int64)
        self.blocks = np.zeros((rows, -(-max_len // block_size)), np.int64)
        self._filled = np.zeros(rows, np.int64)
        self._look_back = np.arange(window)

    def widen(self, window: int) -> None:
        """Looks back at least this far from now on; what stands in the rows stays."""
        if window <= self.window:
            return
        wider = np.zeros((len(self.tokens), window - 1 + self.tokens.shape[1] - self.pad), np.int64)
        wider[:, window - 1 :] = self.tokens[:, self.pad :]
        self.tokens, self.window, self.pad = wider, window, window - 1
        self._look_back = np.arange(window)

    def start(self, sequence: Sequence) -> None:
        """Takes a sequence into its row; called at every admission."""
        self.tokens[sequence.row, self.pad : self.pad + sequence.length] = sequence.tokens[: sequence.length]
        self._filled[sequence.row] = 0

    def append(self, sequence: Sequence) -> None:
        """Takes over the sequence's newest token."""
        self.tokens[sequence.row, self.pad + sequence.length - 1] = sequence.tokens[sequence.length - 1]

    def sync_blocks(self, sequence: Sequence) -> None:
        """Takes over blocks that the sequence got since the last step."""
        filled, count = self._filled[sequence.row], len(sequence.blocks)
        if filled != count:
            self.blocks[sequence.row, filled:count] = sequence.blocks[filled:]
            self._filled[sequence.row] = count

    def windows(self, rows: Ints, positions: Ints) -> tuple[Ints, Bools]:
        """rows[T], positions[T] → windows[T, n], blocked[T, n]; column 0 is the token itself."""
        at = positions[:, None] - self._look_back
        return self.tokens[rows[:, None], at + self.pad], at < 0

    def slots(self, rows: Ints, positions: Ints) -> Ints:
        """[T] where each token's keys and values live."""
        return self.blocks[rows, positions // self.block_size] * self.block_size + positions % self.block_size
