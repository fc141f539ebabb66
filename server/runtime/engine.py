"""The engine: submit, abort, step. One object, one thread, no text.

    submit ─► scheduler.waiting ─► step: schedule ─ run ─ append tokens ─ finish ─► StepOutputs

A step that fails ends the sequences it was computing with an error and nothing else; the engine goes on.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import astuple

from server.errors import EngramError, NotReady, QueueFull, RequestError, StepFailed, TableError
from server.runtime.blocks import BlockPool
from server.runtime.messages import EngineStats, FinishReason, MemoryCounters, StepOutputs, Submit, TokenOutput
from server.runtime.runner import Runner
from server.runtime.sampler import Sampled
from server.runtime.scheduler import Scheduler, Work
from server.runtime.sequence import Sequence
from server.view import BARE, MemoryView

logger = logging.getLogger(__name__)


class Engine:
    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        max_waiting: int = 1024,
        packs: dict[str, str] | None = None,
        fixed: frozenset[str] = frozenset(),
        redirectable: frozenset[str] = frozenset(),
    ) -> None:
        self.runner, self.pool = runner, pool
        self.scheduler = Scheduler(pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        self.scheduler.on_start = runner.table.start
        self.max_model_len, self.vocab_size, self.eos_ids = max_model_len, vocab_size, eos_ids
        self.max_waiting = max_waiting
        self.packs = dict(packs or {})  # what new requests may name → identity
        self.fixed, self.redirectable = fixed, redirectable
        self.draining = False
        self.steps, self.step_s = 0, 0.0
        self._requests: dict[str, list[Sequence]] = {}

    # ── verbs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Submit) -> None:
        """Queues a request. Raises RequestError, QueueFull or NotReady; nothing changes then."""
        if self.draining:
            raise NotReady("the server is draining and takes no new requests")
        waiting = len(self.scheduler.waiting) + len(self.scheduler.running) - self.scheduler.max_num_seqs
        if waiting >= self.max_waiting:
            raise QueueFull(f"{waiting} requests are waiting, as many as --max-waiting allows")
        self._check(request)
        view = self.view(request.packs, request.salt, request.redirects)
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
        family = [
            Sequence.create(
                request.request_id,
                index,
                request.token_ids,
                request.params,
                view,
                seed=(seed + index) & ((1 << 64) - 1),
                eos_ids=self.eos_ids,
                max_model_len=self.max_model_len,
                arrival=request.arrival or None,
            )
            for index in range(request.n)
        ]
        for sequence in family:
            sequence.sent = request.sent
        family[0].children = family[1:]
        self.runner.page_in(family[0])
        self.scheduler.add(family[0])
        self._requests[request.request_id] = family

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends the sequences at once; their blocks are free when this returns. Unknown ids are ignored."""
        for sequence in list(self._requests.get(request_id, ())):
            if index is None or sequence.index == index:
                self._end(sequence, "abort")

    def step(self) -> StepOutputs:
        """Computes the next batch. Does nothing (no outputs) when idle."""
        begun = time.perf_counter()
        works = self.scheduler.schedule()
        if not works:
            return StepOutputs((), self.stats())
        try:
            sampled = self.runner.run(works)
        except Exception as error:
            outputs = self._fail(works, error)
        else:
            outputs = self._take(works, sampled)
        elapsed = time.perf_counter() - begun
        self.steps += 1
        self.step_s += elapsed
        return StepOutputs(tuple(outputs), self.stats(), elapsed, sum(work.tokens for work in works))

    def stats(self) -> EngineStats:
        scheduler, memories = self.scheduler, self.runner.memories
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + sum(len(s.children) for s in scheduler.running),
            blocks_used=self.pool.used,
            blocks=self.pool.usable,
            steps_total=self.steps,
            step_s_total=self.step_s,
            preemptions_total=scheduler.preemptions,
            prefix_queries_total=scheduler.prefix_queries,
            prefix_hits_total=scheduler.prefix_hits,
            memory=tuple(MemoryCounters(*astuple(c)) for c in memories.prefetcher.counters()) if memories else (),
            table_fault=next(iter(memories.faults().values()), None) if memories else None,
        )

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def view(
        self, packs: tuple[str, ...], salt: bytes, redirects: tuple[tuple[int, tuple[int, ...]], ...] = ()
    ) -> MemoryView:
        """What a request that names these packs sees."""
        if not packs and not salt:
            return BARE
        return MemoryView(tuple((name, self.packs[name]) for name in packs), salt, redirects)

    # ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self, request: Submit) -> None:
        if not request.token_ids:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if len(request.token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(request.token_ids)} tokens and the context is {self.max_model_len} with the "
                f"answer; shorten it or raise --max-model-len",
                param="prompt",
            )
        low, high = min(request.token_ids), max(request.token_ids)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"token id {wrong} is outside 0..{self.vocab_size - 1}", param="prompt")
        for name in request.packs:
            if name not in self.packs:
                raise RequestError(f"no memory {name!r} is attached; there are {sorted(self.packs)}", param="memory")
        for name in sorted(self.fixed.difference(request.packs)):
            raise RequestError(
                f"memory {name!r} stands in for a part of the model and cannot be left out; start the server with "
                f"--keep-up-projection to choose per request",
                param="memory",
            )
        if request.redirects and not self.redirectable.intersection(request.packs):
            raise RequestError(
                "a redirect needs a memory addressed by token ids, and this request reads none; attach a STEM pack: "
                "--memory",
                param="memory",
            )
        faults = self.runner.memories.faults() if self.runner.memories is not None and request.packs else {}
        for name in request.packs:
            fault = faults.get((name, self.packs[name]))
            if fault is not None:
                raise StepFailed(f"memory {name!r} cannot be read: {fault}")
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is already in use")

    def _take(self, works: list[Work], sampled: list[tuple[Sequence, Sampled]]) -> list[TokenOutput]:
        for work in works:
            self.scheduler.computed(work)
        now = time.monotonic()
        outputs = []
        for sequence, token in sampled:
            if sequence.params.max_tokens:
                sequence.append(token.token_id)
                self.runner.table.append(sequence)
            else:
                sequence.finish_reason = "length"  # only the prompt's own log-probabilities were wanted
            outputs.append(self._output(sequence, token, now))
            if sequence.finish_reason is not None:
                self._end(sequence, sequence.finish_reason)
        return outputs

    def _output(self, sequence: Sequence, token: Sampled, now: float) -> TokenOutput:
        ids = (token.token_id,) if sequence.params.max_tokens else ()
        logprobs = (token.logprobs,) if ids and token.logprobs is not None else ()
        if sequence.first_token:
            return TokenOutput(
                sequence.request_id,
                sequence.index,
                ids,
                logprobs,
                sequence.finish_reason,
                sequence.stop_token_id,
            )
        sequence.first_token = now
        return TokenOutput(
            sequence.request_id,
            sequence.index,
            ids,
            logprobs,
            sequence.finish_reason,
            sequence.stop_token_id,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if sequence.params.prompt_logprobs else None,
            queued_s=sequence.first_scheduled - sequence.arrival,
            prefill_s=now - sequence.first_scheduled,
            cached_tokens=sequence.cached_tokens,
            engine_s=now - (sequence.sent or sequence.arrival),
        )

    def _fail(self, works: list[Work], error: Exception) -> list[TokenOutput]:
        """Ends the sequences that the failed step was computing; of a broken table's, only those that read it.

        Nothing of the step counts as computed: blocks hold nothing that others could find, and whoever goes on
        computes the same tokens again. Raises the error if nobody can: the device itself computes no more.
        """
        if not isinstance(error, EngramError):
            logger.exception("a step failed")
            if not self.runner.computes():
                logger.critical("the device %s computes no more; the engine ends", self.runner.device)
                raise error
        cause = error if isinstance(error, EngramError) else StepFailed(f"the step failed: {error}")
        failed = [work.sequence for work in works]
        if isinstance(error, TableError) and self.runner.memories is not None:
            broken = self.runner.memories.faults().keys()
            reading = [sequence for sequence in failed if broken & set(sequence.view.packs)]
            failed = reading or failed
        for sequence in failed:
            self._end(sequence, "error")
        return [TokenOutput(s.request_id, s.index, (), finish_reason="error", error=cause) for s in failed]

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self.scheduler.finish(sequence)
        family = self._requests.get(sequence.request_id)
        if family is not None:
            family.remove(sequence)
            if not family:
                del self._requests[sequence.request_id]
