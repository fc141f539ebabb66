"""Grammars: which tokens may come next, so that an answer is what a schema, expression or grammar says.

    submit ─► compile ─► mask ─► sampler ─► token ─► accept, next mask ─► …
              └─ threads ─┘                          └──── threads ────┘

Nothing of it happens on the engine's thread. A step waits a moment for masks that were cheap before (20 µs are usual);
a sequence whose mask is not there yet is left out of it, so that a slow grammar slows nobody else. Every sequence has a
compilation of its own: copies of one share a lock, for which the library waits holding Python's. What a grammar may
cost at all is bounded in the library's own units (`limits`), and so by time.

A token means the bytes that the detokeniser shows for it. State follows from the tokens alone: forks begin anew,
and a preempted sequence keeps it. Knows nothing of schedules, text fields or HTTP. The library, llguidance, has its
reasons in docs/adr.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from server.batch import Bools
from server.errors import EngramError, RequestError
from server.runtime.detokeniser import Pieces
from server.runtime.messages import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from server.models.tokenizer import Tokenizer
    from server.runtime.sequence import Sequence

COMPILE_SECONDS = 5.0
# Text that must come is not looked for: where none of it ever ends, as in `start: /a+/ /a+/`, that never ends either.
DIRECTIVE = "%llguidance"
NO_FORCING = DIRECTIVE + ' {"no_forcing": true}\n'
SPECIAL = b"\xff"  # begins no text: llguidance's mark of tokens that are none
MASK_THREADS = 2  # one dear mask does not hold up the cheap ones behind it
DEAR_SECONDS = 0.0005
# How slowly a dear mask is forgotten: after one of 5 ms, steps do not wait for the next 22.
FORGETTING = 0.9
GRACE_SECONDS = 0.002
MOST_ERROR = 300


class Grammars:
    """Compiles grammars for one tokenizer. `tokenizer`: called once, by `prepare` or when the first grammar comes."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer, self.vocab_size, self.eos_ids = tokenizer, vocab_size, tuple(eos_ids)
        self.compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")
        self.masks = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="grammar-masks")
        self._vocabulary: LLTokenizer | None = None

    def prepare(self) -> None:
        """Reads the vocabulary, before there is anyone to wait: the library lets nobody else run meanwhile."""
        with contextlib.suppress(
            EngramError
        ):  # a model without a usable tokenizer; grammars are refused with its error
            self._words()

    def compile(self, grammar: Grammar) -> tuple[LLMatcher, bytes]:
        """The grammar in its first state, and that state's mask. Raises RequestError."""
        from llguidance import LLMatcher

        try:
            definition = definition_of(grammar)
            matcher = LLMatcher(self._words(), definition, limits=limits(), log_level=0)
            mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        except BaseException as error:  # a program in a foreign language: it can fail in any way, and panic
            raise refused(grammar, str(error) or type(error).__name__) from None
        if matcher.is_error():
            raise refused(grammar, matcher.get_error())
        return matcher, mask

    def _words(self) -> LLTokenizer:
        if self._vocabulary is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            words = _Words(self._tokenizer(), self.vocab_size, self.eos_ids)
            self._vocabulary = LLTokenizer(TokenizerWrapper(words), eos_token=list(self.eos_ids) or [self.vocab_size])
        return self._vocabulary


class _Words:
    """The vocabulary as llguidance wants to see it. A model without an end of text gets one behind its last id."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        pieces = Pieces(tokenizer)
        self.tokens = [(SPECIAL if i in tokenizer.special_ids else b"") + pieces[i] for i in range(vocab_size)]
        if not eos_ids:
            self.tokens.append(b"")
        self.eos_token_id = eos_ids[0] if eos_ids else vocab_size
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode
        self._ids = {piece: i for i, piece in reversed([*enumerate(self.tokens)]) if piece}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text that must come. Where the tokenizer's own mean other bytes, the longest pieces."""
        ids = self._encode(text.decode("utf-8", "replace"))
        if b"".join([self.tokens[i] for i in ids]) == text:
            return ids
        ids, at = [], 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._ids), 1)
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids


