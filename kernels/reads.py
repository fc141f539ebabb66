"""Reads and nothing else: what lookups and other kernels are measured against.

    add_words    memory in order, by so many programs                        the most that a kernel reads of it
    copy_rows    whole rows at given places, as they are stored              a lookup without tags and decoding

Shapes: N rows asked for, W int32 words a row, P programs. From registered host memory or the device's own.
"""

import torch
from torch import Tensor

from kernels.language import jit, power_of_two, runs_on, tl

BLOCK = 1024  # words that a program of `add_words` reads at once
ROWS_AT_ONCE = 16


def add_words(words: Tensor, sums: Tensor) -> None:
    """words int32[M · BLOCK] → sums int32[P, BLOCK]: program p adds up blocks p, p + P, …; wraps around."""
    if not runs_on(sums):
        sums.zero_()
        for first in range(0, len(words) // BLOCK, len(sums)):
            part = words[first * BLOCK : (first + len(sums)) * BLOCK].view(-1, BLOCK)
            sums[: len(part)] += part
        return
    sum_kernel[(len(sums),)](words, sums, len(words) // BLOCK, BLOCK=BLOCK)


def copy_rows(table: Tensor, row_ids: Tensor, out: Tensor, programs: int) -> None:
    """table int32[rows, W], row_ids int64[N] → out int32[N, W]."""
    if not runs_on(out):
        torch.index_select(table, 0, row_ids, out=out)
        return
    words = table.shape[1]
    rows_kernel[(programs,)](
        table, row_ids, out, len(row_ids), WORDS=words, WORDS_PADDED=power_of_two(words), ROWS=ROWS_AT_ONCE
    )


@jit
def sum_kernel(words, sums, blocks, BLOCK: tl.constexpr):
    """A program: every P-th block of words, added up so that no load is left out."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    at = tl.program_id(0)
    while at < blocks:
        total += tl.load(words + at.to(tl.int64) * BLOCK + column)
        at += tl.num_programs(0)
    tl.store(sums + tl.program_id(0) * BLOCK + column, total)


@jit
def rows_kernel(
    table, row_ids, out, count, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """A program: every P-th group of rows, copied as they are."""
    lane, column = tl.arange(0, ROWS), tl.arange(0, WORDS_PADDED)
    first = tl.program_id(0) * ROWS
    while first < count:
        index = (first + lane).to(tl.int64)
        there = index < count
        row = tl.load(row_ids + index, mask=there, other=0)
        real = there[:, None] & (column < WORDS)[None, :]
        words = tl.load(table + row[:, None] * WORDS + column[None, :], mask=real, other=0)
        tl.store(out + index[:, None] * WORDS + column[None, :], words, mask=real)
        first += tl.num_programs(0) * ROWS
