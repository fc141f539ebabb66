"""The hash's constants: distinct primes for the heads, odd multipliers for the look-backs.

    PrimeWalk().take(base, count)            the next unused primes from `base` on; one walk serves a whole model
    drawn_multipliers(seed, layer, ...)      NumPy's PCG64, one stream a layer (paper, DeepSeek-V4.1, engram-peft)
    split_multipliers(seed, ordinal, ...)    SplitMix64 (Qwen)

Multipliers are odd and at most (2^63 - 1) / vocabulary, so id · multiplier stays below 2^63 and no product or XOR is
ever negative. Knows nothing of configs or tables. Sources: the demo released with arXiv 2601.07372; SplitMix64 as in
Steele, Lea and Flood 2014; Miller-Rabin with the first twelve primes as bases, deterministic below 3.1e23
(Sorenson and Webster 2015).
"""

from __future__ import annotations

import numpy as np

INT64_MAX = 2**63 - 1
MASK64 = 2**64 - 1
LAYER_STRIDE = 10007
GOLDEN = 0x9E3779B97F4A7C15
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(number: int) -> bool:
    if number < 2:
        return False
    for small in WITNESSES:
        if number % small == 0:
            return number == small
    twos = ((number - 1) & -(number - 1)).bit_length() - 1
    odd = (number - 1) >> twos
    return all(_passes(number, witness, odd, twos) for witness in WITNESSES)


def _passes(number: int, witness: int, odd: int, twos: int) -> bool:
    """One round of Miller-Rabin; number - 1 = odd · 2^twos."""
    power = pow(witness, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


class PrimeWalk:
    """Hands out primes, none twice, whatever bases they are asked for from."""

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._reached: dict[int, int] = {}

    def take(self, base: int, count: int) -> tuple[int, ...]:
        """The `count` smallest unused primes from `base` on, ascending; they are used then."""
        last = self._reached.get(base, base - 1)  # all primes from base to here are used
        taken: list[int] = []
        while len(taken) < count:
            last += 1
            if last not in self._used and is_prime(last):
                taken.append(last)
        self._used.update(taken)
        self._reached[base] = last
        return tuple(taken)


def multiplier_bound(vocab: int) -> int:
    """Multipliers are 2r + 1 with r below this."""
    return max(1, INT64_MAX // vocab // 2)


def drawn_multipliers(seed: int, layer: int, count: int, vocab: int) -> tuple[int, ...]:
    """`count` multipliers of one layer; `layer` is the 0-based block index."""
    generator = np.random.default_rng(seed + LAYER_STRIDE * layer)
    drawn = generator.integers(0, multiplier_bound(vocab), size=count, dtype=np.int64)
    return tuple(int(value) * 2 + 1 for value in drawn)


def split_multipliers(seed: int, ordinal: int, count: int, vocab: int) -> tuple[int, ...]:
    """`count` multipliers of one layer; `ordinal` counts the layers that have a table, from 0."""
    start = seed + LAYER_STRIDE * ordinal
    bound = multiplier_bound(vocab)
    return tuple(splitmix64(start + GOLDEN * (place + 1)) % bound * 2 + 1 for place in range(count))


def splitmix64(state: int) -> int:
    """The generator's output for a 64-bit state."""
    mixed = (state + GOLDEN) & MASK64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & MASK64
    return mixed ^ (mixed >> 31)
