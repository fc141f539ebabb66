"""Sequence: one answer in the making. Its tokens, how far they are computed, the blocks that hold them.

A sequence has no phases. It must catch up `computed` with `len`: by a chunk of prompt, by one token, or, after a
preemption, by everything again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from server.batch import Ints
from server.runtime.messages import FinishReason, Logprobs, SamplingParams
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

    def append(self, token_id: int) -> None:
        """Takes a sampled token and decides whether the sequence ends with it."""
        self.tokens[self.length] = token_id
        self.length += 1
        if token_id in self.stop_ids and self.generated >= self.params.min_tokens:
            self.finish_reason, self.stop_token_id = "stop", token_id
        elif self.generated >= self.params.max_tokens or self.length >= self.max_len:
            self.finish_reason = "length"
