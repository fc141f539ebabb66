"""Batch: the tokens of one step, flat, as every layer sees them.

Shapes: T tokens, B sequences, n = longest n-gram of any attached memory (1 without memory).

    sequences   | a a a a | b | c c |          T = 7, B = 3
    query_start   0         4   5     7        B + 1
    positions     0 1 2 3   9   4 5            place of the token in its own sequence
    context_len   4         10  6              tokens of the sequence up to and including this step's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

    from server.view import MemoryView

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens. Tensors live on the model's device, NumPy arrays on the host.

    token_ids[T], positions[T], slots[T]   int64 tensors; slot = block · block_size + offset, where K, V and the
                                           short convolution's inputs of this token are stored
    block_table[B, ·], host_blocks[B, ·]   int64, on the device and on the host, padded with block 0
    query_start[B + 1], context_len[B]     host
    views, view_of[T]                      the distinct memory views of this step, and each token's index into them
    windows[T, n]                          raw ids; column s is the s-th predecessor by position in the sequence
    blocked[T, n]                          True before the sequence's start, or where a token takes part in no n-gram
    sample_at                              int64 tensor: the rows of the flat batch whose logits are wanted
    askers[T]                              which request each token is of, a number under 2^32; None if nobody counts
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    host_blocks: Ints
    query_start: Ints
    context_len: Ints
    views: tuple[MemoryView, ...]
    view_of: Ints
    windows: Ints
    blocked: Bools
    sample_at: Tensor
    block_size: int
    askers: Ints | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.query_start[-1])

    @property
    def num_sequences(self) -> int:
        return len(self.context_len)

    @property
    def host_positions(self) -> Ints:
        """`positions`, on the host."""
        counts = np.diff(self.query_start)
        return np.arange(self.num_tokens) + np.repeat(self.context_len - self.query_start[1:], counts)

    @property
    def sequence_of(self) -> Ints:
        """[T] index of the sequence each token belongs to."""
        return np.repeat(np.arange(self.num_sequences), np.diff(self.query_start))


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One decode step as the device sees it: one token a sequence, B of them, the last of which may be dummies.

    All tensors live on the device and are rewritten in place between steps, never replaced, so that a captured CUDA
    graph finds the new step at the old addresses. N pages, K attached packs, R rows of the token table.

    tokens[R, pad + P]             int64; the token table's copy on the device; position p of a row is column pad + p
    row_of[B], positions[B]        int64; each token's row in it and its place in its sequence
    block_table[B, N]              int64, padded with block 0
    context_len[B], slots[B]       int64; positions + 1, and where K, V and convolution inputs of this token are stored
    sees[K, B]                     bool; which tokens read which pack, packs in the order of attachment

    A dummy has a row, a block and a slot of its own that nobody reads, and sees no pack.
    """

    tokens: Tensor
    pad: int
    row_of: Tensor
    positions: Tensor
    block_table: Tensor
    context_len: Tensor
    slots: Tensor
    sees: Tensor
    block_size: int

    @property
    def num_tokens(self) -> int:
        return len(self.row_of)

    @property
    def token_ids(self) -> Tensor:
        """[B] the ids of this step's tokens."""
        return self.tokens[self.row_of, self.pad + self.positions]
