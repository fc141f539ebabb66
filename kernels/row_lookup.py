"""Rows of a step in one launch: probe the hot rows, read hits from device memory and misses from registered host
memory, dequantise, write to staging. No host sync; legal in a CUDA graph.

    keys[N] ─ mix ─→ set ─ compare W tags ─→ hit: cached[set · W + way]        E bytes, an n-gram's heads
                                           └ miss: table[row_ids[N, heads]]    by unified addressing, a row a head

Shapes: N n-grams (tokens times orders), S sets, W ways, heads rows an n-gram, D values and R bytes a row, E = heads ·
R. A persistent grid: `programs` bounds it, so that lookups in the background leave multiprocessors to the forward
pass. Rows must begin at multiples of 16 bytes to be read 16 at a time. The tags are those of
`server/cache/hot_pool.py`, the row types those of `server/cache/row_types.py`; fp8 is decoded by bit arithmetic,
since sm_80 has no conversion.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.language import jit, power_of_two, runs_on, tl

Kind = Literal["plain", "int8", "float8_e4m3", "float8_e4m3_e8m0"]
KINDS: dict[str, int] = {"plain": 0, "int8": 1, "float8_e4m3": 2, "float8_e4m3_e8m0": 3}
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
) -> None:
    """table uint8[rows, R] on the device or registered on the host; row_ids[N, heads], keys[N], owners[N] int64 on the
    device → out[N, heads · D]. counters int64[2] grows by n-grams hit and missed. `programs`: most programs at once.
    """
    if not runs_on(out):
        reference(table, form, row_ids, keys, owners, tags, out, counters)
        return
    count, heads = row_ids.shape
    held = tags or HotTags(keys, owners, table)
    lookup_kernel[(min(count, programs),)](
        table.view(form.dtype) if form.kind == "plain" else table,
        held.cached.view(form.dtype) if form.kind == "plain" and tags else held.cached,
        row_ids,
        keys,
        owners,
        held.keys,
        held.owners,
        out,
        counters,
        count,
        tags.keys.shape[0] if tags else 0,
        form.scale,
        KIND=KINDS[form.kind],
        HEADS=heads,
        D=form.dim,
        STRIDE=form.stride // (form.dtype.itemsize if form.kind == "plain" else 1),
        WAYS=tags.keys.shape[1] if tags else 1,
        WAYS_PADDED=power_of_two(tags.keys.shape[1]) if tags else 1,
        HEADS_PADDED=power_of_two(heads),
        DP=power_of_two(form.dim),
        CACHED=tags is not None,
        num_warps=4,
    )


def reference(
    table: Tensor,
    form: RowFormat,
    row_ids: Tensor,
    keys: Tensor,
    owners: Tensor,
    tags: HotTags | None,
    out: Tensor,
    counters: Tensor,
) -> None:
    """The same with torch's operators."""
    count, heads = row_ids.shape
    raw = table[row_ids.to(table.device)].to(out.device)
    hit = torch.zeros(count, dtype=torch.bool, device=out.device)
    if tags is not None:
        sets, ways = tags.keys.shape
        where = set_of(owners, keys, sets)
        same = (tags.keys[where] == keys[:, None]) & (tags.owners[where] == owners[:, None])
        hit = same.any(1)
        slot = where * ways + same.int().argmax(1)
        raw = torch.where(hit[:, None, None], tags.cached[slot].view(count, heads, -1), raw)
    counters += torch.stack([hit.sum(), (~hit).sum()])
    out.copy_(decoded(raw, form).flatten(1))


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
    """fp32 of e4m3 bytes given as int32: exact, NaN included."""
    size = code & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(code > 127, -value, value)


@jit
def row_values(
    base, start, scale, real, KIND: tl.constexpr, HEADS_PADDED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """[heads, DP] the values of rows that begin at start[heads] from `base`."""
    column = tl.arange(0, DP)
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
            group = tl.arange(0, DP // 32)
            there = real[:, None] & (group < D // 32)[None, :]
            power = tl.load(base + start[:, None] + D + group[None, :], mask=there, other=0).to(tl.int32)
            block = tl.where(power == 0, 1 << 22, power << 23).to(tl.float32, bitcast=True)
            block = tl.where(power == 255, float("nan"), block)
            scaled = tl.reshape(e4m3(raw), (HEADS_PADDED, DP // 32, 32)) * block[:, :, None]
            values = tl.reshape(scaled, (HEADS_PADDED, DP))
    return values


@jit
def lookup_kernel(
    table, cached, row_ids, keys, owners, tag_keys, tag_owners, out, counters, count, sets, scale,
    KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, WAYS: tl.constexpr,
    WAYS_PADDED: tl.constexpr, HEADS_PADDED: tl.constexpr, DP: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """A program: every P-th n-gram, P programs in all."""
    head, way, column = tl.arange(0, HEADS_PADDED), tl.arange(0, WAYS_PADDED), tl.arange(0, DP)
    real = head < HEADS
    hits = tl.zeros([], tl.int64)
    entry = tl.program_id(0)
    while entry < count:
        wide = entry.to(tl.int64)
        start = tl.load(row_ids + wide * HEADS + head, mask=real, other=0) * STRIDE
        slot = tl.full([], -1, tl.int64)
        if CACHED:
            key, owner = tl.load(keys + wide), tl.load(owners + wide)
            line = mixed_set(owner, key, sets) * WAYS
            there = way < WAYS
            same = tl.load(tag_keys + line + way, mask=there, other=0) == key
            same = same & (tl.load(tag_owners + line + way, mask=there, other=-1) == owner)
            slot = tl.max(tl.where(same, line + way, -1), 0)
        at = out + wide * (HEADS * D) + head[:, None] * D + column[None, :]
        mask = real[:, None] & (column < D)[None, :]
        if slot >= 0:
            hits += 1
            kept = slot * (HEADS * STRIDE) + head.to(tl.int64) * STRIDE
            values = row_values(cached, kept, scale, real, KIND, HEADS_PADDED, D, DP)
            tl.store(at, values.to(out.dtype.element_ty), mask=mask)
        else:
            values = row_values(table, start, scale, real, KIND, HEADS_PADDED, D, DP)
            tl.store(at, values.to(out.dtype.element_ty), mask=mask)
        entry += tl.num_programs(0)
    mine = (count - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    tl.atomic_add(counters, hits, sem="relaxed")
    tl.atomic_add(counters + 1, mine - hits, sem="relaxed")
