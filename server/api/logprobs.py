"""Log-probabilities in the two shapes OpenAI gives them, completions' parallel lists and chat's objects."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from server.runtime.detokeniser import Pieces
from server.runtime.messages import Logprobs

# JSON has no −inf; a token that a bias or filter ruled out gets this.
LOWEST = -9999.0
_utf8 = codecs.getincrementaldecoder("utf-8")


class Spelling:
    """Tokens as text: their characters, or `bytes:\\xe2\\x80` where a token is no whole character."""

    def __init__(self, pieces: Pieces, *, as_ids: bool = False) -> None:
        self.pieces, self._as_ids = pieces, as_ids

    def __call__(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        piece = self.pieces[token_id]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class CompletionLogprobs:
    """One choice's `logprobs`, in parts as they come. `text_offset` counts characters from the choice's start."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._decoder = _utf8("replace")
        self._offset = 0

    def part(self, token_ids: Iterable[int], entries: Iterable[Logprobs | None]) -> dict[str, Any]:
        """The lists for these tokens; an entry of None (a prompt's first token) has no probability."""
        spell, pieces = self._spelling, self._spelling.pieces
        part: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            part["text_offset"].append(self._offset)
            part["tokens"].append(spell(token_id))
            self._offset += len(self._decoder.decode(pieces[token_id]))
            if entry is None:
                part["token_logprobs"].append(None)
                part["top_logprobs"].append(None)
                continue
            part["token_logprobs"].append(_bounded(entry.logprob))
            alternatives = {spell(i): _bounded(value) for i, value in entry.top}
            alternatives.setdefault(spell(token_id), _bounded(entry.logprob))
            part["top_logprobs"].append(alternatives)
        return part

    def skip(self, token_id: int) -> dict[str, Any]:
        """A token that stands before the echoed text and is no part of it: the one that begins every prompt."""
        return {
            "text_offset": [self._offset],
            "token_logprobs": [None],
            "tokens": [self._spelling(token_id)],
            "top_logprobs": [None],
        }


def joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for part in parts:
        for name, values in part.items():
            whole[name] += values
    return whole


def chat_entries(spelling: Spelling, entries: Iterable[Logprobs]) -> list[dict[str, Any]]:
    """The `content` list of a chat choice's `logprobs`."""
    return [
        {
            **_chat_token(spelling, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_token(spelling, i, value) for i, value in entry.top],
        }
        for entry in entries
    ]


def _chat_token(spelling: Spelling, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": spelling(token_id),
        "logprob": _bounded(logprob),
        "bytes": list(spelling.pieces[token_id]),
    }


def _bounded(logprob: float) -> float:
    return max(logprob, LOWEST)
