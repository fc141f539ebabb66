"""What crosses the pipe between the API process and the engine process: frozen dataclasses, token ids, no text.

API ──▶ engine   Submit, Abort, UpdateMemory, UpdateEdits, Drain
engine ──▶ API   Ready | Failed once, then one StepOutputs per step (never one message per token), MemoryUpdated
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from server.cache.counters import OrderCounters
from server.errors import EngramError
from server.memory.edits import Edited

if TYPE_CHECKING:
    from server.memory.trace import Gate  # importing it would load torch

FinishReason = Literal["stop", "length", "abort", "error"]


GrammarKind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like. `text`: a JSON schema, a regular expression, a JSON list of texts, or a grammar
    (Lark, or GBNF). `param`: the request's field it came in, for messages. `whitespace`: of JSON, between two tokens.
    """

    kind: GrammarKind
    text: str
    param: str
    whitespace: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Stop *strings* are matched by the API process, which then aborts the sequence.

    temperature 0 is greedy. top_k 0 and top_p 1 switch their filter off. `logprobs` None: none; 0: the sampled
    token's only; k: the k most likely besides. `seed` None: the engine draws one. `prompt_logprobs` scores the
    prompt (echo with logprobs); it skips prefix hits. `trace` wants the memories' gates at every token, and skips them
    too; `timings` wants the memories' costs.
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
    grammar: Grammar | None = None
    trace: bool = False
    timings: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """One prompt. With n > 1 the engine computes the prompt once and forks; child i samples with seed + i.

    `packs` names the memories this request sees, () for the bare backbone; `salt` separates tenants' prefix caches;
    `arrival` is time.monotonic() at the API's edge, `sent` when the request left it for the engine. `redirects`:
    (position, the tokens whose rows token-id tables read there). `tenant`: whose edits it reads besides everyone's.
    """

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    packs: tuple[str, ...] = ()
    salt: bytes = b""
    n: int = 1
    arrival: float = 0.0
    redirects: tuple[tuple[int, tuple[int, ...]], ...] = ()
    tenant: str = ""
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
class UpdateEdits:
    """All edits of a tenant ("": of everyone) from now on; without rows, none. Requests sent after it see them."""

    scope: str
    rows: Edited


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


class Gates(NamedTuple):
    """Of the token at this position, prompt included: what each Engram layer let in."""

    position: int
    gates: tuple[Gate, ...]


class Cost(NamedTuple):
    """Of one sequence so far: seconds its steps waited for rows, rows it addressed, those no table was read for."""

    stall_s: float = 0.0
    rows: int = 0
    hits: float = 0.0


FREE = Cost()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step brought one sequence: usually one token. A refused request ends with index -1 and its `error`.

    `prompt_logprobs` comes once, with the first output: one entry per prompt token, the first None.
    `queued_s`, `prefill_s`: seconds from arrival to first schedule, and from there to the first token; on the first
    output only, as are `cached_tokens`, prompt tokens served from the prefix cache, and `engine_s`: seconds from the
    request's leaving for the engine to this output.
    `gates`: of the tokens computed since the last output; the newest token is computed only by the next step.
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
    gates: tuple[Gates, ...] = ()
    cost: Cost | None = None
    engine_s: float = 0.0

    def __reduce__(self) -> tuple[object, ...]:
        # One crosses the pipe per token; dataclasses' own way, field by field through setattr, costs ten times this.
        # After its first token a sequence says little else.
        extras = self.gates or self.cost is not None
        if self.queued_s is None and self.finish_reason is None and self.error is None and not extras:
            return TokenOutput, (self.request_id, self.index, self.token_ids, self.logprobs)
        return TokenOutput, tuple(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class MemoryCounters:
    """One (table, layer). Running totals: rows looked up, bytes read, seconds fetching, seconds a layer waited, rows
    the device cache held, let in and put out, bytes sent to the device, pages asked for ahead. Now: rows the cache's
    pool has room for, bytes it holds, where the table is placed, the hot list's age.

    `orders`: the rows by n-gram length and by where they were found. `fetch_counts`: fetches by duration, one count per
    bound of the prefetcher and one beyond.
    """

    table: str
    layer: int
    rows: int
    bytes: int
    fetch_s: float
    stall_s: float
    device_bytes: int = 0
    page_ins: int = 0
    device_hits: int = 0
    admissions: int = 0
    evictions: int = 0
    capacity: int = 0
    cache_bytes: int = 0
    placement: str = "mapped"  # or device, pinned
    hot_list_age_s: float | None = None
    fetch_counts: tuple[int, ...] = ()
    orders: tuple[OrderCounters, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        return MemoryCounters, tuple(getattr(self, name) for name in self.__slots__)  # as TokenOutput's, above


@dataclass(frozen=True, slots=True)
class TableResidency:
    """Bytes of one table in memory now. `counted`: "mincore", "sampled", "touched", "copied" or "unknown"."""

    table: str
    layer: int
    bytes: int
    counted: str

    def __reduce__(self) -> tuple[object, ...]:
        return TableResidency, (self.table, self.layer, self.bytes, self.counted)  # as TokenOutput's


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges now, and totals since the start (`*_total`). `deferred`: of `waiting`, those that wait for the prompt of
    another choice. `table_fault`: what makes a table unreadable; `notes`: what does not work as asked for although
    everything is served. `counted` False: `memory`, `resident` and `notes` are those of an earlier message.
    """

    running: int = 0
    waiting: int = 0
    deferred: int = 0
    blocks_used: int = 0
    blocks: int = 0
    steps_total: int = 0
    step_s_total: float = 0.0
    preemptions_total: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    memory: tuple[MemoryCounters, ...] = ()
    table_fault: str | None = None
    resident: tuple[TableResidency, ...] = ()
    counted: bool = True
    notes: tuple[str, ...] = ()


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
