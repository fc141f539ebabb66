"""Row ids of the n-grams that end at each token, from a token table on the device.

    tokens[rows, pad + positions] ─ look back ─ latch ─ compress ─ · multipliers, XOR ─→ mix ─ primes, offsets ─→ rows

Shapes: T tokens, L tables, n longest n-gram, O orders, C = O · heads columns. The rules are
`server/memory/addressing.py`'s: a place before the sequence's start, an unknown id or, from the place after it on, a
boundary id closes the window; every place from there back reads as the pad. Knows ids and constants, nothing of
sequences or tables.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.language import blocks, jit_for_any, power_of_two, runs_on, tl

BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class HashConstants:
    """A hash rule's numbers on the device, int64: multipliers[L, n], primes[L, O, heads], offsets[L, C].

    lookup[ids + 1]: raw id → compressed, its last entry the pad; None: ids are hashed as they are, `outside` is the
    pad. `ids`: ids below it are known. `boundary`: -1 for none.
    """

    multipliers: Tensor
    primes: Tensor
    offsets: Tensor
    lookup: Tensor | None
    orders: tuple[int, ...]
    ids: int
    outside: int
    boundary: int = -1
    oldest_first: bool = False

    @property
    def order_mask(self) -> int:
        """Bit k is set for order k."""
        return sum(1 << order for order in self.orders)


def ngram_rows(
    tokens: Tensor,
    row_of: Tensor,
    positions: Tensor,
    pad: int,
    constants: HashConstants,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """tokens[R, pad + P], row_of[T], positions[T] → rows int64[L, T, C], mix int64[L, T, O], contiguous; written to
    `into` where that is given. No host sync.
    """
    tables, look_back = constants.multipliers.shape
    heads, count, orders = constants.primes.shape[2], len(positions), len(constants.orders)
    rows, mix = into or (
        torch.empty(tables, count, orders * heads, dtype=torch.int64, device=tokens.device),
        torch.empty(tables, count, orders, dtype=torch.int64, device=tokens.device),
    )
    if not runs_on(tokens):
        for out, made in zip((rows, mix), reference(tokens, row_of, positions, pad, constants), strict=True):
            out.copy_(made)
        return rows, mix
    hash_kernel[(blocks(count, BLOCK_TOKENS), tables)](
        tokens,
        row_of,
        positions,
        constants.multipliers,
        constants.primes,
        constants.offsets,
        constants.lookup if constants.lookup is not None else constants.offsets,
        rows,
        mix,
        count,
        tokens.stride(0),
        constants.ids,
        constants.outside,
        constants.boundary,
        PAD=pad,
        N=look_back,
        ORDERS=orders,
        ORDER_MASK=constants.order_mask,
        HEADS=heads,
        HEADS_PADDED=power_of_two(heads),
        COMPRESSED=constants.lookup is not None,
        OLDEST_FIRST=constants.oldest_first,
        BLOCK=BLOCK_TOKENS,
    )
    return rows, mix


def reference(
    tokens: Tensor, row_of: Tensor, positions: Tensor, pad: int, constants: HashConstants
) -> tuple[Tensor, Tensor]:
    """The same with torch's operators."""
    tables, look_back = constants.multipliers.shape
    at = positions[:, None] - torch.arange(look_back, device=tokens.device)
    ids = tokens[row_of[:, None], at + pad].long()
    out = (at < 0) | (ids < 0) | (ids >= constants.ids)
    out[:, 1:] |= ids[:, 1:] == constants.boundary
    out = out.cummax(dim=1).values
    ids = torch.where(out, constants.outside, ids)
    if constants.lookup is not None:
        ids = constants.lookup[ids]
    if constants.oldest_first:
        ids = ids.flip(1)
    planes = ids[None] * constants.multipliers[:, None]
    for place in range(1, look_back):
        planes[..., place] ^= planes[..., place - 1]
    mix = planes[..., [order - 1 for order in constants.orders]]
    rows = (mix[..., None] % constants.primes[:, None]).reshape(tables, len(positions), -1) + constants.offsets[:, None]
    return rows, mix


@jit_for_any("row_of", "positions", "count")
def hash_kernel(
    tokens,
    row_of,
    positions,
    multipliers,
    primes,
    offsets,
    lookup,
    rows,
    mix,
    count,
    stride,
    ids,
    outside,
    boundary,
    PAD: tl.constexpr,
    N: tl.constexpr,
    ORDERS: tl.constexpr,
    ORDER_MASK: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    COMPRESSED: tl.constexpr,
    OLDEST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: BLOCK tokens of one table."""
    table = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < count
    position = tl.load(positions + token, mask=there, other=0).to(tl.int64)
    newest = tokens + tl.load(row_of + token, mask=there, other=0).to(tl.int64) * stride + PAD + position
    head = tl.arange(0, HEADS_PADDED)
    real = head < HEADS

    depth = tl.full([BLOCK], N, tl.int64)  # the first place that is closed
    for back in tl.static_range(N):
        known = there & (position >= back)
        found = tl.load(newest - back, mask=known, other=-1).to(tl.int64)
        closed = (found < 0) | (found >= ids)
        if back > 0:
            closed = closed | (found == boundary)
        depth = tl.where(closed & (depth > back), back, depth)

    mixed = tl.zeros([BLOCK], tl.int64)
    order = 0
    for place in tl.static_range(N):
        back = N - 1 - place if OLDEST_FIRST else place
        found = tl.load(newest - back, mask=there & (position >= back), other=0).to(tl.int64)
        hashed = tl.where(depth > back, found, outside)
        if COMPRESSED:
            hashed = tl.load(lookup + hashed, mask=there, other=0)
        mixed = mixed ^ (hashed * tl.load(multipliers + table * N + place))
        if (ORDER_MASK >> (place + 1)) & 1:
            tl.store(mix + (table * count + token) * ORDERS + order, mixed, mask=there)
            prime = tl.load(primes + (table * ORDERS + order) * HEADS + head, mask=real, other=1)
            offset = tl.load(offsets + (table * ORDERS + order) * HEADS + head, mask=real, other=0)
            row = mixed[:, None] % prime[None, :] + offset[None, :]
            out = rows + ((table * count + token[:, None]) * ORDERS + order) * HEADS + head[None, :]
            tl.store(out, row, mask=there[:, None] & real[None, :])
            order += 1
