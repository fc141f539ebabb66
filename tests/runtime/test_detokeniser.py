"""Texts grow token by token as if decoded at once, and stop strings are found wherever tokens end.

The reference is the tokenizer library's own `decode` of all ids.
"""

from __future__ import annotations

import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from server.models.source import open_source
from server.models.tokenizer import Tokenizer
from server.runtime.detokeniser import Detokeniser, Pieces

TOKENIZER = open_source("builtin:smollm2-135m").tokenizer
PIECES = Pieces(TOKENIZER)
TEXTS = [
    "안녕하세요, 세계!",
    "family: 👨‍👩‍👧‍👦 🇰🇷",
    "naïve café — ½",
    "12345",
    "\x00\x07\t\n\r",
    "ﷺ𝔘𝔫𝔦",
    "日本語と한국어",
]

any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(TEXTS)
any_ids = st.lists(st.integers(0, TOKENIZER.vocab_size + 100), max_size=40)


def streamed(ids: list[int], **options: object) -> tuple[list[str], Detokeniser]:
    detokeniser = Detokeniser(PIECES, **options)  # type: ignore[arg-type]
    parts = []
    for token_id in ids:
        parts.append(detokeniser.push((token_id,)))
        if detokeniser.matched is not None:
            return parts, detokeniser
    return [*parts, detokeniser.flush()], detokeniser


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(text: str) -> None:
    assert "".join(streamed(TOKENIZER.encode(text))[0]) == text


@given(any_ids, st.booleans())
def test_any_ids_give_what_decoding_all_at_once_gives(ids: list[int], skip: bool) -> None:
    parts, _ = streamed(ids, skip_special=skip)
    assert "".join(parts) == TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert PIECES.text(ids, skip_special=skip) == "".join(parts)


@given(any_text)
def test_no_part_holds_half_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert "�" in TOKENIZER.decode(ids) or not any("�" in part for part in streamed(ids)[0])


def test_a_character_spread_over_tokens_comes_whole() -> None:
    ids = TOKENIZER.encode("🇰🇷")
    assert len(ids) > 2
    parts, _ = streamed(ids)
    assert [part for part in parts if part] == ["🇰", "🇷"]


def test_an_unfinished_character_becomes_one_sign_at_the_end() -> None:
    ids = TOKENIZER.encode("ok 🇰")[:-1]
    parts, _ = streamed(ids)
    assert "".join(parts) == TOKENIZER.decode(ids) == "ok �"
    assert parts[-1] == "�"


@given(any_text, st.lists(st.text("abc\n 안", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_text_ends_where_the_first_stop_string_begins(text: str, stops: list[str], include: bool) -> None:
    """Char by char, so that the earliest end of any stop string decides: that is how a reader would find it."""
    ids = [i for character in text for i in TOKENIZER.encode(character)]
    text = TOKENIZER.decode(ids)  # the vocabulary lacks a few bytes
    parts, detokeniser = streamed(ids, stop=stops, include_stop=include)
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert detokeniser.matched is None and "".join(parts) == text
        return
    first_end = min(end for end, _, _ in ends)
    begin = min(begin for end, begin, _ in ends if end == first_end)
    assert "".join(parts) == text[: first_end if include else begin]
    assert detokeniser.matched == text[begin:first_end]


def test_a_stop_string_split_over_tokens_is_never_shown_in_part() -> None:
    ids = [i for word in ("He", "llo", " wor", "ld", "!") for i in TOKENIZER.encode(word)]
    parts, detokeniser = streamed(ids, stop=["o world"])
    assert "".join(parts) == "Hell" and detokeniser.matched == "o world"


def test_what_only_looked_like_a_stop_string_is_shown_after_all() -> None:
    ids = [i for word in ("one", "\n", "two", "\n", "\n") for i in TOKENIZER.encode(word)]
    parts, detokeniser = streamed(ids, stop=["\n\n"])
    assert parts == ["one", "", "\ntwo", "", ""] and detokeniser.matched == "\n\n"


def test_held_text_comes_when_the_answer_ends() -> None:
    parts, _ = streamed(TOKENIZER.encode("done\n"), stop=["\n\n"])
    assert "".join(parts) == "done\n"


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = [i for word in ("a", "\n", "b", "\n", "c") for i in TOKENIZER.encode(word)]
    parts, _ = streamed(ids, stop=["\n"], min_tokens=2)
    assert "".join(parts) == "a\nb"


def test_special_tokens_are_skipped_unless_wanted() -> None:
    ids = TOKENIZER.encode("<|im_start|>user<|im_end|>")
    assert "".join(streamed(ids)[0]) == "user"
    assert "".join(streamed(ids, skip_special=False)[0]) == "<|im_start|>user<|im_end|>"


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """The decoder of Llama 2: spaces as U+2581, unknown characters as byte tokens, a space stripped at the start."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "cat", "▁cat", "a", "▁a"]
    backend = Backend(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, (0,))


def test_sentencepiece_tokens_keep_their_spaces_and_join_their_bytes(sentencepiece: Tokenizer) -> None:
    pieces = Pieces(sentencepiece)
    ids = [sentencepiece.backend.token_to_id(t) for t in ("▁the", "▁cat", "<0xEC>", "<0x95>", "<0x88>", "cat")]
    detokeniser = Detokeniser(pieces)
    parts = [detokeniser.push((i,)) for i in ids]
    assert parts == [" the", " cat", "", "", "안", "cat"]
    assert "".join(parts).removeprefix(" ") == sentencepiece.decode(ids)


def test_a_token_costs_the_same_late_in_a_text() -> None:
    """Within 3x: the clock of a busy machine is coarse; a cost that grows with the text would differ by 1000x."""
    ids = TOKENIZER.encode("The quick brown 여우 jumps. ") * 2000
    detokeniser = Detokeniser(PIECES, stop=["never seen"])

    def hundred(start: int) -> float:
        return min(
            timeit.repeat(lambda: [detokeniser.push((i,)) for i in ids[start : start + 100]], number=1, repeat=5)
        )

    early = hundred(0)
    for token_id in ids:
        detokeniser.push((token_id,))
    assert hundred(10_000) < 3 * early
