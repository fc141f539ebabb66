"""Admission of missed n-grams into the hot rows: reserve, copy, publish; one program per set.

A newcomer takes the coldest way of its set if it is hotter than what stands there. The way's owner is voided first,
the rows are copied next, and the tag is published last with release order, so that a lookup beside this pass finds
the old entry, nothing, or the whole new one, never a torn row. Who misses reads the table: nothing is always right.

Shapes: M newcomers sorted by set, hottest first within a set; G sets that have some; S sets, W ways, E bytes an entry.
"""

import torch
from torch import Tensor

from kernels.language import jit, power_of_two, runs_on, tl
from kernels.row_lookup import HotTags

EMPTY = -1


def admit(
    table: Tensor,
    tags: HotTags,
    counts: Tensor,
    set_start: Tensor,
    sets: Tensor,
    keys: Tensor,
    owners: Tensor,
    heat: Tensor,
    row_ids: Tensor,
    moves: Tensor,
) -> None:
    """counts int32[S, W]; set_start[G + 1] into the newcomers of sets[G]; keys, owners [M] int64, heat[M] int32,
    row_ids[M, heads]. table uint8[rows, R], registered or on the device. moves int64[2] grows by entries that entered
    and that had to leave.
    """
    if not runs_on(counts):
        reference(table, tags, counts, set_start, sets, keys, owners, heat, row_ids, moves)
        return
    heads, row_bytes = row_ids.shape[1], table.shape[1]
    word = torch.int32 if row_bytes % 4 == 0 else torch.uint8
    words = row_bytes // word.itemsize
    admission_kernel[(len(sets),)](
        table.view(word),
        tags.cached.view(word),
        tags.keys,
        tags.owners,
        counts,
        set_start,
        sets,
        keys,
        owners,
        heat,
        row_ids,
        moves,
        WAYS=counts.shape[1],
        WAYS_PADDED=power_of_two(counts.shape[1]),
        HEADS=heads,
        HEADS_PADDED=power_of_two(heads),
        WORDS=words,
        WORDS_PADDED=power_of_two(words),
    )


def reference(
    table: Tensor,
    tags: HotTags,
    counts: Tensor,
    set_start: Tensor,
    sets: Tensor,
    keys: Tensor,
    owners: Tensor,
    heat: Tensor,
    row_ids: Tensor,
    moves: Tensor,
) -> None:
    """The same with torch's operators, one newcomer after another."""
    ways = counts.shape[1]
    for group, where in enumerate(sets.tolist()):
        for new in range(int(set_start[group]), int(set_start[group + 1])):
            way = int(counts[where].argmin())
            if heat[new] > counts[where, way]:
                moves[1] += int(tags.owners[where, way] != EMPTY)
                moves[0] += 1
                tags.cached[where * ways + way] = table[row_ids[new].to(table.device)].to(tags.cached.device).flatten()
                tags.keys[where, way], tags.owners[where, way] = keys[new], owners[new]
                counts[where, way] = heat[new]


@jit
def admission_kernel(
    table, cached, tag_keys, tag_owners, counts, set_start, sets, keys, owners, heat, row_ids, moves,
    WAYS: tl.constexpr, WAYS_PADDED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr,
):  # fmt: skip
    """A program: the newcomers of one set, in turn."""
    group = tl.program_id(0)
    line = tl.load(sets + group).to(tl.int64) * WAYS
    way, head, column = tl.arange(0, WAYS_PADDED), tl.arange(0, HEADS_PADDED), tl.arange(0, WORDS_PADDED)
    real = (head < HEADS)[:, None] & (column < WORDS)[None, :]
    there = way < WAYS
    # The set's counts stay in registers: a store is not seen by the other threads' loads without a barrier.
    count = tl.load(counts + line + way, mask=there, other=2147483647)
    new = tl.load(set_start + group)
    end = tl.load(set_start + group + 1)
    entered = tl.zeros([], tl.int64)
    left = tl.zeros([], tl.int64)
    while new < end:
        wide = new.to(tl.int64)
        hot = tl.load(heat + wide)
        coldest = tl.min(count, 0)
        if hot > coldest:
            chosen = tl.min(tl.where(count == coldest, way, WAYS_PADDED), 0)
            slot = line + chosen
            held = tl.atomic_xchg(tag_owners + slot, tl.full([], -1, tl.int64), sem="acq_rel")
            left += (held != -1).to(tl.int64)
            entered += 1
            row = tl.load(row_ids + wide * HEADS + head, mask=head < HEADS, other=0).to(tl.int64)
            words = tl.load(table + row[:, None] * WORDS + column[None, :], mask=real, other=0)
            tl.store(cached + (slot * HEADS + head)[:, None] * WORDS + column[None, :], words, mask=real)
            tl.store(tag_keys + slot, tl.load(keys + wide))
            tl.debug_barrier()  # all threads' stores before the one that publishes
            tl.atomic_xchg(tag_owners + slot, tl.load(owners + wide), sem="release")
            count = tl.where(way == chosen, hot, count)
        new += 1
    tl.store(counts + line + way, count, mask=there)
    tl.atomic_add(moves, entered, sem="relaxed")
    tl.atomic_add(moves + 1, left, sem="relaxed")
