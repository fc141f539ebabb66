"""A row's shortlist: the few logits among which all lie that filters may keep. Helpers of `sampling.py`.

    survey    one pass: the highest of three weights above which enough lies, how many do, and the whole row's mass
    compact   one pass: those logits and their ids, side by side, in the vocabulary's order
    drawn     what the filters leave of them, by bisection, and the one that the noise falls on

Shapes: V vocabulary, read BLOCK at once; LIST the most of a shortlist.
"""

from kernels.language import jit, tl
from kernels.weights import key_of, weight_of


@jit
def survey(at, vocab, peak, degree, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """level fp32 (2: a weight that nothing has, as none of the three would do), count and the row's mass fp64."""
    column = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float64)
    high = tl.zeros([BLOCK], tl.float32)
    middle = tl.zeros([BLOCK], tl.float32)
    low = tl.zeros([BLOCK], tl.float32)
    high_mass = tl.zeros([BLOCK], tl.float32)
    middle_mass = tl.zeros([BLOCK], tl.float32)
    low_mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        index = start + column
        value = tl.load(at + index, mask=index < vocab, other=float("-inf"))
        weight = tl.exp((value - peak) / degree)
        mass += weight.to(tl.float64)
        high += tl.where(weight >= 0.015625, 1.0, 0.0)
        high_mass += tl.where(weight >= 0.015625, weight, 0.0)
        middle += tl.where(weight >= 0.000244140625, 1.0, 0.0)
        middle_mass += tl.where(weight >= 0.000244140625, weight, 0.0)
        low += tl.where(weight >= 9.5367431640625e-07, 1.0, 0.0)
        low_mass += tl.where(weight >= 9.5367431640625e-07, weight, 0.0)
    total = tl.sum(mass, 0)
    level, count = 2.0, tl.sum(low, 0)
    wanted = total * top_p * 1.00001  # the levels' masses are fp32 sums
    if is_enough(count, tl.sum(low_mass, 0), wanted, 9.5367431640625e-07, vocab, top_k, top_p, min_p):
        level = 9.5367431640625e-07
    fewer = tl.sum(middle, 0)
    if is_enough(fewer, tl.sum(middle_mass, 0), wanted, 0.000244140625, vocab, top_k, top_p, min_p):
        level, count = 0.000244140625, fewer
    fewer = tl.sum(high, 0)
    if is_enough(fewer, tl.sum(high_mass, 0), wanted, 0.015625, vocab, top_k, top_p, min_p):
        level, count = 0.015625, fewer
    return level, count, total


@jit
def is_enough(count, mass, wanted, level, vocab, top_k, top_p, min_p):
    """Whether nothing below the level can be kept. top_k's own mass is known only if all of top_k are listed."""
    by_mass = tl.where(top_p < 1, mass >= wanted, level <= min_p)
    return tl.where(top_k < vocab, count >= top_k, by_mass)


@jit
def compact(at, vocab, peak, degree, level, values, ids, BLOCK: tl.constexpr):
    """The logits of at least that weight to values[LIST], their places to ids[LIST]; other threads may read them."""
    column = tl.arange(0, BLOCK)
    found = 0
    for start in range(0, vocab, BLOCK):
        index = start + column
        value = tl.load(at + index, mask=index < vocab, other=float("-inf"))
        listed = (tl.exp((value - peak) / degree) >= level) & (index < vocab)
        here = tl.sum(listed.to(tl.int32), 0)
        if here > 0:
            place = found + tl.cumsum(listed.to(tl.int32), 0) - 1
            tl.store(values + place, value, mask=listed)
            tl.store(ids + place, index, mask=listed)
        found += here
    tl.debug_barrier()


@jit
def edge_of(keys, measures, limit):
    """The least key above which the measures fp64[LIST] make less than `limit`; int64 [1]."""
    low = tl.full([1], -(1 << 31), tl.int64)
    high = tl.full([1], (1 << 31) - 1, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        fits = tl.sum(tl.where(keys > middle, measures, 0.0), 0) < limit
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return low


@jit
def drawn(values, ids, count, total, vocab, peak, degree, top_k, top_p, min_p, noise, LIST: tl.constexpr):
    """The token, of the `count` listed, that the noise in [0, 1) falls on, as int64 [1]. `total`: the row's mass."""
    place = tl.arange(0, LIST)
    listed = place < count
    value = tl.load(values + place, mask=listed, other=float("-inf"))
    keys = tl.where(listed, key_of(value), -(1 << 31) - 1)
    weights = tl.exp((value - peak) / degree)
    kept = listed
    weight = tl.where(kept, weights, 0.0).to(tl.float64)
    if top_k < vocab:
        floor = edge_of(keys, tl.where(listed, 1.0, 0.0).to(tl.float64), top_k.to(tl.float64))
        tie = (keys == floor).to(tl.int64)
        spare = top_k - tl.sum((keys > floor).to(tl.int64), 0)
        kept = (keys > floor) | ((tie > 0) & (tl.cumsum(tie, 0) <= spare))
        weight = tl.where(kept, weight, 0.0)
        total = tl.sum(weight, 0)
    kept = kept & (weights >= min_p)
    weight = tl.where(kept, weight, 0.0)
    if top_p < 1:
        limit = total * top_p
        last = edge_of(keys, weight, limit)
        own = weight_of(last, peak, degree)
        over = limit - tl.sum(tl.where(keys > last, weight, 0.0), 0)
        spare = tl.where(own > 0, tl.ceil(over / tl.where(own > 0, own, 1.0)), 1.0 * LIST).to(tl.int64)
        tie = (kept & (keys == last)).to(tl.int64)
        kept = kept & ((keys > last) | ((tie > 0) & (tl.cumsum(tie, 0) <= spare)))
        weight = tl.where(kept, weight, 0.0)
    passed = (tl.cumsum(weight, 0) > noise * tl.sum(weight, 0)) & (weight > 0)
    first = tl.min(tl.where(passed, place, LIST), 0)
    best = tl.argmax(weight, 0)  # where rounding lets nothing pass
    return tl.load(ids + tl.where(first < LIST, first, best) + tl.arange(0, 1)).to(tl.int64)
