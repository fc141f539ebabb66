"""The runner whose decode steps stay on the device: launched, and read later.

    works ─ one token each, served? ─ yes ─► DecodeSteps.launch ─► read: tokens; logits for who asks for more
                                     └ no ──► Runner.run, eagerly

Where the host reads rows for a step, the launch itself waits for the tokens of the step before, and only there.
The token table and block table on the device follow the host's only as far as decode steps need: a row that an eager
step took further is written anew, its last tokens and its blocks, before its next decode step. Knows tensors; nothing
of queues, budgets or clients.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import partial
from typing import Any

import numpy as np
import torch

from server.batch import Bools, Ints
from server.errors import StepFailed
from server.runtime.decode_inputs import Sampling
from server.runtime.decode_step import DecodeSteps, Launched
from server.runtime.runner import Runner
from server.runtime.sampler import LEAST_SHARE, Sampled, is_plain
from server.runtime.scheduler import Work
from server.runtime.sequence import Sequence

STALE = -1


class DeviceRunner(Runner):
    def __init__(self, steps: DecodeSteps, *arguments: Any, **sizes: Any) -> None:
        """`steps`, and what a Runner takes. All of it works on one stream."""
        super().__init__(*arguments, **sizes)
        self.steps = steps
        self._next = np.full(len(self.table.tokens), STALE)  # row → the position that the device can compute next
        self._last: tuple[Ints, Launched] | None = None  # the rows of the step before, and that step

    def start(self, sequence: Sequence) -> None:
        super().start(sequence)
        self._next[sequence.row] = STALE

    def run(self, works: list[Work]) -> list[tuple[Sequence, Sampled]]:
        if self.decodes(works):
            return self.read(works, self.launch(works))
        try:
            return super().run(works)
        except torch.cuda.OutOfMemoryError as error:
            tokens = sum(work.tokens for work in works)
            raise StepFailed(
                f"a step of {tokens} tokens does not fit in what is free on {self.device}; set "
                f"--max-num-batched-tokens {max(tokens // 2, 1)} or lower --kv-bytes"
            ) from error

    def decodes(self, works: list[Work]) -> bool:
        """Whether the works are a decode step that the device can do: one known token each, nothing to tell of it."""
        return (
            len(works) <= self.steps.most
            and all(work.tokens == 1 and work.completes and not _told(work) for work in works)
            and self.serves(works)
        )

    def serves(self, works: list[Work]) -> bool:
        """Whether what memory these see can be read within a step."""
        views = [work.sequence.view for work in works]
        if self.steps.memory is not None:
            return self.steps.memory.serves(views, np.array([work.start for work in works], np.int64))
        return not any(view.packs for view in views)

    def are_plain(self, sequences: Items[Sequence]) -> bool:
        """Whether the device samples for them alone, so that nobody has to look at logits."""
        return all(is_plain(sequence) for sequence in sequences)

    def launch(self, works: list[Work]) -> Launched:
        """Starts a decode step; its tokens may be those that the step before it has yet to sample."""
        sequences = [work.sequence for work in works]
        for sequence in sequences:
            self.table.sync_blocks(sequence)
        rows = np.array([sequence.row for sequence in sequences], np.int64)
        positions = np.array([work.start for work in works], np.int64)
        ahead = np.array([work.start >= work.sequence.length for work in works])
        windows = partial(self._windows, rows, positions, ahead, self._last)
        stale = self._next[rows] != positions
        if stale.any():
            self._write(rows[stale], positions[stale])
        launched = self.steps.launch(
            rows,
            positions,
            self.table.blocks[rows, positions // self.block_size],
            sampling_of(sequences),
            [sequence.view for sequence in sequences],
            self._askers(sequences) if self._counts_askers else None,
            windows,
        )
        self._next[rows] = positions + 1
        self._last = rows, launched
        return launched

    def _windows(
        self, rows: Ints, positions: Ints, ahead: Bools, last: tuple[Ints, Launched] | None
    ) -> tuple[Ints, Bools]:
        """The n-grams that end at these tokens. ahead[B]: which of them the step before, `last`, has yet to sample; the
        host's table has them once that is over, before they are appended."""
        if ahead.any():
            assert last is not None
            sampled = np.zeros(len(self.table.tokens), np.int64)
            sampled[last[0]] = last[1].tokens()
            self.table.tokens[rows[ahead], self.table.pad + positions[ahead]] = sampled[rows[ahead]]
        return self.table.windows(rows, positions)

    @torch.inference_mode()
    def read(self, works: list[Work], launched: Launched) -> list[tuple[Sequence, Sampled]]:
        """Waits for a step and returns each sequence's token. Before the next launch, unless all are plain."""
        sequences = [work.sequence for work in works]
        sampled = [Sampled(token, None) for token in launched.tokens()]
        special = [i for i, sequence in enumerate(sequences) if not is_plain(sequence)]
        if special:
            chosen = self.sample(launched.logits[special], [sequences[i] for i in special])
            for i, token in zip(special, chosen, strict=True):
                sampled[i] = token
            self.steps.write_tokens(
                np.array([sequences[i].row for i in special]),
                np.array([works[i].start + 1 for i in special]),
                np.array([token.token_id for token in chosen]),
            )
        return list(zip(sequences, sampled, strict=True))

    def _write(self, rows: Ints, positions: Ints) -> None:
        """Takes rows to the device as they stand on the host: their last tokens up to these positions, their blocks."""
        back = np.arange(self.steps.pad + 1)
        at = positions[:, None] - back
        known = at >= 0
        each = np.repeat(rows, known.sum(1))
        self.steps.write_tokens(each, at[known], self.table.tokens[each, self.table.pad + at[known]])
        self.steps.write_blocks(rows, self.table.blocks[rows])


def sampling_of(sequences: Items[Sequence]) -> Sampling:
    params = [sequence.params for sequence in sequences]
    return Sampling(
        np.array([each.temperature for each in params], np.float32),
        np.array([sequence.seed for sequence in sequences], np.uint64).view(np.int64),
        np.array([each.top_k for each in params], np.int64),
        np.array([max(each.top_p, LEAST_SHARE) for each in params], np.float32),
        np.array([each.min_p for each in params], np.float32),
    )


def _told(work: Work) -> bool:
    """Whether the step has to tell more of this sequence than its next token."""
    sequence, params = work.sequence, work.sequence.params
    scored = not params.prompt_logprobs or len(sequence.prompt_logprobs) >= sequence.prompt_len
    return params.trace or not scored or not params.max_tokens
