"""Edited rows in place of those looked up, for the tokens that see the edits; one launch, legal in a CUDA graph.

    overlays[T, 2] ─┐
    row_ids[T, C] ──┴─ number · 2^40 + id ─ search ─→ keys[N], ascending ─ found ─→ out[t, c] = values[N, D]

A token sees up to two overlays by number, everyone's before its tenant's, of which the later one counts; -1: none.
Shapes: T tokens, C rows a token, N edits at most, D values a row. `keys` past the last edit are LAST, so that their
number need not be known. Knows numbers and row ids, nothing of scopes.
"""

import torch
from torch import Tensor

from kernels.language import jit_for_any, power_of_two, runs_on, tl
from kernels.row_lookup import block_of

ROW_BITS = 40  # of a key; the overlay's number stands above them
LAST = (1 << 63) - 1
SCOPES = 2


def patch(out: Tensor, row_ids: Tensor, overlays: Tensor, keys: Tensor, values: Tensor) -> None:
    """out[T, C · D] in place; row_ids[T, C], overlays[T, 2], keys[N] int64, values[N, D] of out's dtype."""
    if not runs_on(out):
        reference(out, row_ids, overlays, keys, values)
        return
    tokens, columns = row_ids.shape
    dim, padded = values.shape[1], power_of_two(columns)
    patch_kernel[(tokens,)](
        out,
        row_ids,
        overlays,
        keys,
        values,
        COLUMNS=columns,
        PADDED=padded,
        D=dim,
        BLOCK=block_of(dim, padded),
        N=len(keys),
        HALVINGS=len(keys).bit_length(),
        SCOPES=SCOPES,
        ROW_BITS=ROW_BITS,
    )


def reference(out: Tensor, row_ids: Tensor, overlays: Tensor, keys: Tensor, values: Tensor) -> None:
    """The same with torch's operators."""
    rows = out.view(*row_ids.shape, -1)
    for scope in range(SCOPES):
        number = overlays[:, scope, None]
        wanted = (number << ROW_BITS) + row_ids
        near = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        found = (keys[near] == wanted) & (number >= 0)
        rows.copy_(torch.where(found[..., None], values[near], rows))


@jit_for_any("row_ids", "overlays")
def patch_kernel(
    out, row_ids, overlays, keys, values,
    COLUMNS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
    HALVINGS: tl.constexpr, SCOPES: tl.constexpr, ROW_BITS: tl.constexpr,
):  # fmt: skip
    """A program: one token."""
    token = tl.program_id(0).to(tl.int64)
    column, value = tl.arange(0, PADDED), tl.arange(0, BLOCK)
    for scope in tl.static_range(SCOPES):
        number = tl.load(overlays + token * SCOPES + scope)
        if number >= 0:
            real = column < COLUMNS
            wanted = tl.load(row_ids + token * COLUMNS + column, mask=real, other=0) + (number << ROW_BITS)
            low, high = tl.zeros([PADDED], tl.int32), tl.full([PADDED], N, tl.int32)
            for _ in tl.static_range(HALVINGS):
                middle = (low + high) // 2
                known = tl.load(keys + middle, mask=middle < N, other=9223372036854775807)
                below = (known < wanted) & (low < high)
                high = tl.where(below | (low >= high), high, middle)
                low = tl.where(below, middle + 1, low)
            found = tl.load(keys + low, mask=low < N, other=-1)
            hit = real & (found == wanted)
            for first in tl.static_range(0, D, BLOCK):
                mask = hit[:, None] & (first + value < D)[None, :]
                new = tl.load(values + low.to(tl.int64)[:, None] * D + first + value[None, :], mask=mask, other=0.0)
                at = out + (token * COLUMNS + column[:, None]) * D + first + value[None, :]
                tl.store(at, new, mask=mask)
