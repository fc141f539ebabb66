"""What a memory is taught: examples of token ids, and how they go together in batches.

    JSONL   {"prompt": "...", "completion": "..."}   the completion and an end token are learnt, the prompt is read
    text    anything else, UTF-8                     every token is learnt, in pieces

Prompt and completion are tokenised apart, since that is how a server continues a prompt. Batches hold sequences of
like length, in an order that depends on seed and epoch alone. Knows tokenizers and files; nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.batch import Ints
from server.errors import PackError
from server.json_text import parsed

PIECE = 256  # tokens of a text that are read together
BUCKET = 8  # batches' worth of sequences that are sorted by length together

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Example:
    """ids[T]; the tokens from `learnt` on are to be foretold (at least 1: the first token follows nothing)."""

    ids: Ints
    learnt: int

    @property
    def labels(self) -> int:
        return len(self.ids) - self.learnt


def read_examples(path: Path, encode: Encode, end: int | None, max_len: int) -> list[Example]:
    """The examples of a JSONL of prompts and completions, or of a text. `end`: token after a completion.

    Raises PackError, with the line, for data that is unreadable, misshapen, too long or holds nothing to learn.
    """
    if path.suffix == ".jsonl":
        examples = [example_of(line, number, path, encode, end) for number, line in lines_of(path)]
        for (number, _), example in zip(lines_of(path), examples, strict=True):
            if len(example.ids) > max_len:
                raise PackError(
                    f"--data {path}, line {number} has {len(example.ids)} tokens; the model reads {max_len}: shorten it"
                )
        found = [example for example in examples if example.labels > 0]
    else:
        found = pieces_of(read_text(path, "--data"), encode, min(PIECE, max_len))
    if not found:
        raise PackError(f"--data {path} tokenises to nothing that could be learnt; give it some text")
    return found


def example_of(line: str, number: int, path: Path, encode: Encode, end: int | None) -> Example:
    try:
        entry = parsed(line)
        prompt, completion = entry["prompt"], entry["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise PackError(
            f'--data {path}, line {number} is no {{"prompt": "...", "completion": "..."}}: {line[:60]!r}'
        ) from None
    before, after = encode(prompt), encode(completion)
    if after and end is not None:
        after = [*after, end]
    return Example(np.array(before + after, np.int64), max(len(before), 1))


def lines_of(path: Path) -> list[tuple[int, str]]:
    lines = read_text(path, "--data").splitlines()
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_text(path: Path, flag: str) -> str:
    """Raises PackError naming the flag for a file that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(f"{flag} {path} is no readable UTF-8 text: {error}") from None


def pieces_of(text: str, encode: Encode, length: int) -> list[Example]:
    """One line after another, each in pieces of at most `length` tokens; pieces of one token teach nothing."""
    found = []
    for paragraph in text.splitlines():
        ids = np.array(encode(paragraph), np.int64)
        found += [Example(ids[at : at + length], 1) for at in range(0, len(ids), length)]
    return [example for example in found if example.labels > 0]


def epoch_batches(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[Ints]:
    """Indices of all sequences, in batches of at most `batch_tokens` tokens (one sequence at least).

    Shuffled, sorted by length within groups of some batches' worth, cut, and the batches shuffled.
    """
    sizes = np.asarray(lengths)
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(len(sizes))
    group = max(1, BUCKET * batch_tokens // max(1, int(sizes.mean())))
    batches: list[Ints] = []
    for at in range(0, len(order), group):
        members = order[at : at + group]
        members = members[np.argsort(sizes[members], kind="stable")]
        batches += list(cut(members, sizes, batch_tokens))
    return [batches[index] for index in generator.permutation(len(batches))]


def cut(members: Ints, sizes: Ints, batch_tokens: int) -> Iterator[Ints]:
    start, held = 0, 0
    for at, size in enumerate(sizes[members]):
        if held and held + size > batch_tokens:
            yield members[start:at]
            start, held = at, 0
        held += int(size)
    if held:
        yield members[start:]


def digest(*groups: Sequence[Example]) -> str:
    """SHA-256 of everything that is learnt and kept: what a checkpoint belongs to."""
    found = hashlib.sha256()
    for group in groups:
        found.update(f"{len(group)};".encode())
        for example in group:
            found.update(f"{len(example.ids)},{example.learnt};".encode() + example.ids.astype("<i8").tobytes())
    return found.hexdigest()
