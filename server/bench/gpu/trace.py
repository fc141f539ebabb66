"""Token ids of real text, stored, so that a bare machine without tokenizers and texts measures on the same tokens.

    text ─ tokenizer ─→ trace.npz: uint16[N]        python -m server.bench.gpu trace --remake

Forced tokens: the sampled token is computed, then replaced by the text's; a model of random weights, and any small
model's greedy text, would repeat itself and make hit rates meaningless. The text is short beside a cache of gibibytes,
so sequences may be told in several *languages*: language k is a permutation of the vocabulary, under which n-grams
repeat within a language exactly as in the text, and no language shares an n-gram with another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from server.batch import Ints

ROOT = Path(__file__).parents[3]
TRACE = Path(__file__).with_name("trace.npz")
TEXTS = ("loadtest/text/wordnet.txt", "packs/wordnet/general.txt")  # definitions of WordNet's, and running text
STEP = 0x9E3779B1  # near it lies the factor whose k-th power makes language k


@dataclass(frozen=True, slots=True)
class Trace:
    """ids[N] of the text in order."""

    ids: npt.NDArray[np.uint16]

    @classmethod
    def stored(cls) -> Trace:
        with np.load(TRACE, allow_pickle=False) as file:
            return cls(file["ids"])

    @property
    def half(self) -> int:
        """Where the second half begins, from which pieces come; what came before may be known to a cache."""
        return len(self.ids) // 2

    def described(self) -> str:
        """One line for people."""
        shares = []
        for order in (2, 3):
            windows = np.lib.stride_tricks.sliding_window_view(self.ids, order)
            shares.append(f"{len(np.unique(windows, axis=0)) / len(windows):.1%} of its {order}-grams are distinct")
        return f"{len(self.ids):,} tokens of {', '.join(TEXTS)}; {', '.join(shares)}"

    def pieces(self, count: int, length: int, vocab: int, *, languages: int = 1, first: int = 0) -> Ints:
        """int64[count, length]: `count` pieces that begin evenly spread over the second half, and wrap around in it.

        Piece i is told in language i mod `languages`. `first` moves all beginnings, for another wave of the same
        sequences. Ids lie below `vocab`.
        """
        size = len(self.ids) - self.half
        spread = np.arange(count) * size // count + first
        ids = self.ids[self.half + (spread[:, None] + np.arange(length)) % size].astype(np.int64)
        return spoken(ids, np.arange(count) % languages, vocab)


def spoken(ids: Ints, language: Ints, vocab: int) -> Ints:
    """ids[B, P] of sequence b in language[b]; language 0 is the text's own where its ids fit the vocabulary.

    Multiplication by a number coprime to the vocabulary is a permutation of it.
    """
    factor = next(step for step in range(STEP % vocab or 1, STEP % vocab + vocab) if np.gcd(step, vocab) == 1)
    factors = np.array([pow(factor, int(k), vocab) for k in language], np.int64)
    told: Ints = (ids % vocab * factors[:, None] + language[:, None] * 7919) % vocab
    return told


def made() -> Trace:
    """The trace anew from its texts, by the default model's tokenizer; needs that installed."""
    from server.models.source import open_source
    from server.settings import DEFAULT_MODEL

    tokenizer = open_source(DEFAULT_MODEL).tokenizer
    ids = [tokenizer.encode((ROOT / text).read_text(encoding="utf-8")) for text in TEXTS]
    return Trace(np.array([each for text in ids for each in text], np.uint16))


def store(trace: Trace, path: Path = TRACE) -> None:
    np.savez_compressed(path, ids=trace.ids)
