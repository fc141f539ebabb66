"""Which n-grams of what a pack was taught, and of what is asked for most, read rows that an edit changes.

An edit changes rows, and a row belongs to every n-gram that is hashed to it: to the same words in other texts, and to
others by chance. Facts are those in the pack's own facts.jsonl; the hot list holds hashes, no words, and gives counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from server.batch import Ints
from server.errors import PackError
from server.memory.addressing import windows_of
from server.memory.attachment import fingerprint
from server.memory.hot_list import hot_list_path, read_hot_list
from server.models.source import ModelSource
from server.training.recall import read_facts
from server.training.start import Opened

FACTS, MOST_FACTS, MOST_NAMED = "facts.jsonl", 20_000, 20
MOST_HOT = 20_000


class SharedRows:
    """Facts and hot list are read when first asked for."""

    def __init__(self, opened: Opened, source: ModelSource) -> None:
        self._opened, self._source = opened, source
        self._facts: list[tuple[str, Ints]] | None = None
        self._read: dict[int, tuple[Ints, Ints, Ints]] = {}

    def with_facts(self, edited: Mapping[int, Ints]) -> dict[str, Any]:
        """How many n-grams of how many facts, and the first of them: the fact's prompt and the n-gram's words."""
        facts = self._load()
        found: dict[tuple[int, int], int] = {}  # (fact, token) → longest n-gram
        for layer, ids in edited.items():
            rows, fact_of, token_of = self._read[layer]
            hit, column = np.nonzero(np.isin(rows, ids))
            lengths = self._lengths()[column]
            for fact, token, length in zip(fact_of[hit], token_of[hit], lengths, strict=True):
                key = int(fact), int(token)
                found[key] = max(found.get(key, 0), int(length))
        decode = self._source.tokenizer.decode
        named = [
            {"fact": facts[fact][0], "ngram": decode(facts[fact][1][max(token + 1 - length, 0) : token + 1].tolist())}
            for (fact, token), length in list(found.items())[:MOST_NAMED]
        ]
        return {"ngrams": len(found), "facts": len({fact for fact, _ in found}), "first": named}

    def with_hot(self, edited: Mapping[int, Ints]) -> dict[str, int] | None:
        """Of the hottest n-grams how many read an edited row; None where no hot list was saved."""
        opened = self._opened
        mark = fingerprint(opened.folder, opened.config.layer_ids)
        try:
            hot = read_hot_list(hot_list_path(mark), mark)
        except PackError:
            hot = None
        if hot is None:
            return None
        looked = shared = 0
        for (layer, order), (keys, _) in hot.lists.items():
            if layer in edited:
                rows = opened.addresser.rows_of_mix(layer, order, keys[:MOST_HOT])
                looked += len(rows)
                shared += int(np.isin(rows, edited[layer]).any(1).sum())
        return {"ngrams": looked, "shared": shared}

    def _lengths(self) -> Ints:
        """[C] the n-gram length behind each column."""
        addresser = self._opened.addresser
        return np.repeat(np.array(addresser.orders), addresser.columns // len(addresser.orders))

    def _load(self) -> list[tuple[str, Ints]]:
        if self._facts is None:
            self._facts = list(self._read_facts())
            parts: dict[int, list[Ints]] = {layer: [] for layer in self._opened.addresser.layer_ids}
            for _, ids in self._facts:
                windows = windows_of(ids, self._opened.addresser.n)
                for layer, (rows, _) in self._opened.addresser.address(*windows).items():
                    parts[layer].append(rows)
            counts = [len(ids) for _, ids in self._facts]
            fact_of = np.repeat(np.arange(len(counts)), counts)
            token_of = np.concatenate([np.arange(count) for count in counts] or [np.empty(0, np.int64)])
            columns = self._opened.addresser.columns
            self._read = {
                layer: (np.concatenate(rows or [np.empty((0, columns), np.int64)]), fact_of, token_of)
                for layer, rows in parts.items()
            }
        return self._facts

    def _read_facts(self) -> list[tuple[str, Ints]]:
        path = self._opened.folder / FACTS
        if not path.is_file():
            return []
        encode, found = self._source.tokenizer.encode, []
        for fact in read_facts(path)[:MOST_FACTS]:
            found.append((fact.prompt, np.array(encode(fact.prompt) + encode(fact.completion), np.int64)))
        return found
