"""Sketch: how often each of very many keys was seen lately, in a few bytes per cache entry.

Count-min with conservative update: four rows of 8-bit counters; a key's estimate is the smallest of its four, and only
counters that would fall behind it are raised. An estimate is never below what was added, aged, until it stops at 255.
Knows 64-bit hashes only.

Source: Cormode and Muthukrishnan 2005; conservative update after Estan and Varghese 2002.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]

ROWS = 4
MOST = 255
SMALLEST_WIDTH = 1 << 18  # counters a row: 1 MiB in all, so that a small cache does not learn from noise


class Sketch:
    """At least `width` counters in each of four rows."""

    def __init__(self, width: int) -> None:
        self.width = 1 << (max(width, SMALLEST_WIDTH) - 1).bit_length()
        self._mask = np.uint64(self.width - 1)
        self._rows = np.arange(ROWS, dtype=np.uint64)[:, None]
        self._counters = np.zeros(ROWS * self.width, np.uint8)

    @property
    def nbytes(self) -> int:
        return self._counters.nbytes

    def estimate(self, hashes: Hashes) -> Counts:
        """[N] how often each was seen."""
        lowest: Counts = self._counters[self._places(hashes)].min(0).astype(np.int64)
        return lowest

    def add(self, hashes: Hashes, counts: Counts) -> Counts:
        """Counts distinct hashes[N] once more, counts[N] times each; returns their estimates [N]."""
        places = self._places(hashes)
        raised: Counts = np.minimum(self._counters[places].min(0) + counts, MOST)
        self._raise(places, raised)
        return raised

    def raise_to(self, hashes: Hashes, counts: Counts) -> None:
        """Lets no estimate be below counts[N]: for keys that were counted elsewhere in the meantime."""
        self._raise(self._places(hashes), np.minimum(counts, MOST))

    def halve(self) -> None:
        """Ages every count: what was seen longer ago weighs less."""
        np.right_shift(self._counters, 1, out=self._counters)

    def _places(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """[ROWS, N] by double hashing: the low half plus row · the high half, made odd."""
        high = (hashes >> np.uint64(32)) | np.uint64(1)
        return (((hashes + self._rows * high) & self._mask) + self._rows * np.uint64(self.width)).view(np.int64)

    def _raise(self, places: npt.NDArray[np.int64], counts: Counts) -> None:
        np.maximum.at(self._counters, places, counts.astype(np.uint8)[None])
