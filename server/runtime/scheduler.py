"""The scheduler: which tokens the next step computes.

One budget of tokens per step covers decode, chunked prefill and recompute alike: a sequence is only ever behind by
some number of tokens. Running sequences come first, oldest first; what is left of the budget admits waiting ones in
order of arrival. Whoever waits for a grammar is left out. When no block is free, the youngest running sequence gives
its blocks back and waits again; its blocks stay in the prefix cache until someone needs them.

Knows blocks, lengths and budgets; nothing of tensors, text or clients.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.runtime.blocks import BlockPool, chain
from server.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the next `tokens` tokens of `sequence`, from `start` on."""

    sequence: Sequence
    start: int
    tokens: int

    @property
    def completes(self) -> bool:
        """Whether this step reaches the sequence's last known token, so that the next one can be sampled."""
        return self.start + self.tokens == self.sequence.length


class Scheduler:
    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs, self.budget = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self._short = False  # whether blocks were missing for the first who waits, and none has been freed since
        self.on_start: Callable[[Sequence], None] = lambda sequence: None

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. The KV plan guarantees that one of full length fits (`capacity.plan_kv`)."""
        assert -(-sequence.max_len // self.pool.block_size) <= self.pool.usable
        self.waiting.append(sequence)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def can_admit(self) -> bool:
        """Whether the next `schedule` may take in someone who waits."""
        return bool(self.waiting) and len(self.running) < self.max_num_seqs and not self._short

    def schedule(self) -> list[Work]:
        """The next step's work: sequences with one token first, then chunks. Empty if nothing can run."""
        budget = self.budget
        works: list[Work] = []
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            if not sequence.ready:
                index += 1
                continue
            tokens = min(sequence.pending, budget)
            if not self._grow(sequence, tokens):
                continue  # `running` became shorter; if the sequence itself went, `index` is past the end
            works.append(Work(sequence, sequence.computed, tokens))
            budget -= tokens
            index += 1
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            ready = next((sequence for sequence in self.waiting if sequence.ready), None)
            work = self._admit(ready, budget) if ready is not None else None
            if work is None:
                break
            works.append(work)
            budget -= work.tokens
        works.sort(key=lambda work: work.tokens > 1)
        return works

    def ahead(self, works: list[Work]) -> list[Work] | None:
        """What follows decode works that are still being computed: a token more of each sequence that may go on.

        Takes the blocks for it. None, and nothing is changed, if none goes on or blocks are short.
        """
        size = self.pool.block_size
        sequences = [s for work in works if not (s := work.sequence).at_limit_with(1)]
        missing = [-(-(s.length + 1) // size) - len(s.blocks) for s in sequences]
        taken = self.pool.allocate(sum(missing)) if sequences else None
        if taken is None:
            return None
        for sequence, count in zip(sequences, missing, strict=True):
            sequence.blocks += [taken.pop() for _ in range(count)]
        return [Work(sequence, sequence.length, 1) for sequence in sequences]

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for `tokens` more; preempts the youngest if there are none. False if `running` changed instead."""
        missing = -(-(sequence.computed + tokens) // self.pool.block_size) - len(sequence.blocks)
        if missing <= 0:
            return True
        blocks = self.pool.allocate(missing)
        if blocks is None:
            self._preempt(self.running[-1])
            return False
        sequence.blocks += blocks
        return True

    def _admit(self, sequence: Sequence, budget: int) -> Work | None:
        known = sequence.tokens[: sequence.length]
        scored = sequence.params.prompt_logprobs and len(sequence.prompt_logprobs) < sequence.prompt_len
        matched, hashes = ([], []) if scored or sequence.params.trace else self.pool.match(sequence.view.key, known)
        start = len(matched) * self.pool.block_size
        tokens = min(sequence.length - start, budget)
        blocks = self.pool.allocate(-(-(start + tokens) // self.pool.block_size) - len(matched))
        if blocks is None:
            self.pool.release(matched)
            self._short = True
            return None
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.blocks, sequence.hashes, sequence.computed = matched + blocks, hashes, start
        sequence.row = self._rows.pop()
        if sequence.first_scheduled == 0.0:
            sequence.first_scheduled = time.monotonic()
            sequence.cached_tokens = start
            self.prefix_queries += sequence.length
            self.prefix_hits += start
        self.on_start(sequence)
        return Work(sequence, start, tokens)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        self._leave(sequence)
        if len(sequence.prompt_logprobs) < sequence.prompt_len:
            sequence.prompt_logprobs.clear()  # the prompt is computed, and scored, again from its start
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Out of `running`, with blocks and row given back."""
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        self._short = False
        self._rows.append(sequence.row)
        sequence.blocks, sequence.hashes, sequence.computed, sequence.row = [], [], 0, -1

    def computed(self, work: Work) -> None:
        """The step is done: the work's tokens count, and blocks it filled can be found by others."""
        sequence, size = work.sequence, self.pool.block_size
        sequence.computed = work.start + work.tokens
        for index in range(len(sequence.hashes), sequence.computed // size):
            parent = sequence.hashes[-1] if sequence.hashes else sequence.view.key
            sequence.hashes.append(chain(parent, sequence.tokens[index * size : (index + 1) * size]))
            self.pool.publish(sequence.blocks[index], sequence.hashes[-1])
        if sequence.children and sequence.computed >= sequence.prompt_len:
            self.waiting.extendleft(reversed(sequence.children))
            sequence.children, self._short = [], False

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence wherever it is; blocks are free at once. Waiting children go on without it."""
        if sequence.row >= 0:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            for parent in (*self.running, *self.waiting):
                if sequence in parent.children:
                    parent.children.remove(sequence)
        self.waiting.extendleft(reversed(sequence.children))
        sequence.children, self._short = [], False

    def sequences(self) -> list[Sequence]:
        """All living sequences: running, waiting, and children that wait for a parent's prompt."""
        alive = [*self.running, *self.waiting]
        return alive + [child for sequence in alive for child in sequence.children]

    def check(self) -> None:
        """Raises AssertionError if a block or row leaked. Called when idle, and by tests after every step."""
        self.pool.check([sequence.blocks for sequence in self.running])
        rows = [sequence.row for sequence in self.running]
        assert sorted(rows + self._rows) == list(range(self.max_num_seqs)), "a row leaked"
        assert all(not s.blocks and s.row < 0 for s in self.waiting), "a waiting sequence holds something"
