"""Redirects: at the places of one name in a prompt, token-id tables read the rows of another name.

    mode           m places, n target tokens           place i reads
    one_to_one     m = n                               target i
    average        any                                 the mean of all targets
    copy           any                                 target i mod n
    left_pad       n < m: pads before; n > m: the last m targets
    right_pad      n < m: pads after; n > m: the first m targets
    auto           one_to_one if m = n, else average

Text, input embedding, n-grams and generated tokens stay as they are. A name is searched in the bytes that the prompt's
tokens stand for, so that it is found however the prompt was given; every token that holds a byte of it is a place. If
the first of them begins with white space, the target is tokenised behind the same. Source: arXiv 2601.10639, knowledge
editing. Torch-free: the API resolves names, the engine sees places and tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from server.errors import RequestError

Mode = Literal["auto", "one_to_one", "average", "copy", "left_pad", "right_pad"]
Places = tuple[tuple[int, tuple[int, ...]], ...]  # (position, the tokens whose mean row is read there)


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where the prompt says `source`, read the rows of `target`; at all occurrences, or the last only."""

    source: str
    target: str
    mode: Mode = "auto"
    last_only: bool = False


def resolve(
    redirects: Sequence[Redirect],
    prompt: Sequence[int],
    *,
    piece: Callable[[int], bytes],
    encode: Callable[[str], list[int]],
    pad: int,
) -> list[Places]:
    """Per redirect, its places in the prompt, ascending. `piece`: a token's bytes; `pad`: the padding modes' token.

    Raises RequestError for a source that is not in the prompt, lengths that one_to_one cannot match, a target without
    tokens, and places that two redirects claim.
    """
    pieces = [piece(token) for token in prompt]
    ends = list(accumulate(map(len, pieces)))
    text = b"".join(pieces)
    claimed: dict[int, str] = {}
    found = []
    for redirect in redirects:
        places: list[tuple[int, tuple[int, ...]]] = []
        for begin, end in occurrences(text, redirect):
            first, last = bisect_right(ends, begin), bisect_left(ends, end)
            lead = text[ends[first] - len(pieces[first]) : begin]
            spaced = lead.decode() if lead.isspace() else ""
            targets = encode(spaced + redirect.target)
            places += zip(range(first, last + 1), assigned(redirect, last + 1 - first, targets, pad), strict=True)
        for position, _ in places:
            if position in claimed:
                raise refusal(
                    f"redirects from {claimed[position]!r} and {redirect.source!r} both claim the prompt's token "
                    f"{position}"
                )
            claimed[position] = redirect.source
        found.append(tuple(places))
    return found


def occurrences(text: bytes, redirect: Redirect) -> list[tuple[int, int]]:
    """Where the source stands, begin and end in bytes, without overlaps."""
    wanted = redirect.source.encode()
    spans: list[tuple[int, int]] = []
    at = text.find(wanted)
    while wanted and at >= 0:
        spans.append((at, at + len(wanted)))
        at = text.find(wanted, at + len(wanted))
    if not spans:
        raise refusal(f"redirect from {redirect.source!r}: the prompt does not contain it")
    return spans[-1:] if redirect.last_only else spans


def assigned(redirect: Redirect, places: int, targets: list[int], pad: int) -> list[tuple[int, ...]]:
    """For each of the places, the tokens it reads."""
    if not targets:
        raise refusal(f"redirect to {redirect.target!r}: it has no tokens")
    mode = redirect.mode
    if mode == "auto":
        mode = "one_to_one" if len(targets) == places else "average"
    if mode == "one_to_one" and len(targets) != places:
        raise refusal(
            f"redirect from {redirect.source!r} takes {places} tokens and {redirect.target!r} {len(targets)}; "
            f"one_to_one needs as many, mode 'average' any number"
        )
    missing = [pad] * (places - len(targets))
    match mode:
        case "average":
            return [tuple(targets)] * places
        case "copy":
            return [(targets[i % len(targets)],) for i in range(places)]
        case "left_pad":
            return [(token,) for token in (missing + targets)[-places:]]
        case _:  # right_pad; one_to_one, where nothing is missing
            return [(token,) for token in (targets + missing)[:places]]


def refusal(message: str) -> RequestError:
    return RequestError(message, param="memory")
