"""Rows of a step in one launch: probe the hot rows, read hits from device memory and misses from registered host
memory, dequantise, write to staging. No host sync; legal in a CUDA graph.

    keys[T, O] ─ mix ─→ set ─ compare W tags ─→ hit: cached[set · W + way]        E bytes, an n-gram's heads
                                              └ miss: table[row_ids[T, C]]        by unified addressing, a row a head

Shapes: T tokens, O orders, heads rows an n-gram, C = O · heads, S sets, W ways, D values and R bytes a row, E = heads ·
R. A persistent grid: `programs` bounds it, so that lookups in the background leave multiprocessors to the forward
pass. Rows must begin at multiples of 16 bytes to be read 16 at a time. The tags are those of
`server/cache/hot_pool.py`, the row types those of `server/cache/row_types.py`; fp8 is decoded by bit arithmetic,
since sm_80 has no conversion.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.language import jit, jit_for_any, power_of_two, runs_on, tl

Kind = Literal["plain", "int8", "float8_e4m3", "float8_e4m3_e8m0"]
KINDS: dict[str, int] = {"plain": 0, "int8": 1, "float8_e4m3": 2, "float8_e4m3_e8m0": 3}
VALUES = 4096  # that a program holds at once: wider rows are read in pieces
OWNER_MIX, FIRST_MIX, SECOND_MIX = 0xA24BAED4963EE407, 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


@dataclass(frozen=True, slots=True)
class HotTags:
    """The hot rows on the device: keys and owners int64 [S, W], cached uint8 [S · W, E]. An empty way's owner is -1."""

    keys: Tensor
    owners: Tensor
    cached: Tensor


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How D values stand in a row of `stride` bytes. `dtype`: of plain rows. `scale`: the tensor's, for float8_e4m3."""

    kind: Kind
    dim: int
    stride: int
    dtype: torch.dtype = torch.bfloat16
    scale: float = 1.0


def lookup(
    table: Tensor,
    form: RowFormat,
    row_ids: Tensor,
    keys: Tensor,
    owners: Tensor,
    tags: HotTags | None,
    out: Tensor,
    counters: Tensor,
    programs: int,
    seen: Tensor | None = None,
) -> None:
    """table uint8[rows, R] on the device or registered on the host; row_ids[T, C], keys[T, O], owners[O] int64 on the
    device → out[T, C · D]. counters int64[O, 2] grows by the n-grams hit and missed. seen bool[T]: other tokens are
    neither read, written nor counted. `programs`: most programs at once.
    """
    if not runs_on(out):
        reference(table, form, row_ids, keys, owners, tags, out, counters, seen)
        return
    tokens, orders = keys.shape
    count, heads = tokens * orders, row_ids.shape[1] // orders
    held = tags or HotTags(keys, owners, table)
    heads_padded = power_of_two(heads)
    lookup_kernel[(min(count, programs),)](
        table.view(form.dtype) if form.kind == "plain" else table,
        held.cached.view(form.dtype) if form.kind == "plain" and tags else held.cached,
        row_ids,
        keys,
        owners,
        held.keys,
        held.owners,
        seen if seen is not None else counters,
        out,
        counters,
        count,
        tags.keys.shape[0] if tags else 0,
        form.scale,
        KIND=KINDS[form.kind],
        ORDERS=orders,
        ORDERS_PADDED=power_of_two(orders),
        HEADS=heads,
        D=form.dim,
        STRIDE=form.stride // (form.dtype.itemsize if form.kind == "plain" else 1),
        WAYS=tags.keys.shape[1] if tags else 1,
        WAYS_PADDED=power_of_two(tags.keys.shape[1]) if tags else 1,
        HEADS_PADDED=heads_padded,
        BLOCK=block_of(form.dim, heads_padded),
        CACHED=tags is not None,
        MASKED=seen is not None,
        num_warps=4,
    )


