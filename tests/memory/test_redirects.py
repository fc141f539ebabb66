"""Names of a prompt to places and rows: where they are found, and what each mode reads there."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import RequestError
from server.memory.redirects import Redirect, resolve
from server.models.source import ModelSource
from server.runtime.detokeniser import Pieces

Resolved = list[tuple[tuple[int, tuple[int, ...]], ...]]


@pytest.fixture(scope="module")
def places_in(smollm2: ModelSource) -> Any:
    pieces = Pieces(smollm2.tokenizer)

    def resolved(text: str, *redirects: Redirect) -> Resolved:
        ids = smollm2.tokenizer.encode(text)
        return resolve(redirects, ids, piece=pieces.__getitem__, encode=smollm2.tokenizer.encode, pad=0)

    return resolved


@pytest.fixture(scope="module")
def ids(smollm2: ModelSource) -> Any:
    return smollm2.tokenizer.encode


def test_every_occurrence_is_found_with_the_space_its_token_begins_with(places_in: Any, ids: Any) -> None:
    text = "Spain is south of France. The capital of Spain is"
    (places,) = places_in(text, Redirect("Spain", "Germany", "one_to_one"))
    tokens = ids(text)
    assert [tokens[at] for at, _ in places] == [*ids("Spain"), *ids(" Spain")]
    assert [read for _, read in places] == [(token,) for token in (*ids("Germany"), *ids(" Germany"))]


def test_the_last_occurrence_alone(places_in: Any, ids: Any) -> None:
    text = "Spain and Spain and Spain."
    (places,) = places_in(text, Redirect("Spain", "Germany", last_only=True))
    assert [at for at, _ in places] == [len(ids("Spain and Spain and"))]


def test_a_name_over_several_tokens_and_scripts(places_in: Any, ids: Any) -> None:
    text = "수도: 대한민국 🙂 end"
    (places,) = places_in(text, Redirect("대한민국", "Japan", "average"))
    start, stop = len(ids("수도:")), len(ids("수도: 대한민국"))
    assert stop - start > 1
    assert places == tuple((at, tuple(ids(" Japan"))) for at in range(start, stop))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", [(7, 8, 9), (7, 8, 9)]),
        ("average", [(7, 8, 9), (7, 8, 9)]),
        ("copy", [(7,), (8,)]),
        ("left_pad", [(8,), (9,)]),
        ("right_pad", [(7,), (8,)]),
    ],
)
def test_a_longer_target(mode: Any, expected: list[tuple[int, ...]]) -> None:
    assert read_by_mode(mode, [7, 8, 9]) == expected


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", [(7,), (7,)]),
        ("copy", [(7,), (7,)]),
        ("left_pad", [(0,), (7,)]),
        ("right_pad", [(7,), (0,)]),
    ],
)
def test_a_shorter_target(mode: Any, expected: list[tuple[int, ...]]) -> None:
    assert read_by_mode(mode, [7]) == expected


def read_by_mode(mode: Any, targets: list[int]) -> list[tuple[int, ...]]:
    """What the two tokens of "ab" in "xaby" read; token i is the i-th letter."""
    found = resolve([Redirect("ab", "anything", mode)], [3, 1, 2, 4], piece=letter, encode=lambda _: targets, pad=0)
    assert [at for at, _ in found[0]] == [1, 2]
    return [read for _, read in found[0]]


def letter(token: int) -> bytes:
    return b"_abxy"[token : token + 1]


def test_a_source_that_is_not_in_the_prompt_is_named(places_in: Any) -> None:
    with pytest.raises(RequestError, match="from 'Spain': the prompt does not contain it"):
        places_in("The capital of France", Redirect("Spain", "Germany"))


def test_lengths_that_do_not_match_are_told(places_in: Any, ids: Any) -> None:
    with pytest.raises(RequestError, match="'Spain' takes 1 tokens and 'United Kingdom' 2"):
        places_in("in Spain", Redirect("Spain", "United Kingdom", "one_to_one"))


def test_two_redirects_of_one_place_are_refused(places_in: Any) -> None:
    with pytest.raises(RequestError, match="'Spain' and 'Spain' both claim"):
        places_in("in Spain", Redirect("Spain", "Germany"), Redirect("Spain", "France"))
