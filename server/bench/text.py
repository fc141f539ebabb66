"""Real text for experiments: this installation's own source and its documentation strings, tokenised.

A small model's own greedy text repeats itself; forced tokens of real text keep prompts, windows and hit rates honest.
"""

from __future__ import annotations

import email
import json
import typing
from pathlib import Path

import server
from server.models.tokenizer import Tokenizer


def corpus() -> str:
    """A few hundred kilobytes of English and code that every installation has: Python's own documentation strings."""
    root = Path(server.__file__).parent
    own = "\n".join(path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py")))
    files = [module.__file__ for module in (typing, email, json)]
    return own + "\n".join(Path(file).read_text(encoding="utf-8") for file in files if file)


def prompts(tokenizer: Tokenizer, count: int, length: int, *, overlap: bool = False) -> list[tuple[int, ...]]:
    """`count` distinct pieces of the corpus, `length` tokens each. Raises ValueError if the corpus is too short.

    `overlap`: a piece may begin within the one before it, so that there are more of them.
    """
    ids = tokenizer.encode(corpus())
    if len(ids) < count * (1 if overlap else length) + length:
        raise ValueError(f"the corpus has {len(ids)} tokens and {count} pieces of {length} were wanted")
    stride = len(ids) // count
    return [tuple(ids[i * stride : i * stride + length]) for i in range(count)]
