"""Traces of cache lookups for experiments, and what other policies make of them.

    zipf     independent draws, p ∝ rank^-α, over N rows in random order
    drift    the same, after a tenth of the ranks exchanged their rows
    text     the n-grams of real text as the product addresses them: pieces of text in random order, as requests come

Static optimum: the C most likely rows, always: the most that a policy without knowledge of the future can hit when
draws are independent. LRU and Belady (the farthest next use leaves, or does not enter) are simulated exactly.
"""

from __future__ import annotations

import heapq
import sysconfig
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.batch import Ints
from server.memory.addressing import Addresser, windows_of
from server.models.tokenizer import Tokenizer

GCIDE = Path("/usr/share/dictd/gcide.dict.dz")  # gzip with an index, that zlib reads as gzip
WORDNET = Path("/usr/share/wordnet")
PIECE = 256  # tokens of text that come one after another
GZIP = 31  # zlib's window bits for gzip


@dataclass(frozen=True, slots=True)
class Zipf:
    """p ∝ rank^-α over `rows` rows; `order`[r] is the row of rank r."""

    alpha: float
    order: Ints
    cumulative: np.ndarray
    generator: np.random.Generator

    @classmethod
    def of(cls, alpha: float, rows: int, seed: int) -> Zipf:
        generator = np.random.default_rng(seed)
        weights = np.arange(1, rows + 1) ** -alpha
        return cls(alpha, generator.permutation(rows), np.cumsum(weights) / weights.sum(), generator)

    def draw(self, count: int) -> Ints:
        ranks = np.searchsorted(self.cumulative, self.generator.random(count))
        return self.order[np.minimum(ranks, len(self.order) - 1)]

    def drift(self, share: float) -> None:
        """A random share of the ranks exchange their rows."""
        ranks = self.generator.choice(len(self.order), int(share * len(self.order)), replace=False)
        self.order[ranks] = self.order[self.generator.permutation(ranks)]

    def optimum(self, entries: int) -> float:
        return float(self.cumulative[entries - 1])


def texts() -> Iterator[tuple[str, str]]:
    """(name, text) of what real text this system has: dictionaries where installed, Python's own sources always."""
    if WORDNET.is_dir():
        files = sorted(WORDNET.glob("data.*"))
        glosses = (line.partition("| ")[2] for file in files for line in file.read_text("latin-1").splitlines())
        yield "WordNet", "\n".join(gloss for gloss in glosses if gloss)
    if GCIDE.is_file():
        yield "GCIDE", zlib.decompress(GCIDE.read_bytes(), GZIP).decode("utf-8", "replace")
    root = Path(sysconfig.get_path("stdlib"))
    sources = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    yield "Python sources", "\n".join(path.read_text("utf-8", "replace") for path in sources)


def text_keys(text: str, tokenizer: Tokenizer, addresser: Addresser, tokens: int, seed: int = 0) -> Ints:
    """[T, O] the keys that the first memory layer looks up for `tokens` tokens of the text, taken from all over it."""
    characters = 8 * tokens
    stride = max(len(text) // characters, 1)
    spread = text if stride == 1 else "".join(text[at : at + 4096] for at in range(0, len(text), stride * 4096))
    ids = np.array(tokenizer.encode(spread[:characters])[:tokens], np.int64)
    _, mix = addresser.address(*windows_of(ids, addresser.n))[addresser.layer_ids[0]]
    pieces = np.array_split(np.arange(len(ids)), max(len(ids) // PIECE, 1))
    np.random.default_rng(seed).shuffle(pieces)
    return mix[np.concatenate(pieces)]


def distinct(keys: Ints) -> Ints:
    """keys[T, O] → [T · O] numbers from 0, equal where order and key are."""
    numbers = np.empty(keys.shape, np.int64)
    used = 0
    for order in range(keys.shape[1]):
        found, numbers[:, order] = np.unique(keys[:, order], return_inverse=True)
        numbers[:, order] += used
        used += len(found)
    return numbers.reshape(-1)


def fitted_alpha(trace: Ints) -> float:
    """The slope of log frequency over log rank, from the 10th to the 10,000th."""
    counts = np.sort(np.bincount(trace))[::-1][9:10_000]
    counts = counts[counts > 1]
    slope, _ = np.polyfit(np.log(np.arange(10, 10 + len(counts))), np.log(counts), 1)
    return -float(slope)


def lru(trace: Ints, entries: int, windows: list[slice]) -> list[float]:
    """Hit rate in each window of the trace."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = bytearray(len(trace))
    for at, row in enumerate(trace.tolist()):
        if row in cache:
            cache.move_to_end(row)
            hits[at] = 1
        else:
            cache[row] = None
            if len(cache) > entries:
                cache.popitem(last=False)
    return _rates(hits, windows)


def belady(trace: Ints, entries: int, windows: list[slice]) -> list[float]:
    """Hit rate in each window of the trace, with the future known."""
    following = next_uses(trace).tolist()
    cached: dict[int, int] = {}  # row → its next use
    farthest: list[tuple[int, int]] = []  # (-next use, row); entries whose next use has moved on are stale
    hits = bytearray(len(trace))
    for at, (row, use) in enumerate(zip(trace.tolist(), following, strict=True)):
        if row in cached:
            hits[at] = 1
        elif len(cached) >= entries:
            while cached.get(farthest[0][1]) != -farthest[0][0]:
                heapq.heappop(farthest)
            if -farthest[0][0] <= use:
                continue
            del cached[heapq.heappop(farthest)[1]]
        cached[row] = use
        heapq.heappush(farthest, (-use, row))
    return _rates(hits, windows)


def next_uses(trace: Ints) -> Ints:
    """[T] where each row is asked for next; past the end if never again, each place once."""
    order = np.argsort(trace, kind="stable")
    following = np.arange(len(trace), 2 * len(trace))
    same = trace[order[1:]] == trace[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following


def _rates(hits: bytearray, windows: list[slice]) -> list[float]:
    found = np.frombuffer(hits, np.uint8)
    return [float(found[window].mean()) for window in windows]
