"""Prompts come from the shipped text, in the lengths asked for, the same in every run of one seed."""

from __future__ import annotations

import random
from pathlib import Path

from loadtest.prompts import TEXT, entries, mixed_length, passage, question


def test_the_text_is_shipped_with_its_licence() -> None:
    assert len(entries()) > 3000
    assert "Princeton University" in (TEXT.parent / "LICENSE.wordnet").read_text(encoding="utf-8")
    assert all(": " in entry for entry in entries())


def test_a_passage_has_the_words_asked_for_and_is_drawn() -> None:
    draw = random.Random(0)
    passages = [passage(count, draw) for count in (1, 48, 600)]
    assert [len(text.split()) for text in passages] == [1, 48, 600]
    assert len({passage(48, draw) for _ in range(100)}) > 90


def test_one_seed_draws_the_same_again() -> None:
    again = [[(passage(20, draw), question(draw)) for _ in range(5)] for draw in (random.Random(3), random.Random(3))]
    assert again[0] == again[1]


def test_mixed_lengths_are_mostly_short_and_never_beyond_the_longest() -> None:
    draw = random.Random(0)
    lengths = sorted(mixed_length(draw, 32, 256) for _ in range(2000))
    assert 28 <= lengths[1000] <= 36 and lengths[0] >= 1 and lengths[-1] == 256


def test_the_text_is_no_larger_than_it_needs_to_be() -> None:
    assert Path(TEXT).stat().st_size < 400_000