class Constraint:
    """What one sequence may say next; asked with `settle` before every step.

    `ready`: the next token's mask is there. `complete`: nothing can follow. `error`: the grammar could not go on.
    """

    def __init__(self, grammars: Grammars, grammar: Grammar) -> None:
        self._grammars, self.grammar = grammars, grammar
        self._since = time.monotonic()
        self._matcher: LLMatcher | None = None  # of whichever thread works on `pending`
        self._mask = b""
        self._cost = 0.0
        self._stopped = False
        self.ready = self.complete = False
        self.error: RequestError | None = None
        self.pending: Future[None] | None = grammars.compiler.submit(self._begin)

    @property
    def cheap(self) -> bool:
        """Whether its next mask is worth waiting for."""
        return self.pending is not None and self._matcher is not None and self._cost < DEAR_SECONDS

    def settle(self) -> RequestError | None:
        """Takes what the threads have done; the error, if there is one."""
        if self.pending is None or self.error is not None:
            return self.error
        if self.pending.done():
            error = self.pending.exception()
            if error is not None:  # the library's panics are no Exceptions
                self.error = error if isinstance(error, RequestError) else refused(self.grammar, str(error))
            self.pending, self.complete = None, self._stopped
            self.ready = self.error is None and not self.complete
        elif self._matcher is None and time.monotonic() - self._since > COMPILE_SECONDS:
            self.error = refused(self.grammar, f"it is not compiled after {COMPILE_SECONDS:.0f} s; make it simpler")
        return self.error

    def accept(self, token_id: int) -> None:
        """The sequence said this token."""
        self.ready = False
        self.pending = self._grammars.masks.submit(self._advance, token_id)

    def _begin(self) -> None:
        self._matcher, self._mask = self._grammars.compile(self.grammar)

    def _advance(self, token_id: int) -> None:
        begun, matcher = time.perf_counter(), self._matcher
        assert matcher is not None
        matcher.consume_token(token_id)
        if not matcher.is_error() and not matcher.is_stopped():
            self._mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise refused(self.grammar, matcher.get_error())
        self._stopped = matcher.is_stopped()
        if self._stopped and not matcher.is_accepting():
            raise refused(self.grammar, "it leads to where nothing may follow")
        self._cost = max(time.perf_counter() - begun, FORGETTING * self._cost)

    def mask(self, *, ends: frozenset[int] = frozenset(), ignore_eos: bool = False) -> Bools:
        """[V] which tokens may come next. Those of `ends`, and with `ignore_eos` an end of text, only if no other."""
        assert self.ready
        size = self._grammars.vocab_size
        allowed = np.unpackbits(np.frombuffer(self._mask, np.uint8), count=size, bitorder="little").astype(bool)
        late = [i for i in (ends.union(self._grammars.eos_ids) if ignore_eos else ends) if i < size]
        if late:
            others = allowed.copy()
            others[late] = False
            return others if others.any() else allowed
        return allowed


def constrain_(logits: Tensor, sequences: list[Sequence]) -> None:
    """Rules out, in place, what the grammars of these rows forbid."""
    for row, sequence in zip(logits, sequences, strict=True):
        if sequence.constraint is None:
            continue
        params = sequence.params
        ends = sequence.stop_ids if sequence.generated < params.min_tokens else frozenset()
        allowed = torch.from_numpy(sequence.constraint.mask(ends=ends, ignore_eos=params.ignore_eos))
        row.masked_fill_(~allowed.to(row.device), -torch.inf)


def grace(sequences: Iterable[Sequence]) -> None:
    """Waits a moment for the masks of these sequences that will probably be there at once."""
    waited = [s.constraint.pending for s in sequences if s.constraint is not None and s.constraint.cheap]
    if waited:
        wait([future for future in waited if future is not None], timeout=GRACE_SECONDS)


def rest(sequences: Iterable[Sequence], seconds: float) -> None:
    """Sleeps until one of these sequences' grammars has got further."""
    waited = [s.constraint.pending for s in sequences if s.constraint is not None and s.constraint.pending is not None]
    if waited:
        wait(waited, timeout=seconds, return_when=FIRST_COMPLETED)


def limits() -> LLParserLimits:
    """Some 20 ms to build, 5 ms for a mask, 20 MB of lexer states; real schemas need a hundredth."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=70_000,
        step_max_items=50_000,
        max_items_in_row=10_000,
        max_lexer_states=10_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def definition_of(grammar: Grammar) -> str:
    """In llguidance's own form. Raises ValueError for what cannot be read."""
    from llguidance import LLMatcher, grammar_from

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind != "json":
        if DIRECTIVE in grammar.text:
            raise ValueError(f"the directive {DIRECTIVE} is the server's own")
        return NO_FORCING + grammar_from(grammar.kind, grammar.text)
    options: Any = {"whitespace_pattern": grammar.whitespace, "coerce_one_of": True}
    schema = json.loads(grammar.text)
    return LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=options)


def refused(grammar: Grammar, why: str) -> RequestError:
    """One line."""
    said = " ".join(why.replace("<non-verbose/>", "").split())
    name = {"json": "JSON schema", "regex": "regular expression", "choice": "list of choices"}
    return RequestError(
        f"{grammar.param}: this {name.get(grammar.kind, 'grammar')} cannot be used: {said[:MOST_ERROR]}",
        param=grammar.param.split(".")[0],
    )
