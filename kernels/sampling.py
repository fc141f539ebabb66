"""One token per row of logits, greedy or drawn, without leaving the device: what a decode graph ends with.

    greedy   the largest logit, the first of equals
    drawn    the first token whose cumulative probability, in vocabulary order, passes u(seed, position)

u is Philox4x32-10 (Salmon et al., SC 2011), the very numbers of `server/runtime/philox.py`: a draw depends on the seed
and the position alone. Rows with top-k, top-p, min-p or penalties go through the sampler's torch operators instead.
Shapes: N rows, V vocabulary.
"""

import torch
from torch import Tensor

from kernels.language import jit, runs_on, tl

BLOCK = 4096


def sample(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """logits[N, V] fp32, temperature[N] (0: greedy), seeds[N], positions[N] int64 → token ids int64 [N]."""
    if not runs_on(logits):
        return reference(logits, temperature, seeds, positions)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    sample_kernel[(len(logits),)](
        logits, temperature, seeds, positions, tokens, logits.stride(0), logits.shape[1], BLOCK=BLOCK
    )
    return tokens


def reference(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The same with torch's operators and Philox in Python's own integers."""
    tokens = logits.argmax(-1)
    for row, (degree, seed, position) in enumerate(
        zip(temperature.tolist(), seeds.tolist(), positions.tolist(), strict=True)
    ):
        if degree > 0:
            mass = torch.softmax(logits[row] / degree, -1).double().cumsum(0)
            tokens[row] = torch.searchsorted(mass, uniform(seed, position) * mass[-1:], right=True)[0]
    return tokens.clamp_max(logits.shape[1] - 1)


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
def sample_kernel(logits, temperature, seeds, positions, tokens, stride, vocab, BLOCK: tl.constexpr):
    """A program: one row, read three times at most: its largest value, its mass, the place where the mass passes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = logits + row * stride
    peak = tl.full([1], float("-inf"), tl.float32)
    best = tl.zeros([1], tl.int64)
    for start in range(0, vocab, BLOCK):
        index = start + column
        value = tl.load(at + index, mask=index < vocab, other=float("-inf"))
        largest = tl.max(value, 0)
        first = tl.min(tl.where(value == largest, index, vocab), 0)
        best = tl.where(largest > peak, first, best)
        peak = tl.maximum(peak, largest)
    degree = tl.load(temperature + row)
    if degree > 0:
        mass = tl.zeros([1], tl.float64)
        for start in range(0, vocab, BLOCK):
            index = start + column
            value = tl.load(at + index, mask=index < vocab, other=float("-inf"))
            mass += tl.sum(tl.exp((value - peak) / degree).to(tl.float64), 0)
        seed = tl.load(seeds + row)
        position = tl.load(positions + row)
        zero = (position * 0).to(tl.uint32)
        low = (position & 0xFFFFFFFF).to(tl.uint32)
        high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
        a, b, _, _ = tl.philox(seed, low, high, zero, zero, n_rounds=10)
        bits = (a.to(tl.int64) << 21) ^ (b.to(tl.int64) >> 11)
        point = bits.to(tl.float64) * 1.1102230246251565e-16 * mass
        before = tl.zeros([1], tl.float64)
        best = best * 0 + vocab - 1
        for start in range(0, vocab, BLOCK):
            index = start + column
            value = tl.load(at + index, mask=index < vocab, other=float("-inf"))
            share = tl.exp((value - peak) / degree).to(tl.float64)
            total = before + tl.cumsum(share, 0)
            passed = tl.min(tl.where((total > point) & (index < vocab), index, vocab), 0)
            best = tl.minimum(best, passed)
            before += tl.sum(share, 0)
    tl.store(tokens + row + tl.arange(0, 1), best)
