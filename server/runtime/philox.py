"""Philox4x32-10: one uniform number per (seed, position), the same on every device and in every batch.

A preempted or re-batched sequence goes on undisturbed because its noise depends on nothing else.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), table 2 and §4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox4x32(counter: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Ten rounds on counter[N, 4] under key[N, 2]; words of 32 bits held in uint64. → [N, 4]."""
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key[:, 0], key[:, 1]
    for _ in range(10):
        p0, p1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & LOW, (p0 >> SHIFT) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + np.uint64(W0)) & LOW, (k1 + np.uint64(W1)) & LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """[N] numbers in [0, 1) with 53 random bits, from seeds[N] (64 bits) and positions[N]."""
    zeros = np.zeros_like(positions)
    counter = np.stack([positions & LOW, positions >> SHIFT, zeros, zeros], axis=1)
    key = np.stack([seeds & LOW, seeds >> SHIFT], axis=1)
    words = philox4x32(counter, key)
    bits = (words[:, 0] << np.uint64(21)) ^ (words[:, 1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53
