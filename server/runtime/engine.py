"""The engine: submit, abort, step. One object, one thread, no text.

    submit ─► scheduler.waiting ─► step: schedule ─ run ─ append tokens ─ finish ─► StepOutputs

A step that fails ends the sequences it was computing with an error and nothing else; the engine goes on.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import fields

from server.cache.counters import LayerCounters
from server.errors import EngramError, NotReady, QueueFull, RequestError, StepFailed, TableError
from server.memory.edits import Edited, Overlay
from server.memory.memories import Memories
from server.runtime.blocks import BlockPool
from server.runtime.costs import Costs
from server.runtime.grammar import Constraint, Grammars, grace, rest
from server.runtime.messages import (
    EngineStats,
    FinishReason,
    MemoryCounters,
    StepOutputs,
    Submit,
    TableResidency,
    TokenOutput,
)
from server.runtime.runner import Runner
from server.runtime.sampler import Sampled
from server.runtime.scheduler import Scheduler, Work
from server.runtime.sequence import Sequence
from server.view import BARE, MemoryView

logger = logging.getLogger(__name__)

COUNTED = tuple(f.name for f in fields(LayerCounters))
RESIDENT_SECONDS = 1.0
# How long an engine with nothing to do but wait for grammars stays deaf to messages.
REST_SECONDS = 0.005
COUNT_SECONDS = 0.05


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
        grammars: Grammars | None = None,
    ) -> None:
        self.runner, self.pool = runner, pool
        self.scheduler = Scheduler(pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        self.scheduler.on_start = runner.start
        self.max_model_len, self.vocab_size, self.eos_ids = max_model_len, vocab_size, eos_ids
        self.max_waiting = max_waiting
        self.packs = dict(packs or {})  # what new requests may name → identity
        self.fixed, self.redirectable = fixed, redirectable
        self.grammars, self.costs = grammars, Costs(runner.memories, runner.wait)
        self._constrained: list[Sequence] = []
        self.edits: dict[str, Overlay] = {}  # scope → what its next requests see; "": everyone's
        self.draining = False
        self.steps, self.step_s = 0, 0.0
        self._counted_at = float("-inf")
        self._requests: dict[str, list[Sequence]] = {}
        self._resident_at, self._resident_last = float("-inf"), ()  # type: tuple[float, tuple[TableResidency, ...]]

    # ── verbs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Submit) -> None:
        """Queues a request. Raises RequestError, QueueFull or NotReady; nothing changes then."""
        if self.draining:
            raise NotReady("the server is draining and takes no new requests")
        waiting = len(self.scheduler.waiting) + len(self.scheduler.running) - self.scheduler.max_num_seqs
        if waiting >= self.max_waiting:
            raise QueueFull(f"{waiting} requests are waiting, as many as --max-waiting allows")
        self._check(request)
        view = self.view(request.packs, request.salt, request.redirects, request.tenant)
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
        grammar = request.params.grammar
        if grammar is not None:
            assert self.grammars is not None
            for sequence in family:
                sequence.constraint = Constraint(self.grammars, grammar)
            self._constrained += family
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
        outputs = self._settle() if self._constrained else []
        works = self.scheduler.schedule()
        if not works:
            if not outputs:
                rest(self._constrained, REST_SECONDS)
            return StepOutputs(tuple(outputs), self.stats())
        outputs += self._compute(works)
        return self._told(outputs, begun, sum(work.tokens for work in works))

    def _told(self, outputs: list[TokenOutput], begun: float, tokens: int) -> StepOutputs:
        """What a step that began then gave, as the message that is sent."""
        elapsed = time.perf_counter() - begun
        self.steps += 1
        self.step_s += elapsed
        return StepOutputs(tuple(outputs), self._step_stats(), elapsed, tokens)

    def _step_stats(self) -> EngineStats:
        """With the memories' counters now and then only, and when the last sequence has ended: of twenty tables they
        take longer to send than a short step to compute.
        """
        now = time.monotonic()
        if now - self._counted_at < COUNT_SECONDS and not self.idle:
            return self.stats(memory=False)
        self._counted_at = now
        return self.stats()

    def stats(self, *, memory: bool = True) -> EngineStats:
        """`memory`: with the memories' counters and what is resident of their tables."""
        scheduler, memories = self.scheduler, self.runner.memories
        deferred = sum(len(s.children) for s in scheduler.running)
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + deferred,
            deferred=deferred,
            blocks_used=self.pool.used,
            blocks=self.pool.usable,
            steps_total=self.steps,
            step_s_total=self.step_s,
            preemptions_total=scheduler.preemptions,
            prefix_queries_total=scheduler.prefix_queries,
            prefix_hits_total=scheduler.prefix_hits,
            memory=memory_counters(memories) if memory and memories else (),
            table_fault=next(iter(memories.faults().values()), None) if memories else None,
            resident=self._resident() if memory else (),
            counted=memory,
            notes=memories.notes() if memory and memories else (),
        )

    def _resident(self) -> tuple[TableResidency, ...]:
        """What of each table stands in memory, counted anew once a second at most."""
        memories, now = self.runner.memories, time.monotonic()
        if memories is not None and now - self._resident_at >= RESIDENT_SECONDS:
            self._resident_at = now
            self._resident_last = tuple(
                TableResidency(table, layer, found.nbytes, found.counted) for table, layer, found in memories.resident()
            )
        return self._resident_last

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def view(
        self,
        packs: tuple[str, ...],
        salt: bytes,
        redirects: tuple[tuple[int, tuple[int, ...]], ...] = (),
        tenant: str = "",
    ) -> MemoryView:
        """What a request of this tenant that names these packs sees."""
        if not packs and not salt:
            return BARE
        named = tuple((name, self.packs[name]) for name in packs)
        return MemoryView(named, salt, redirects, self._overlays(named, tenant) if self.edits else ())

    def update_edits(self, scope: str, rows: Edited) -> None:
        """What requests of a tenant ("": of everyone) see from now on; whoever runs keeps what it has."""
        if rows:
            self.edits[scope] = Overlay(rows)
        else:
            self.edits.pop(scope, None)

    # ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _overlays(self, packs: tuple[tuple[str, str], ...], tenant: str) -> tuple[Overlay, ...]:
        """Everyone's edits and the tenant's, where they are of these packs."""
        memories = self.runner.memories
        contents = {pack.content for pack in memories.packs if pack.id in packs} if memories is not None else set()
        scopes = (self.edits.get(scope) for scope in dict.fromkeys(("", tenant)))
        return tuple(overlay for overlay in scopes if overlay is not None and not overlay.packs.isdisjoint(contents))

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

    def _compute(self, works: list[Work]) -> list[TokenOutput]:
        """Runs the works and takes what they give."""
        try:
            counted = self.costs.begin(works)
            sampled = self.runner.run(works)
            if counted:
                self.costs.end(works)
        except Exception as error:
            return self._fail(works, error)
        return self._take(works, sampled)

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
        gates, sequence.gates = tuple(sequence.gates), []
        cost = sequence.cost if sequence.params.timings else None
        if sequence.first_token:
            return TokenOutput(
                sequence.request_id,
                sequence.index,
                ids,
                logprobs,
                sequence.finish_reason,
                sequence.stop_token_id,
                gates=gates,
                cost=cost,
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
            gates=gates,
            cost=cost,
            engine_s=now - (sequence.sent or sequence.arrival),
        )

    def _settle(self) -> list[TokenOutput]:
        """Takes what was done for grammars beside the last step; ends sequences that are complete or cannot go on."""
        grace(self._constrained)
        outputs = []
        for sequence in list(self._constrained):
            constraint = sequence.constraint
            assert constraint is not None
            error = constraint.settle()
            reason: FinishReason | None = "stop" if constraint.complete else "length" if sequence.at_limit else None
            if error is not None or (reason is not None and constraint.pending is None):
                reason = "error" if error is not None else reason
                assert reason is not None
                self._end(sequence, reason)
                outputs.append(
                    TokenOutput(
                        sequence.request_id,
                        sequence.index,
                        (),
                        finish_reason=reason,
                        error=error,
                        cost=sequence.cost if sequence.params.timings else None,
                    )
                )
        return outputs

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
        if sequence.constraint is not None:
            self._constrained.remove(sequence)
        family = self._requests.get(sequence.request_id)
        if family is not None:
            family.remove(sequence)
            if not family:
                del self._requests[sequence.request_id]


def memory_counters(memories: Memories) -> tuple[MemoryCounters, ...]:
    """What the cache counts, as the message that crosses the pipe."""
    durations, placements = memories.prefetcher.fetch_counts(), memories.placements()
    paged, ages = memories.page_ins(), memories.hot_list_ages()
    return tuple(
        MemoryCounters(
            **{name: getattr(counters, name) for name in COUNTED},
            fetch_counts=durations.get((counters.table, counters.layer), ()),
            placement=placements.get((counters.table, counters.layer), "mapped"),
            page_ins=paged.get((counters.table, counters.layer), 0),
            hot_list_age_s=ages.get(counters.table),
        )
        for counters in memories.counters()
    )
