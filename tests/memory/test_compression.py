"""Compression against an implementation that shares nothing with it: unicodedata and re, one id at a time."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from server.errors import PackError
from server.memory.compression import compression_map, map_sha256
from server.models.source import ModelSource

TEXTS = [
    *("The", " The", " THE", "the", "\u00e9", "e", " \u00c9", "\ufb01", "fi", "ﬁ ", "\uff21", "a", "İ", "i"),
    *(" ", "  ", "\n", "\t \r\n", "\u00a0", "\u3000", "", "x\ty", "x  y", "x \n y", "\u0301", "\u0903"),
    *("한", "\u1112\u1161\u11ab", "한국", "ㅎ", "🙂", " 🙂", "👩‍👩‍👧", "Σ", "ς", "σ", "ẞ", "ß", "ss", "½", "1\u20442"),
]


def byte_level(text: bytes) -> str:
    """The printable stand-in that byte-level vocabularies use, one character a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return "".join(table[byte] for byte in text)


def small_tokenizer() -> Tokenizer:
    """Byte-level: whole texts, then pieces of characters that decode to nothing readable, then added tokens."""
    pieces = [text.encode() for text in dict.fromkeys(TEXTS) if text]
    pieces += [b"\xf0\x9f", b"\x99\x82", b"\xed\x95", b"\x9c", b" \xe2\x80", b"\xe2\x80"]
    vocab = {byte_level(piece): index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|END|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("Zurich"), AddedToken("zurich")])
    return tokenizer


# Unicode's White_Space; str.strip() alone would also take the separators U+001C to U+001F.
WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")


def slow_normal_form(text: str) -> str:
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if not unicodedata.category(c).startswith("M"))
    text = "".join(c.lower() for c in text)  # letter by letter: no rule for a final sigma
    text = re.sub(r"[ \t\r\n]+", " ", text)
    if text == " ":
        return text
    return text.strip(WHITE)


def slow_map(tokenizer: Tokenizer) -> list[int]:
    keys: list[str] = []
    places: dict[str, int] = {}
    for token_id in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if "\ufffd" in text:
            keys.append(str(tokenizer.id_to_token(token_id)))
        else:
            keys.append(slow_normal_form(text) or text)
        places.setdefault(keys[-1], len(places))
    return [places[key] for key in keys]


def test_every_kind_of_text_shares_its_id_as_the_slow_way_says() -> None:
    tokenizer = small_tokenizer()
    assert compression_map(tokenizer).tolist() == slow_map(tokenizer)


def test_tokens_that_read_alike_share_an_id_and_others_do_not() -> None:
    tokenizer, of = small_tokenizer(), {}
    mapping = compression_map(tokenizer)
    for text in filter(None, TEXTS):
        of[text] = int(mapping[tokenizer.token_to_id(byte_level(text.encode()))])
    assert of["The"] == of[" The"] == of[" THE"] == of["the"]
    assert of["\u00e9"] == of["e"] == of[" \u00c9"]
    assert of["한"] == of["\u1112\u1161\u11ab"] != of["한국"]
    assert of["🙂"] == of[" 🙂"] != of["👩‍👩‍👧"]
    assert of[" "] == of["  "] == of["\n"] == of["\u00a0"] == of["\u3000"] != of["\u0301"]
    assert of["x\ty"] == of["x  y"] == of["x \n y"]
    assert of["Σ"] == of["σ"] != of["ς"]


def test_pieces_of_characters_are_told_apart_by_their_raw_token() -> None:
    tokenizer = small_tokenizer()
    mapping = compression_map(tokenizer)
    pieces = [b"\xf0\x9f", b"\x99\x82", b"\xed\x95", b"\x9c", b" \xe2\x80", b"\xe2\x80"]
    assert len({int(mapping[tokenizer.token_to_id(byte_level(piece))]) for piece in pieces}) == len(pieces)


def test_added_tokens_are_compressed_too() -> None:
    tokenizer = small_tokenizer()
    mapping = compression_map(tokenizer)
    assert len(mapping) == len(tokenizer.get_vocab(with_added_tokens=True))
    assert mapping[tokenizer.token_to_id("<|END|>")] == mapping[tokenizer.token_to_id("<|end|>")]
    assert mapping[tokenizer.token_to_id("Zurich")] == mapping[tokenizer.token_to_id("zurich")]


def test_ids_are_given_in_order_of_first_appearance(smollm2: ModelSource) -> None:
    mapping = compression_map(smollm2.tokenizer.backend)
    assert mapping.dtype == np.int32
    _, first = np.unique(mapping, return_index=True)
    assert (np.diff(first) > 0).all()
    assert mapping[0] == 0


def test_the_default_model_compresses_as_the_slow_way_says(smollm2: ModelSource) -> None:
    backend = smollm2.tokenizer.backend
    mapping, slow = compression_map(backend), np.array(slow_map(backend))
    assert len(mapping) == 49_152
    assert (mapping == slow).all()
    assert mapping.max() + 1 < 0.77 * len(mapping)  # the paper's vocabulary lost 23 %; this one loses more


def test_wrapped_tokenizers_give_the_map_of_the_tokenizer_inside() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = small_tokenizer()
    expected = compression_map(tokenizer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)
    assert (compression_map(fast) == expected).all()
    assert (compression_map(SimpleNamespace(backend=tokenizer)) == expected).all()


def test_what_holds_no_rust_tokenizer_is_refused() -> None:
    with pytest.raises(PackError, match="SimpleNamespace holds no Rust tokenizer"):
        compression_map(SimpleNamespace(backend="tokenizers"))


def test_holes_in_the_vocabulary_share_the_id_of_the_empty_text() -> None:
    content = json.loads(small_tokenizer().to_str())
    vocab = content["model"]["vocab"]
    removed = [text for text in ("a", "e") if vocab.pop(byte_level(text.encode())) is not None]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    mapping = compression_map(tokenizer)
    holes = [i for i in range(len(mapping)) if tokenizer.id_to_token(i) is None]
    assert len(holes) == len(removed) == 2
    assert len({int(mapping[hole]) for hole in holes}) == 1
    assert mapping.tolist() == slow_map(tokenizer)


def test_the_pin_is_the_digest_of_little_endian_int32() -> None:
    mapping = np.array([0, 1, 1, 70_000], np.int32)
    assert map_sha256(mapping) == hashlib.sha256(struct.pack("<4i", 0, 1, 1, 70_000)).hexdigest()
    assert map_sha256(mapping.astype(">i4")) == map_sha256(mapping)  # type: ignore[arg-type]