def block_of(dim: int, heads: int) -> int:
    """Values of a row that a program reads at once, beside those of the n-gram's other heads."""
    return min(power_of_two(dim), max(32, VALUES // heads))


def reference(
    table: Tensor,
    form: RowFormat,
    row_ids: Tensor,
    keys: Tensor,
    owners: Tensor,
    tags: HotTags | None,
    out: Tensor,
    counters: Tensor,
    seen: Tensor | None = None,
) -> None:
    """The same with torch's operators."""
    tokens, orders = keys.shape
    heads = row_ids.shape[1] // orders
    wanted = torch.ones(tokens, 1, dtype=torch.bool, device=out.device) if seen is None else seen[:, None]
    raw = table[torch.where(wanted, row_ids, 0).to(table.device)].to(out.device).view(tokens, orders, heads, -1)
    hit = torch.zeros(tokens, orders, dtype=torch.bool, device=out.device)
    if tags is not None:
        sets, ways = tags.keys.shape
        where = set_of(owners, keys, sets)
        same = (tags.keys[where] == keys[..., None]) & (tags.owners[where] == owners[:, None])
        hit = same.any(-1)
        slot = where * ways + same.int().argmax(-1)
        raw = torch.where(hit[..., None, None], tags.cached[slot].view_as(raw), raw)
    counters += torch.stack([(hit & wanted).sum(0), (~hit & wanted).sum(0)], dim=1)
    rows = decoded(raw, form).reshape(tokens, -1).to(out.dtype)
    out.copy_(rows if seen is None else torch.where(wanted, rows, out))


def decoded(raw: Tensor, form: RowFormat) -> Tensor:
    """raw uint8[…, R] → [..., D]: the stored type for plain rows, fp32 for the others."""
    dim = form.dim
    if form.kind == "plain":
        return raw[..., : dim * form.dtype.itemsize].contiguous().view(form.dtype)
    if form.kind == "int8":
        return raw[..., :dim].view(torch.int8) * raw[..., dim : dim + 4].contiguous().view(torch.float32)
    values = raw[..., :dim].contiguous().view(torch.float8_e4m3fn).float()
    if form.kind == "float8_e4m3":
        return values * form.scale
    exponent = raw[..., dim : dim + dim // 32].to(torch.float32) - 127
    scale = torch.exp2(exponent).masked_fill(exponent == 128, torch.nan)
    scaled: Tensor = (values.unflatten(-1, (-1, 32)) * scale[..., None]).flatten(-2)
    return scaled


def set_of(owners: Tensor, keys: Tensor, sets: int) -> Tensor:
    """int64[N] the set of each tag: 64-bit mixing, then the upper half scaled to the number of sets."""

    def wrapped(constant: int) -> int:
        return constant - (1 << 64) if constant >> 63 else constant

    def shifted(hashes: Tensor) -> Tensor:
        return hashes >> 32 & 0xFFFFFFFF

    hashes = (keys ^ owners * wrapped(OWNER_MIX)) * wrapped(FIRST_MIX)
    hashes = (hashes ^ shifted(hashes)) * wrapped(SECOND_MIX)
    return (shifted(hashes ^ shifted(hashes)) * sets) >> 32


@jit
def mixed_set(owner, key, sets):
    """The set of one tag, as `set_of`."""
    hashed = (key.to(tl.uint64) ^ (owner.to(tl.uint64) * 0xA24BAED4963EE407)) * 0x9E3779B97F4A7C15
    hashed = (hashed ^ (hashed >> 32)) * 0xD6E8FEB86659FD93
    hashed = hashed ^ (hashed >> 32)
    return (((hashed >> 32) * sets) >> 32).to(tl.int64)


@jit
def e4m3(code):
    """fp32 of e4m3 bytes given as int32: exact, NaN and -0 included. The sign is set, not subtracted: to Triton 3.6 a
    minus is a difference from +0.
    """
    size = code & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return (value.to(tl.int32, bitcast=True) ^ ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@jit
def row_values(
    base, start, first, scale, real, KIND: tl.constexpr, HEADS_PADDED: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """[heads, BLOCK] the values from the first on, of rows that begin at start[heads] from `base`."""
    column = first + tl.arange(0, BLOCK)
    at = base + start[:, None] + column[None, :]
    mask = real[:, None] & (column < D)[None, :]
    if KIND == 0:
        values = tl.load(at, mask=mask, other=0.0)
    else:
        raw = tl.load(at, mask=mask, other=0).to(tl.int32)
        if KIND == 1:
            bits = tl.zeros([HEADS_PADDED], tl.int32)
            for part in tl.static_range(4):
                bits += tl.load(base + start + D + part, mask=real, other=0).to(tl.int32) << (8 * part)
            signed = tl.where(raw > 127, raw - 256, raw).to(tl.float32)
            values = signed * bits.to(tl.float32, bitcast=True)[:, None]
        elif KIND == 2:
            values = e4m3(raw) * scale
        else:
            group = first // 32 + tl.arange(0, BLOCK // 32)
            there = real[:, None] & (group < D // 32)[None, :]
            power = tl.load(base + start[:, None] + D + group[None, :], mask=there, other=0).to(tl.int32)
            block = tl.where(power == 0, 1 << 22, power << 23).to(tl.float32, bitcast=True)
            block = tl.where(power == 255, float("nan"), block)
            scaled = tl.reshape(e4m3(raw), (HEADS_PADDED, BLOCK // 32, 32)) * block[:, :, None]
            values = tl.reshape(scaled, (HEADS_PADDED, BLOCK))
    return values


@jit_for_any("row_ids", "keys", "seen", "count")
def lookup_kernel(
    table, cached, row_ids, keys, owners, tag_keys, tag_owners, seen, out, counters, count, sets, scale,
    KIND: tl.constexpr, ORDERS: tl.constexpr, ORDERS_PADDED: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    STRIDE: tl.constexpr, WAYS: tl.constexpr, WAYS_PADDED: tl.constexpr, HEADS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, CACHED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A program: every P-th n-gram, P programs in all."""
    head, way, column = tl.arange(0, HEADS_PADDED), tl.arange(0, WAYS_PADDED), tl.arange(0, BLOCK)
    order = tl.arange(0, ORDERS_PADDED)
    hits, misses = tl.zeros([ORDERS_PADDED], tl.int64), tl.zeros([ORDERS_PADDED], tl.int64)
    entry = tl.program_id(0)
    while entry < count:
        wide, mine = entry.to(tl.int64), entry % ORDERS
        if MASKED:
            mine = tl.where(tl.load(seen + entry // ORDERS) != 0, mine, -1)
        real = head < tl.where(mine >= 0, HEADS, 0)
        start = tl.load(row_ids + wide * HEADS + head, mask=real, other=0) * STRIDE
        slot = tl.full([], -1, tl.int64)
        if CACHED:
            key, owner = tl.load(keys + wide), tl.load(owners + tl.maximum(mine, 0))
            line = mixed_set(owner, key, sets) * WAYS
            there = way < WAYS
            same = tl.load(tag_keys + line + way, mask=there, other=0) == key
            same = same & (tl.load(tag_owners + line + way, mask=there, other=-1) == owner)
            slot = tl.max(tl.where(same, line + way, -1), 0)
        counted = (order == mine).to(tl.int64)
        at = out + wide * (HEADS * D) + head[:, None] * D + column[None, :]
        if slot >= 0:
            hits += counted
            kept = slot * (HEADS * STRIDE) + head.to(tl.int64) * STRIDE
            for first in tl.static_range(0, D, BLOCK):
                values = row_values(cached, kept, first, scale, real, KIND, HEADS_PADDED, D, BLOCK)
                mask = real[:, None] & (first + column < D)[None, :]
                tl.store(at + first, values.to(out.dtype.element_ty), mask=mask)
        else:
            misses += counted
            for first in tl.static_range(0, D, BLOCK):
                values = row_values(table, start, first, scale, real, KIND, HEADS_PADDED, D, BLOCK)
                mask = real[:, None] & (first + column < D)[None, :]
                tl.store(at + first, values.to(out.dtype.element_ty), mask=mask)
        entry += tl.num_programs(0)
    tl.atomic_add(counters + order * 2, hits, mask=order < ORDERS, sem="relaxed")
    tl.atomic_add(counters + order * 2 + 1, misses, mask=order < ORDERS, sem="relaxed")
