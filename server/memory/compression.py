"""Compression map: tokens that read alike share one id, so that " The", "the" and "THE" address the same rows.

    compression_map(tokenizer) -> int32[V]      raw id -> compressed id; ids past V have no entry

For each raw id in order: decode it alone, special tokens included. Text with U+FFFD (a piece of a character) is keyed
by the raw token string; other text by its normal form, or by itself where that is empty. A key's id is its place in
the order of first appearance. Every multiplier of the hash derives from the number of keys, so the map must be exact:
it is decoded by the Rust tokenizer itself, without the clean-up some wrappers add.

Holes: an id below V that names no token decodes to nothing, so all holes share the key of the empty text. V counts
tokens, so where there are holes the highest ids have no entry; addressers take such ids as blocked.

Knows tokenizers, nothing of tables. Source: the demo released with arXiv 2601.07372 (tokenizer compression).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, normalizers

from server.errors import PackError

REPLACEMENT = "\ufffd"
LONE_SPACE = "\ue000"  # private use; keeps a token that is one space from being stripped to nothing


def compression_map(tokenizer: Any) -> npt.NDArray[np.int32]:
    """Raw id → compressed id, [V] for V tokens, added tokens included.

    `tokenizer`: a `tokenizers.Tokenizer`, or anything holding one as `backend` or `backend_tokenizer`.
    Raises PackError for a tokenizer without one.
    """
    backend = rust_backend(tokenizer)
    return _map_of(backend, backend.get_vocab_size(with_added_tokens=True))


@lru_cache(maxsize=4)
def _map_of(backend: Tokenizer, size: int) -> npt.NDArray[np.int32]:
    """The map, read-only, made once per tokenizer: it takes a second of pure Python."""
    ids = range(size)
    texts = backend.decode_batch([[token_id] for token_id in ids], skip_special_tokens=False)
    normalize = normal_form().normalize_str
    seen: dict[str, int] = {}
    mapping = np.empty(len(texts), np.int32)
    for token_id, text in enumerate(texts):
        key = backend.id_to_token(token_id) or "" if REPLACEMENT in text else normalize(text) or text
        mapping[token_id] = seen.setdefault(key, len(seen))
    mapping.flags.writeable = False
    return mapping


def map_sha256(mapping: npt.NDArray[np.int32]) -> str:
    """SHA-256 (hexadecimal) of the map as little-endian int32: the form in which released tables pin theirs."""
    return hashlib.sha256(mapping.astype("<i4").tobytes()).hexdigest()


def rust_backend(tokenizer: Any) -> Tokenizer:
    """The `tokenizers.Tokenizer` inside. Raises PackError where there is none."""
    for candidate in (tokenizer, getattr(tokenizer, "backend_tokenizer", None), getattr(tokenizer, "backend", None)):
        if isinstance(candidate, Tokenizer):
            return candidate
    raise PackError(
        f"a {type(tokenizer).__name__} holds no Rust tokenizer; hashed memories need a model with a tokenizer.json"
    )


def normal_form() -> normalizers.Normalizer:
    """Compatibility forms, accents, case and runs of white space made alike; one space stays one space."""
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(LONE_SPACE, " "),
        ]
    )
