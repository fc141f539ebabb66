"""Logits as keys and weights: bisection of a row by the bits of its logits. Helpers of `sampling.py`.

    key      int64 in the order of the fp32 logits
    weight   exp((logit - peak) / degree): the best has 1

Shapes: V vocabulary, read BLOCK at once.
"""

from kernels.language import jit, tl


@jit
def key_of(value):
    """fp32 → int64 in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@jit
def weight_of(key, peak, degree):
    """fp64, of the logit with this key; 0 for what is no logit's."""
    low = key.to(tl.int32)
    value = tl.where(low < 0, low ^ 0x7FFFFFFF, low).to(tl.float32, bitcast=True)
    weight = tl.exp((value - peak) / degree)
    return tl.where(weight <= 1.0, weight, 0.0).to(tl.float64)  # NaN and what lies above the peak


@jit
def above(at, vocab, key, peak, degree, least, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of the logits whose keys lie above `key` and whose weights reach `least`: how many, or their weight; fp64 [1]."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        index = start + column
        value = tl.load(at + index, mask=index < vocab, other=float("-inf"))
        weight = tl.exp((value - peak) / degree)
        chosen = (key_of(value) > key) & (index < vocab) & (weight >= least)
        total += tl.where(chosen, 1.0 if COUNT else weight, 0.0).to(tl.float64)
    return tl.sum(total, 0) + tl.zeros([1], tl.float64)


@jit
def edge(at, vocab, floor, floor_mass, limit, peak, degree, least, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The least key above which there is less than `limit`; int64 [1]. `floor_mass` at `floor` is all that is below."""
    low = tl.full([1], -(1 << 31), tl.int64)
    high = tl.full([1], (1 << 31) - 1, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        measure = above(at, vocab, tl.maximum(middle, floor), peak, degree, least, COUNT, BLOCK)
        measure += tl.where(middle < floor, floor_mass, 0.0)
        fits = measure < limit
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return low
