"""The runner: turns the scheduler's work into a batch, runs the model, samples.

Each step: read ids, windows and slots from the token table; let the memories begin fetching; run the decoder; take
logits only where a token is wanted; sample. Knows tensors; nothing of queues, budgets or clients.
"""

from __future__ import annotations

from typing import TypedDict
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from server.batch import Batch, Ints
from server.memory.addressing import windows_of
from server.memory.memories import Memories
from server.memory.trace import GateTrace
from server.models.attention.base import AttentionBackend
from server.models.decoder import Decoder
from server.runtime.messages import Gates, Logprobs
from server.runtime.sampler import Sampled, describe, sample
from server.runtime.scheduler import Work
from server.runtime.sequence import Sequence
from server.runtime.token_table import TokenTable

SCORING_SLICE = 64  # prompt rows whose logits are held at once: 64 · V · 4 bytes


class Sizes(TypedDict):
    """Sequences at once, the longest context, tokens per KV block."""

    max_num_seqs: int
    max_len: int
    block_size: int


class Runner:
    def __init__(
        self,
        model: Decoder,
        attention: AttentionBackend,
        memories: Memories | None,
        *,
        max_num_seqs: int,
        max_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.model, self.attention, self.memories, self.device = model, attention, memories, device
        self.block_size = block_size
        self.sample = sample
        self.table = TokenTable(max_num_seqs, max_len, block_size, memories.window if memories else 1)

    @torch.inference_mode()
    def run(self, works: list[Work]) -> list[tuple[Sequence, Sampled]]:
        """Computes the works' tokens; returns the next token of each sequence that reached its end."""
        batch = self.batch(works)
        step = self.memories.begin(batch) if self.memories else None
        traced = self._traced(works, batch) if step is not None else None
        if step is not None and traced is not None:
            step.trace = traced
        hidden = self.model(batch, self.attention, step)
        if traced is not None:
            self._keep_gates(works, batch, traced)
        self._score_prompts(works, batch, hidden)
        sequences = [work.sequence for work in works if work.completes]
        if not sequences:
            return []
        logits = self.model.logits(hidden[batch.sample_at])
        sampled = list(zip(sequences, self.sample(logits, sequences), strict=True))
        if step is not None and step.slow:
            self._hint(sampled)
        return sampled

    def start(self, sequence: Sequence) -> None:
        """Takes in a sequence that was given its row."""
        self.table.start(sequence)

    def wait(self) -> None:
        """Until the device has computed all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def computes(self) -> bool:
        """Whether the device still does: after some of its errors it never does again."""
        try:
            return bool(torch.ones(1, device=self.device).add_(1).item() == 2)
        except Exception:
            return False

    def _hint(self, sampled: list[tuple[Sequence, Sampled]]) -> None:
        """As soon as the tokens exist, their rows are on their way: before they are even appended."""
        assert self.memories is not None
        rows = np.array([sequence.row for sequence, _ in sampled])
        positions = np.array([sequence.length for sequence, _ in sampled])
        self.table.tokens[rows, self.table.pad + positions] = [token.token_id for _, token in sampled]
        sequences = [sequence for sequence, _ in sampled]
        askers = self._askers(sequences) if self._counts_askers else None
        self.memories.hint(*self.table.windows(rows, positions), [s.view for s in sequences], askers)

    @property
    def _counts_askers(self) -> bool:
        return self.memories is not None and self.memories.warm is not None

    def _askers(self, sequences: list[Sequence]) -> Ints:
        """A number per request, the same for all its sequences and tokens."""
        return np.array([crc32(sequence.request_id.encode()) for sequence in sequences], np.int64)

    def page_in(self, sequence: Sequence) -> None:
        """The rows of a prompt that begins to wait: the OS reads their pages meanwhile."""
        if self.memories is not None and sequence.view.packs:
            windows, blocked = windows_of(sequence.tokens[: sequence.length], self.memories.window)
            self.memories.page_in(windows, blocked, sequence.view)

    def batch(self, works: list[Work]) -> Batch:
        """The flat batch of `works`, in their order."""
        for work in works:
            self.table.sync_blocks(work.sequence)
        starts = np.array([work.start for work in works], np.int64)
        counts = np.array([work.tokens for work in works], np.int64)
        rows = np.array([work.sequence.row for work in works], np.int64)
        query_start = np.zeros(len(works) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
        rows_of = np.repeat(rows, counts)
        windows, blocked = self.table.windows(rows_of, positions)
        context = starts + counts
        pages = -(-int(context.max()) // self.block_size)
        blocks = self.table.blocks[rows, :pages]
        views = {work.sequence.view: None for work in works}
        order = {view: i for i, view in enumerate(views)}
        view_of = np.repeat([order[work.sequence.view] for work in works], counts)
        sample_at = [int(end) - 1 for work, end in zip(works, query_start[1:], strict=True) if work.completes]
        return Batch(
            token_ids=self._tensor(np.ascontiguousarray(windows[:, 0])),
            positions=self._tensor(positions),
            slots=self._tensor(self.table.slots(rows_of, positions)),
            block_table=self._tensor(blocks),
            host_blocks=blocks,
            query_start=query_start,
            context_len=context,
            views=tuple(views),
            view_of=view_of,
            windows=windows,
            blocked=blocked,
            sample_at=torch.tensor(sample_at, dtype=torch.int64, device=self.device),
            block_size=self.block_size,
            askers=np.repeat(self._askers([work.sequence for work in works]), counts) if self._counts_askers else None,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _traced(self, works: list[Work], batch: Batch) -> GateTrace | None:
        """For the tokens of the sequences that asked for their gates; None without any."""
        if not any(work.sequence.params.trace for work in works):
            return None
        spans = zip(works, batch.query_start.tolist(), strict=False)
        tokens = [np.arange(work.tokens) + first for work, first in spans if work.sequence.params.trace]
        return GateTrace(np.concatenate(tokens))

    def _keep_gates(self, works: list[Work], batch: Batch, trace: GateTrace) -> None:
        """Gates to their sequences; what a preempted sequence computes again is known already."""
        found = trace.of_tokens()
        for work, first in zip(works, batch.query_start.tolist(), strict=False):
            sequence = work.sequence
            if sequence.params.trace:
                for position in range(max(work.start, sequence.traced), work.start + work.tokens):
                    sequence.gates.append(Gates(position, found[first + position - work.start]))
                sequence.traced = max(sequence.traced, work.start + work.tokens)

    def _score_prompts(self, works: list[Work], batch: Batch, hidden: Tensor) -> None:
        """Appends the log-probabilities of prompt tokens to sequences that asked to have their prompt scored."""
        for work, first in zip(works, batch.query_start.tolist(), strict=False):
            sequence = work.sequence
            scored = sequence.prompt_logprobs
            if not sequence.params.prompt_logprobs or work.start + 1 < len(scored):
                continue
            if not scored:
                scored.append(None)
            count = min(work.start + work.tokens, sequence.prompt_len - 1) - work.start
            for at in range(0, count, SCORING_SLICE):
                stop = min(at + SCORING_SLICE, count)
                logits = self.model.logits(hidden[first + at : first + stop])
                targets = sequence.tokens[work.start + at + 1 : work.start + stop + 1].tolist()
                tops = [sequence.params.logprobs or 0] * len(targets)
                rows: list[Logprobs] = describe(torch.log_softmax(logits, dim=-1), targets, tops)
                scored.extend(rows)
