"""One token per row of logits, greedy or drawn, without leaving the device: what a decode graph ends with.

    greedy   the largest logit, the first of equals
    drawn    the first token whose cumulative probability, in vocabulary order, passes u(seed, position)
    kept     before a draw: the top_k most likely; of these, those of at least min_p · the best's probability; of
             these, the fewest that hold top_p of what top_k left. Of equals at an edge the first stay.

u is Philox4x32-10 (Salmon et al., SC 2011), the very numbers of `server/runtime/philox.py`: a draw depends on the seed
and the position alone. What is kept is found without sorting: one pass surveys the row and finds a weight above which
all lies that may be kept, few enough to be bisected together (`shortlist.py`); a row too flat for that is bisected
whole (`weights.py`). Rows with penalties, bias or grammars have their logits changed by the sampler first.
Shapes: N rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.language import jit, jit_for_any, runs_on, tl
from kernels.shortlist import compact, drawn, survey
from kernels.weights import above, edge, key_of, weight_of

BLOCK = 4096  # logits at once
LIST = 4096  # of a shortlist
WARPS = 16  # a row's logits lie in L2: several loads of many threads have to be under way


class Filters(NamedTuple):
    """top_k[N] int64 (V or more: all), top_p[N] (1: all) and min_p[N] (0: all) fp32."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def sample(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, filters: Filters | None = None
) -> Tensor:
    """logits[N, V] fp32, temperature[N] (0: greedy), seeds[N], positions[N] int64 → token ids int64 [N]."""
    if not runs_on(logits):
        return reference(logits, temperature, seeds, positions, filters)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    given = filters if filters is not None else Filters(positions, temperature, temperature)  # not read
    room = (len(logits), LIST if filters is not None else 0)
    values = torch.empty(room, dtype=torch.float32, device=logits.device)
    ids = torch.empty(room, dtype=torch.int32, device=logits.device)
    sample_kernel[(len(logits),)](
        logits, temperature, *given, seeds, positions, tokens, values, ids, logits.stride(0), logits.shape[1],
        FILTER=filters is not None, LIST=LIST, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return tokens


def reference(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, filters: Filters | None = None
) -> Tensor:
    """The same with torch's operators and Philox in Python's own integers."""
    tokens = logits.argmax(-1)
    for row, (degree, seed, position) in enumerate(
        zip(temperature.tolist(), seeds.tolist(), positions.tolist(), strict=True)
    ):
        if degree > 0:
            mass = torch.softmax(logits[row] / degree, -1).double()
            if filters is not None:
                top_k, top_p, min_p = (each[row].item() for each in filters)
                mass = mass.where(kept(mass, int(top_k), top_p, min_p), 0.0)
            mass = mass.cumsum(0)
            tokens[row] = torch.searchsorted(mass, uniform(seed, position) * mass[-1:], right=True)[0]
    return tokens.clamp_max(logits.shape[1] - 1)


def kept(mass: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """bool[V] of mass[V]: what the filters leave."""
    ordered, ids = mass.sort(descending=True, stable=True)
    ordered = ordered[:top_k]
    count = max(int((ordered >= min_p * ordered[0]).sum()), 1)
    if top_p < 1:
        before = ordered[:count].cumsum(0) - ordered[:count]
        count = max(int((before < top_p * ordered.sum()).sum()), 1)
    found = torch.zeros(len(mass), dtype=torch.bool, device=mass.device)
    found[ids[:count]] = True
    return found


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, by Philox4x32-10 with the seed as key and the position as counter."""
    low = 0xFFFFFFFF
    counter, key = [position & low, position >> 32 & low, 0, 0], [seed & low, seed >> 32 & low]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second & low, first >> 32 ^ counter[3] ^ key[1], first & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return ((counter[0] << 21) ^ (counter[1] >> 11)) * 2.0**-53


@jit
def uniform_at(seed, position):
    """fp64 in [0, 1), as `uniform`."""
    zero = (position * 0).to(tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, _, _ = tl.philox(seed, low, high, zero, zero, n_rounds=10)
    bits = (a.to(tl.int64) << 21) ^ (b.to(tl.int64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@jit
def edges(at, vocab, peak, degree, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """floor and spare, int64 [1]: keys above `floor` are kept, and the first `spare` of those at it."""
    floor = tl.full([1], -(1 << 31) - 1, tl.int64)
    spare = tl.zeros([1], tl.int64)
    none = degree * 0
    if top_k < vocab:
        count = top_k.to(tl.float64)
        floor = edge(at, vocab, floor, count * 0, count, peak, degree, none, True, BLOCK)
        spare = (count - above(at, vocab, floor, peak, degree, none, True, BLOCK)).to(tl.int64)
    if top_p < 1:
        tied = weight_of(floor, peak, degree)
        held = spare.to(tl.float64) * tied
        limit = (above(at, vocab, floor, peak, degree, none, False, BLOCK) + held) * top_p
        held = tl.where(tied >= min_p, held, 0.0)
        last = edge(at, vocab, floor, held, limit, peak, degree, min_p, False, BLOCK)
        own = weight_of(last, peak, degree)
        over = limit - above(at, vocab, last, peak, degree, min_p, False, BLOCK)
        room = tl.where(own > 0, tl.ceil(over / tl.where(own > 0, own, 1.0)), 1.0 * vocab).to(tl.int64)
        spare = tl.where(last > floor, room, tl.where(last == floor, tl.minimum(spare, room), spare))
        floor = tl.maximum(floor, last)
    return floor, spare


@jit
def kept_weights(at, start, vocab, peak, degree, floor, spare, ties, least, FILTER: tl.constexpr, BLOCK: tl.constexpr):
    """fp64 weights of a block of logits, 0 where they are filtered out, and how many there were at `floor` so far."""
    index = start + tl.arange(0, BLOCK)
    value = tl.load(at + index, mask=index < vocab, other=float("-inf"))
    weight = tl.exp((value - peak) / degree)
    if FILTER:
        key = key_of(value)
        tie = ((key == floor) & (index < vocab)).to(tl.int64)
        inside = (key > floor) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= spare))
        weight = tl.where(inside & (weight >= least), weight, 0.0)
        ties += tl.sum(tie, 0)
    return weight.to(tl.float64), ties


@jit
def drawn_of_row(at, vocab, peak, degree, floor, spare, least, noise, best, FILTER: tl.constexpr, BLOCK: tl.constexpr):
    """The token, of those kept in the whole row, that the noise falls on, as int64 [1]; `best` where rounding lets none
    pass."""
    mass = tl.zeros([1], tl.float64)
    ties = tl.zeros([1], tl.int64)
    for start in range(0, vocab, BLOCK):
        weights, ties = kept_weights(at, start, vocab, peak, degree, floor, spare, ties, least, FILTER, BLOCK)
        mass += tl.sum(weights, 0)
    point = noise * mass
    before = tl.zeros([1], tl.float64)
    ties = tl.zeros([1], tl.int64)
    found = tl.full([1], vocab, tl.int64)
    for start in range(0, vocab, BLOCK):
        weights, ties = kept_weights(at, start, vocab, peak, degree, floor, spare, ties, least, FILTER, BLOCK)
        passed = (before + tl.cumsum(weights, 0) > point) & (weights > 0)
        found = tl.minimum(found, tl.min(tl.where(passed, start + tl.arange(0, BLOCK), vocab), 0))
        before += tl.sum(weights, 0)
    return tl.where(found < vocab, found, best)


@jit_for_any("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
def sample_kernel(
    logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, values, ids, stride, vocab,
    FILTER: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: one row, read three times: its largest value, its mass, the place where the mass passes; or, where
    something is filtered, surveyed and listed in place of the last two."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = logits + row * stride
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    firsts = tl.zeros([BLOCK], tl.int32) + vocab
    for start in range(0, vocab, BLOCK):
        index = start + column
        value = tl.load(at + index, mask=index < vocab, other=float("-inf"))
        firsts = tl.where(value > peaks, index, firsts)
        peaks = tl.maximum(peaks, value)
    peak = tl.max(peaks, 0) + tl.zeros([1], tl.float32)
    best = tl.min(tl.where(peaks == peak, firsts, vocab), 0).to(tl.int64) + tl.zeros([1], tl.int64)
    best = tl.minimum(best, vocab - 1)
    degree = tl.load(temperature + row)
    if degree > 0:
        noise = uniform_at(tl.load(seeds + row), tl.load(positions + row))
        if FILTER:
            most = tl.load(top_k + row)
            share = tl.load(top_p + row)
            least = tl.load(min_p + row)
            floor = tl.full([1], -(1 << 31) - 1, tl.int64)
            spare = tl.zeros([1], tl.int64)
            whole = 1
            if (most < vocab) | (share < 1) | (least > 0):
                level, count, total = survey(at, vocab, peak, degree, most, share, least, BLOCK)
                if (level <= 1) & (count <= LIST):
                    whole = 0
                    mine = row * LIST
                    compact(at, vocab, peak, degree, level, values + mine, ids + mine, BLOCK)
                    best = drawn(
                        values + mine, ids + mine, count, total, vocab, peak, degree, most, share, least, noise, LIST
                    )
                else:
                    floor, spare = edges(at, vocab, peak, degree, most, share, least, BLOCK)
            if whole > 0:
                best = drawn_of_row(at, vocab, peak, degree, floor, spare, least, noise, best, True, BLOCK)
        else:
            best = drawn_of_row(at, vocab, peak, degree, best, best, degree, noise, best, False, BLOCK)
    tl.store(tokens + row + tl.arange(0, 1), best)
