"""Sequence: one answer in the making. Its tokens, how far they are computed, the blocks that hold them.

A sequence has no phases. It must catch up `computed` with `len`: by a chunk of prompt, by one token, or, after a
preemption, by everything again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from server.batch import Ints
from server.runtime.grammar import Constraint
from server.runtime.messages import FREE, Cost, FinishReason, Gates, Logprobs, SamplingParams
from server.view import MemoryView


@dataclass(slots=True, eq=False)
class Sequence:
    request_id: str
    index: int
    prompt_len: int
    params: SamplingParams
    view: MemoryView
    seed: int
    stop_ids: frozenset[int]
    max_len: int
    arrival: float
    tokens: Ints  # capacity for max_len tokens; [:length] are known
    length: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the published blocks, a prefix of `blocks`
    row: int = -1  # place in the runner's token table while running
    children: list[Sequence] = field(default_factory=list)  # wait for this one's prompt
    cached_tokens: int = 0
    sent: float = 0.0
    first_scheduled: float = 0.0
    first_token: float = 0.0
    preemptions: int = 0
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    constraint: Constraint | None = None
    traced: int = 0  # tokens whose gates are known
    gates: list[Gates] = field(default_factory=list)  # of tokens that no output has told yet
    cost: Cost = FREE

    @classmethod
    def create(
        cls,
        request_id: str,
        index: int,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        view: MemoryView,
        *,
        seed: int,
        eos_ids: tuple[int, ...],
        max_model_len: int,
        arrival: float | None = None,
    ) -> Sequence:
        max_len = min(len(token_ids) + max(params.max_tokens, 1), max_model_len)
        tokens = np.zeros(max(max_len, len(token_ids)), np.int64)
        tokens[: len(token_ids)] = token_ids
        stop_ids = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | frozenset(eos_ids)
        return cls(
            request_id,
            index,
            len(token_ids),
            params,
            view,
            seed,
            stop_ids,
            max_len,
            time.monotonic() if arrival is None else arrival,
            tokens,
            len(token_ids),
        )

    @property
    def pending(self) -> int:
        """Tokens known but not yet computed."""
        return self.length - self.computed

    @property
    def generated(self) -> int:
        return self.length - self.prompt_len

    @property
    def ready(self) -> bool:
        """Whether it can take part in a step: a grammar's next mask may still be in the making."""
        return self.constraint is None or self.constraint.ready

    @property
    def at_limit(self) -> bool:
        """Whether no further token has room in the answer or the context."""
        return self.at_limit_with(0)

    def at_limit_with(self, more: int) -> bool:
        """The same once it has `more` tokens than now."""
        return self.generated + more >= max(self.params.max_tokens, 1) or self.length + more >= self.max_len

    def append(self, token_id: int) -> None:
        """Takes a sampled token and decides whether the sequence ends with it.

        One under a grammar, which may be complete with this token, ends before the next step (`Engine._settle`).
        """
        self.tokens[self.length] = token_id
        self.length += 1
        if token_id in self.stop_ids and self.generated >= self.params.min_tokens:
            self.finish_reason, self.stop_token_id = "stop", token_id
        elif self.constraint is not None:
            self.constraint.accept(token_id)
        elif self.at_limit:
            self.finish_reason = "length"
