"""Every series the server exports: name, type, meaning, labels, buckets. The values live in `api/metrics.py`.

Meanings are vLLM's with the prefix `engram_`, so that dashboards and autoscalers carry over; buckets start at 1 ms,
because a small model's step is a few milliseconds. What a memory's tables do has its own family, `engram_memory_*`:
how much of fetching hides behind computing is 1 − rate(stall) / rate(fetch).

Every series carries `model_name`; `labels` names what comes besides. Counters are named as exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Series:
    """One exported series. `buckets` are upper bounds in the unit of the name, without +Inf."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _decades(first: int, last: int) -> tuple[float, ...]:
    """1, 2.5, 5 times 10^first … and 10^last at the end."""
    steps = [float(f"{digit}e{power}") for power in range(first, last) for digit in (1, 2.5, 5)]
    return (*steps, float(f"1e{last}"))


MILLISECONDS_TO_MINUTES = (*_decades(-3, 2), 250.0, 500.0, 1000.0)
# Denser between 1 and 100 ms, where the time between two tokens lies.
BETWEEN_TOKENS = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, *_decades(-1, 1))

RUNNING = Series("engram_num_requests_running", "gauge", "Sequences in the running batch.")
WAITING = Series("engram_num_requests_waiting", "gauge", "Sequences waiting to be scheduled.")
KV_USAGE = Series("engram_kv_cache_usage_perc", "gauge", "KV blocks in use; 1 means all of them.")
PREFIX_QUERIES = Series("engram_prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.")
PREFIX_HITS = Series("engram_prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.")
PREEMPTIONS = Series("engram_num_preemptions_total", "counter", "Sequences that gave their blocks back and waited.")
STEPS = Series("engram_steps_total", "counter", "Steps the engine has computed.")
STEP_SECONDS = Series("engram_step_seconds_total", "counter", "Seconds the engine has spent in steps.")

PROMPT_TOKENS = Series("engram_prompt_tokens_total", "counter", "Prompt tokens of requests that reached a first token.")
GENERATION_TOKENS = Series("engram_generation_tokens_total", "counter", "Tokens generated.")
SUCCESS = Series(
    "engram_request_success_total", "counter", "Sequences that ended, by finish reason.", ("finished_reason",)
)
UNKNOWN_FIELDS = Series(
    "engram_request_unknown_fields_total", "counter", "Request fields that this server does not know and ignored."
)

REFUSED = Series(
    "engram_requests_refused_total",
    "counter",
    "Requests refused without being looked at: no key, a full queue, a key's own limit.",
    ("reason",),
)

TTFT = Series(
    "engram_time_to_first_token_seconds",
    "histogram",
    "From the request's arrival to its first token, both at the API's edge.",
    buckets=MILLISECONDS_TO_MINUTES,
)
INTER_TOKEN = Series(
    "engram_inter_token_latency_seconds", "histogram", "Between two tokens of a sequence.", buckets=BETWEEN_TOKENS
)
E2E = Series(
    "engram_e2e_request_latency_seconds",
    "histogram",
    "From a request's arrival to a sequence's end.",
    buckets=MILLISECONDS_TO_MINUTES,
)
QUEUE = Series(
    "engram_request_queue_time_seconds",
    "histogram",
    "From a request's arrival to its first schedule.",
    buckets=MILLISECONDS_TO_MINUTES,
)
PREFILL = Series(
    "engram_request_prefill_time_seconds",
    "histogram",
    "From a request's first schedule to its first token.",
    buckets=MILLISECONDS_TO_MINUTES,
)

TABLE = ("table", "layer")
MEMORY_ROWS = Series("engram_memory_rows_total", "counter", "Memory rows read.", TABLE)
MEMORY_BYTES = Series("engram_memory_bytes_total", "counter", "Bytes of memory rows read.", TABLE)
MEMORY_FETCH = Series(
    "engram_memory_fetch_seconds_total", "counter", "Seconds from asking for rows to having them.", TABLE
)
MEMORY_STALL = Series(
    "engram_memory_stall_seconds_total", "counter", "Seconds a layer waited for rows, in fact.", TABLE
)
MEMORY_RESIDENT = Series(
    "engram_memory_resident_bytes",
    "gauge",
    "Bytes of a table in memory. counted: mincore, sampled (mincore of part), touched (read, not dropped), copied.",
    (*TABLE, "counted"),
)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Series))
