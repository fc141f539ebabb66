"""Edited rows against a loop over tokens, columns and scopes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import row_lookup, row_patch
from kernels.row_patch import LAST, ROW_BITS


@pytest.mark.parametrize("implementation", [row_patch.patch, row_patch.reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("entries", [0, 1, 7, 8])  # of 8
def test_a_token_reads_the_edits_of_its_scopes_and_of_two_the_later(
    implementation, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_lookup, "VALUES", 64)  # rows come in pieces
    generator = np.random.default_rng(entries)
    tokens, columns, dim, held = 6, 3, 40, 8
    chosen = sorted(generator.choice([(n, r) for n in range(3) for r in range(9)], entries, replace=False).tolist())
    keys = torch.full((held,), LAST, dtype=torch.int64)
    keys[:entries] = torch.tensor([(number << ROW_BITS) + row for number, row in chosen], dtype=torch.int64)
    values = torch.from_numpy(generator.normal(size=(held, dim)).astype(np.float32))
    row_ids = torch.from_numpy(generator.integers(0, 9, (tokens, columns)))
    overlays = torch.tensor([[-1, -1], [0, -1], [0, 1], [2, -1], [1, 2], [2, 0]])
    out = torch.from_numpy(generator.normal(size=(tokens, columns * dim)).astype(np.float32))
    expected = out.clone().view(tokens, columns, dim)
    for token in range(tokens):
        for scope in overlays[token].tolist():
            for column in range(columns):
                if [scope, int(row_ids[token, column])] in chosen:
                    expected[token, column] = values[chosen.index([scope, int(row_ids[token, column])])]
    implementation(out, row_ids, overlays, keys, values)
    assert torch.equal(out.view(tokens, columns, dim), expected)
