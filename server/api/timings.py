"""`memory_trace` and `usage.timings`: what a request cost, and what the memories gave its tokens.

Both are computed only for requests that ask. Times in milliseconds.
"""

from __future__ import annotations

from typing import Any

from server.api.generation import Choice, Delta, Generation
from server.api.logprobs import Spelling


class Trace:
    """One choice's `memory_trace`, in parts as they come: entries of the prompt's tokens, and of the answer's.

    A token's gate is known once the model has read it. It never reads the last token of an answer, which has no entry.
    """

    def __init__(self, choice: Choice, spelling: Spelling) -> None:
        self._spelling, self._prompt_tokens = spelling, len(choice.prompt.token_ids)
        self._ids = list(choice.prompt.token_ids)

    def part(self, delta: Delta) -> dict[str, Any]:
        self._ids += delta.token_ids
        part: dict[str, list[Any]] = {"prompt": [], "tokens": []}
        for position, gates in delta.gates:
            entry = {
                "position": position,
                "token_id": self._ids[position],
                "token": self._spelling(self._ids[position]),
                "memory": [
                    {"memory": memory, "layer": layer, "gate": gate, "ngram": self._ngram(position, length)}
                    for memory, layer, length, gate in gates
                ],
            }
            part["prompt" if position < self._prompt_tokens else "tokens"].append(entry)
        return part

    def _ngram(self, position: int, length: int) -> dict[str, Any]:
        ids = self._ids[position + 1 - length : position + 1]
        return {"text": self._spelling.pieces.text(ids, skip_special=False), "token_ids": ids}


def timings_of(generation: Generation) -> dict[str, Any]:
    """Queue, prefill and TTFT of the choice that began first; the mean time between two tokens over all choices; the
    memories' costs summed over all."""
    begun = [choice for choice in generation.choices if choice.first]
    first = min(begun, key=lambda choice: choice.first, default=None)
    gaps = sum(choice.tokens - 1 for choice in begun if choice.tokens > 1)
    between = sum(choice.last - choice.first for choice in begun if choice.tokens > 1)
    return {
        "queue_ms": _ms(first.queued_s) if first else None,
        "prefill_ms": _ms(first.prefill_s) if first else None,
        "ttft_ms": _ms(first.first - generation.arrival) if first else None,
        "inter_token_ms": _ms(between / gaps) if gaps else None,
        "total_ms": _ms(max((choice.last for choice in begun), default=generation.arrival) - generation.arrival),
        "stall_ms": _ms(sum(choice.cost.stall_s for choice in generation.choices)),
        "rows": sum(choice.cost.rows for choice in generation.choices),
        "hits": round(sum(choice.cost.hits for choice in generation.choices)),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
