"""Prompts of real text: runs of neighbouring entries of `text/wordnet.txt`, as many words as asked for.

A model's own greedy text repeats itself and would make hit rates meaningless; entries drawn at random would make every
prompt look alike. Knows words, not tokens: an English word is about 1.4 tokens of SmolLM2.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

TEXT = Path(__file__).parent / "text" / "wordnet.txt"


@cache
def entries() -> tuple[str, ...]:
    """One `word: meaning` each."""
    return tuple(TEXT.read_text(encoding="utf-8").splitlines())


def passage(words: int, draw: random.Random) -> str:
    """About `words` words of text, from a place drawn at random."""
    lines, at, count = entries(), draw.randrange(len(entries())), 0
    taken: list[str] = []
    while count < words:
        line = lines[at % len(lines)].split()
        taken.append(" ".join(line[: words - count]))
        count, at = count + len(line), at + 1
    return "\n".join(taken)


def question(draw: random.Random) -> str:
    """What a person might ask about one of the entries."""
    return f"What does “{draw.choice(entries()).partition(':')[0]}” mean? Answer in one sentence."


def mixed_length(draw: random.Random, median: int, longest: int) -> int:
    """A length as lengths are in the wild: lognormal, most near the median, a few ten times as long."""
    return max(1, min(longest, round(draw.lognormvariate(0, 1) * median)))
