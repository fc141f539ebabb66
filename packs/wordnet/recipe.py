"""What the memory `packs/wordnet` is taught and measured with, from two Debian packages, by fixed rules.

    facts.jsonl   noun glosses of WordNet (wordnet-base): {"prompt": "headword:", "completion": " gloss"}
    general.txt   entries of GCIDE (dict-gcide), one a line: the general text that perplexity is measured on
    retain.txt    further entries, disjoint from those: the text that training keeps the memory silent on

A fact: a headword of one word in lower-case letters with exactly one noun sense, the first of its synset, whose gloss
is one clause of 3 to 8 words without examples. General text: entries whose headword WordNet does not have, 200 to 1200
characters long. Which of them are taken depends on nothing but the SHA-256 of the headword: the lowest come first.

    python packs/wordnet/recipe.py OUT_FOLDER
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

FACTS, GENERAL, RETAINED = 2048, 64, 340
WORDS_IN_GLOSS = range(3, 9)
CHARACTERS_IN_ENTRY = range(200, 1201)
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def by_hash(headwords: Iterable[str]) -> list[str]:
    return sorted(headwords, key=lambda word: hashlib.sha256(word.encode()).digest())


def index_of(wordnet: Path, part: str) -> dict[str, int]:
    """Lemma → number of its senses in this part of speech."""
    lines = (wordnet / f"index.{part}").read_text(encoding="utf-8").splitlines()
    entries = (line.split() for line in lines if not line.startswith(" "))
    return {entry[0].replace("_", " "): int(entry[2]) for entry in entries}


def glosses(wordnet: Path) -> Iterator[tuple[str, str]]:
    """(first lemma, gloss) of every noun synset."""
    for line in (wordnet / "data.noun").read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            fields, _, gloss = line.partition(" | ")
            yield fields.split()[4].replace("_", " "), gloss.strip()


def facts(wordnet: Path) -> list[dict[str, str]]:
    senses = index_of(wordnet, "noun")
    found = {
        lemma: gloss
        for lemma, gloss in glosses(wordnet)
        if re.fullmatch("[a-z]{3,}", lemma)
        and senses.get(lemma) == 1
        and re.fullmatch(r"[A-Za-z][A-Za-z ,'-]+", gloss)
        and len(gloss.split()) in WORDS_IN_GLOSS
    }
    chosen = by_hash(found)[:FACTS]
    return [{"prompt": f"{word}:", "completion": f" {found[word]}"} for word in chosen]


def gcide(folder: Path) -> Iterator[tuple[str, str]]:
    """(headword, entry on one line) for every word of the dictionary's index."""
    text = gzip.decompress((folder / "gcide.dict.dz").read_bytes())
    for line in (folder / "gcide.index").read_text(encoding="utf-8", errors="replace").splitlines():
        headword, start, length = line.split("\t")[:3]
        entry = text[number(start) : number(start) + number(length)].decode("utf-8", errors="replace")
        yield headword, " ".join(entry.split())


def number(digits: str) -> int:
    """The index's numbers: base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS.index(digit)
    return value


def general(dictionaries: Path, wordnet: Path) -> list[str]:
    known = {lemma for part in ("noun", "verb", "adj", "adv") for lemma in index_of(wordnet, part)}
    found = {
        word: entry
        for word, entry in gcide(dictionaries)
        if word.lower() not in known
        and len(entry) in CHARACTERS_IN_ENTRY
        and entry.lower().startswith(word.lower())  # its own entry, not one that merely mentions it
    }
    return [found[word] for word in by_hash(found)[: GENERAL + RETAINED]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="Debian: wordnet-base")
    parser.add_argument("--dictionaries", type=Path, default=Path("/usr/share/dictd"), help="Debian: dict-gcide")
    given = parser.parse_args()
    for path, package in (
        (given.wordnet / "data.noun", "wordnet-base"),
        (given.dictionaries / "gcide.index", "dict-gcide"),
    ):
        if not path.is_file():
            parser.error(f"{path} is missing; on Debian and Ubuntu: apt install {package}")
    given.out.mkdir(parents=True, exist_ok=True)
    entries = general(given.dictionaries, given.wordnet)
    lines = {
        "facts.jsonl": [json.dumps(fact) for fact in facts(given.wordnet)],
        "general.txt": entries[:GENERAL],
        "retain.txt": entries[GENERAL:],
    }
    for name, content in lines.items():
        (given.out / name).write_text("\n".join(content) + "\n", encoding="utf-8")
        print(f"{given.out / name}: {len(content)} lines")


if __name__ == "__main__":
    main()
