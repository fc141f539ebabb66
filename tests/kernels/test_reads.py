"""Bare reads: whole rows as they are stored, and every word exactly once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import reads


@pytest.mark.parametrize("copy_rows", [reads.copy_rows])
@pytest.mark.parametrize("programs", [1, 3])
def test_rows_are_copied_whole_and_in_order(copy_rows: Callable[..., None], programs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-(2**31), 2**31, (50, 20), generator=generator).int()
    row_ids = torch.randint(0, 50, (37,), generator=generator)
    out = torch.full((37, 20), 7, dtype=torch.int32)
    copy_rows(table, row_ids, out, programs)
    assert torch.equal(out, table[row_ids])


@pytest.mark.parametrize("add_words", [reads.add_words])
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_every_word_is_added_once(add_words: Callable[..., None], programs: int) -> None:
    words = torch.randint(0, 1000, (4 * reads.BLOCK,), generator=torch.Generator().manual_seed(1)).int()
    sums = torch.full((programs, reads.BLOCK), -1, dtype=torch.int32)
    add_words(words, sums)
    assert torch.equal(sums.sum(0), words.view(-1, reads.BLOCK).sum(0))
