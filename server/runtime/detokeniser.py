"""From token ids to text, one token at a time: never half a character, never the text of a stop string.

A token is a piece of *bytes*; a character may be spread over several tokens, and a token may end in the middle of one.
So pieces are looked up in a table and fed to an incremental UTF-8 decoder: the cost of a token does not depend on
how much text came before, and the text is that of decoding all ids at once, whatever the order of pieces.

    ids ─ pieces ─► UTF-8 decoder ─► held back: may begin a stop string ─► text
                    └ holds the bytes of an unfinished character

Torch-free; runs in the API's process. Knows neither HTTP nor sequences.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.models.tokenizer import Tokenizer

_utf8 = codecs.getincrementaldecoder("utf-8")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """What each token adds to a running text, as bytes; filled as tokens come, shared by all streams."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, bytes] = {}
        decoder = tokenizer.backend.decoder
        self._byte_level = decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"
        self._anchor = [] if self._byte_level else tokenizer.encode("a")[-1:]
        self._anchor_length = len(self._decode([]))
        self.special_ids = tokenizer.special_ids

    def __getitem__(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._piece(token_id)
        return piece

    def text(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of many ids; bytes that form no character become U+FFFD."""
        skip = self.special_ids if skip_special else frozenset()
        return b"".join(self[i] for i in token_ids if i not in skip).decode("utf-8", "replace")

    def _piece(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # a row of the embedding beyond the vocabulary
        if self._byte_level:
            try:
                return bytes([BYTE_OF[character] for character in token])
            except KeyError:
                return token.encode()  # an added token, written as it is
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        # Decoded behind another token: at the start of a text some decoders strip a space that belongs to the piece.
        return self._decode([token_id])[self._anchor_length :].encode()

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(self._anchor + token_ids, skip_special_tokens=False)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_level_alphabet()


class Detokeniser:
    """One answer's text. `push` returns what may be shown now; `matched` is the stop string found, if any.

    Text of the first `min_tokens` tokens is not searched for stop strings. After a match nothing more comes.
    """

    __slots__ = ("_decoder", "_held", "_pieces", "_skip", "include_stop", "matched", "min_tokens", "seen", "stop")

    def __init__(
        self,
        pieces: Pieces,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._pieces = pieces
        self._skip = pieces.special_ids if skip_special else frozenset()
        self._decoder = _utf8("replace")
        self._held = ""
        self.stop, self.include_stop, self.min_tokens = tuple(stop), include_stop, min_tokens
        self.matched: str | None = None
        self.seen = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens."""
        shown = ""
        for token_id in token_ids:
            self.seen += 1
            if token_id not in self._skip:
                shown += self._show(self._decoder.decode(self._pieces[token_id]))
        return shown

    def flush(self) -> str:
        """The answer has ended: what was held back; an unfinished character becomes U+FFFD."""
        shown = self._show(self._decoder.decode(b"", True)) + self._held
        self._held = ""
        return shown

    def _show(self, text: str) -> str:
        if not self.stop or self.seen <= self.min_tokens:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[: at + len(self.matched)] if self.include_stop else text[:at]
        keep = max(_overlap(text, stop) for stop in self.stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
