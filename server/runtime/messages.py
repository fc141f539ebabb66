"""What crosses the pipe between the API process and the engine process: frozen dataclasses, token ids, no text.

API ──▶ engine   Submit, Abort, UpdateMemory, Drain
engine ──▶ API   Ready | Failed once, then one StepOutputs per step (never one message per token), MemoryUpdated
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from server.errors import EngramError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Stop *strings* are matched by the API process, which then aborts the sequence.

    temperature 0 is greedy. top_k 0 and top_p 1 switch their filter off. `logprobs` None: none; 0: the sampled
    token's only; k: the k most likely besides. `seed` None: the engine draws one. `prompt_logprobs` scores the
    prompt (echo with logprobs); it skips prefix hits.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """One prompt. With n > 1 the engine computes the prompt once and forks; child i samples with seed + i.

    `packs` names the memories this request sees, () for the bare backbone; `salt` separates tenants' prefix caches;
    `arrival` is time.monotonic() at the API's edge, `sent` when the request left it for the engine. `redirects`:
    (position, the tokens whose rows token-id tables read there).
    """

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    packs: tuple[str, ...] = ()
    salt: bytes = b""
    n: int = 1
    arrival: float = 0.0
    redirects: tuple[tuple[int, tuple[int, ...]], ...] = ()
    sent: float = 0.0


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop these (request id, child index) sequences; index None: all of the request's."""

    targets: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """Refuse new requests, finish the running ones, then exit; after `seconds`, abort what is left."""

    seconds: float


@dataclass(frozen=True, slots=True)
class UpdateMemory:
    """Attach the pack at `path` as `name`; with path None let the memory of that name go. Answered by MemoryUpdated."""

    ticket: int
    name: str
    path: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryUpdated:
    """What is served after a change, or unchanged with an `error`.

    `load_s`: seconds of opening beside the steps; `pause_s`: seconds that steps waited for the switch.
    """

    ticket: int
    models: tuple[tuple[str, tuple[str, ...]], ...]
    packs: tuple[str, ...]
    error: EngramError | None = None
    load_s: float = 0.0
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one token: its own log-probability and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        return Logprobs, (self.token_id, self.logprob, self.rank, self.top)  # as TokenOutput's, below


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step brought one sequence: usually one token. A refused request ends with index -1 and its `error`.

    `prompt_logprobs` comes once, with the first output: one entry per prompt token, the first None.
    `queued_s`, `prefill_s`: seconds from arrival to first schedule, and from there to the first token; on the first
    output only, as are `cached_tokens`, prompt tokens served from the prefix cache, and `engine_s`:
    seconds from the request's leaving for the engine to this output.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: EngramError | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    queued_s: float | None = None
    prefill_s: float | None = None
    cached_tokens: int = 0
    engine_s: float = 0.0

    def __reduce__(self) -> tuple[object, ...]:
        # One crosses the pipe per token; dataclasses' own way, field by field through setattr, costs ten times this.
        # After its first token a sequence says little else.
        if self.queued_s is None and self.finish_reason is None and self.error is None:
            return TokenOutput, (self.request_id, self.index, self.token_ids, self.logprobs)
        return TokenOutput, tuple(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class MemoryCounters:
    """Running totals of one (table, layer): rows and bytes read, seconds fetching, seconds a layer waited."""

    table: str
    layer: int
    rows: int
    bytes: int
    fetch_s: float
    stall_s: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges now, and totals since the start (`*_total`)."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks: int = 0
    steps_total: int = 0
    step_s_total: float = 0.0
    preemptions_total: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    memory: tuple[MemoryCounters, ...] = ()
    table_fault: str | None = None


@dataclass(frozen=True, slots=True)
class StepOutputs:
    outputs: tuple[TokenOutput, ...]
    stats: EngineStats
    step_s: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is loaded. `models` maps each served name to the packs it reads; the first is the default.

    `name`: the backbone's own; `packs`: all that are attached; `fixed`: those that every model reads.
    """

    models: tuple[tuple[str, tuple[str, ...]], ...]
    max_model_len: int
    vocab_size: int
    report: tuple[tuple[str, str], ...]
    name: str = ""
    packs: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine could not start; `error` is the EngramError to raise on the API's side."""

    error: EngramError
