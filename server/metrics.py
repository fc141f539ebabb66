"""Every series the server exports: name, type, meaning, labels, buckets. The values live in `api/metrics.py`.

Meanings are vLLM's with the prefix `engram_`, so that dashboards and autoscalers carry over; buckets start at 1 ms,
because a small model's step is a few milliseconds. What a memory's tables do has its own family, `engram_memory_*`:
how much of fetching hides behind computing is 1 − rate(stall) / rate(fetch).

Every series carries `model_name`; `labels` names what comes besides. Counters are named as exported.
`docs/metrics.md` is generated from this file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from server.errors import SettingsError

Kind = Literal["counter", "gauge", "histogram"]
Bounds = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One exported series. `buckets` are upper bounds in the unit of the name, without +Inf.

    `needs`: what has to be there for the series to be exported, in words; "" for always.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: Bounds = ()
    needs: str = ""


def _decades(first: int, last: int, digits: tuple[float, ...] = (1, 2.5, 5)) -> Bounds:
    """The digits times 10^first … and 10^last at the end."""
    steps = [float(f"{digit}e{power}") for power in range(first, last) for digit in digits]
    return (*steps, float(f"1e{last}"))


MILLISECONDS_TO_MINUTES = (*_decades(-3, 2), 250.0, 500.0, 1000.0)
# Denser between 1 and 100 ms, where the time between two tokens lies.
BETWEEN_TOKENS = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, *_decades(-1, 1))
FETCHES = _decades(-5, 0)
TOKENS = _decades(0, 5, (1, 2, 5))

# ── scheduler ────────────────────────────────────────────────────────────────────────────────────────────────────────

RUNNING = Series("engram_num_requests_running", "gauge", "Sequences in the running batch.")
WAITING = Series("engram_num_requests_waiting", "gauge", "Sequences waiting to be scheduled.")
WAITING_BY_REASON = Series(
    "engram_num_requests_waiting_by_reason",
    "gauge",
    "Sequences waiting for room (capacity), or for the prompt they share with another choice (deferred).",
    ("reason",),
)
PREEMPTIONS = Series("engram_num_preemptions_total", "counter", "Sequences that gave their blocks back and waited.")
STEPS = Series("engram_steps_total", "counter", "Steps the engine has computed.")
STEP_SECONDS = Series("engram_step_seconds_total", "counter", "Seconds the engine has spent in steps.")
STEP_TOKENS = Series(
    "engram_iteration_tokens_total", "histogram", "Tokens computed in a step, prefill and decode.", buckets=TOKENS
)

# ── cache of keys and values ─────────────────────────────────────────────────────────────────────────────────────────

KV_USAGE = Series("engram_kv_cache_usage_perc", "gauge", "KV blocks in use; 1 means all of them.")
CACHE_CONFIG = Series(
    "engram_cache_config_info", "gauge", "Shape of the KV cache; always 1.", ("block_size", "num_gpu_blocks")
)
PREFIX_QUERIES = Series("engram_prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.")
PREFIX_HITS = Series("engram_prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.")

# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PROMPT_TOKENS = Series("engram_prompt_tokens_total", "counter", "Prompt tokens of requests that reached a first token.")
PROMPT_TOKENS_BY_SOURCE = Series(
    "engram_prompt_tokens_by_source_total",
    "counter",
    "The same by where their keys and values came from: local_compute or local_cache_hit.",
    ("source",),
)
PROMPT_TOKENS_CACHED = Series(
    "engram_prompt_tokens_cached_total", "counter", "The same, only those served from the prefix cache."
)
GENERATION_TOKENS = Series("engram_generation_tokens_total", "counter", "Tokens generated.")

# ── requests: a prompt is a request, n > 1 makes several sequences of it ─────────────────────────────────────────────

SUCCESS = Series(
    "engram_request_success_total", "counter", "Sequences that ended, by finish reason.", ("finished_reason",)
)
REFUSED = Series(
    "engram_admission_rejections_total",
    "counter",
    "Requests refused without being looked at: no key, a full queue (requests, tokens), a key's own limit.",
    ("reason",),
)
UNKNOWN_FIELDS = Series(
    "engram_request_unknown_fields_total", "counter", "Request fields that this server does not know and ignored."
)
PROMPT_LENGTH = Series("engram_request_prompt_tokens", "histogram", "Prompt tokens of a request.", buckets=TOKENS)
GENERATION_LENGTH = Series(
    "engram_request_generation_tokens", "histogram", "Tokens generated for a sequence.", buckets=TOKENS
)
LONGEST_GENERATION = Series(
    "engram_request_max_num_generation_tokens",
    "histogram",
    "Tokens of the longest of a request's n answers.",
    buckets=TOKENS,
)
MAX_TOKENS = Series("engram_request_params_max_tokens", "histogram", "max_tokens a request asked for.", buckets=TOKENS)
CHOICES = Series("engram_request_params_n", "histogram", "n a request asked for.", buckets=(1, 2, 5, 10, 20))
PREFILL_TOKENS = Series(
    "engram_request_prefill_kv_computed_tokens",
    "histogram",
    "Prompt tokens of a request that were computed, not found in the prefix cache.",
    buckets=TOKENS,
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
TIME_PER_TOKEN = Series(
    "engram_request_time_per_output_token_seconds",
    "histogram",
    "A sequence's mean time between two tokens.",
    buckets=BETWEEN_TOKENS,
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
DECODE = Series(
    "engram_request_decode_time_seconds",
    "histogram",
    "From a sequence's first token to its last.",
    buckets=MILLISECONDS_TO_MINUTES,
)
INFERENCE = Series(
    "engram_request_inference_time_seconds",
    "histogram",
    "From a sequence's first schedule to its last token.",
    buckets=MILLISECONDS_TO_MINUTES,
)

# ── HTTP, without /metrics, /health, /ready and /version ─────────────────────────────────────────────────────────────

HTTP_REQUESTS = Series(
    "engram_http_requests_total",
    "counter",
    "HTTP requests answered; status 499 stands for a client that left first.",
    ("method", "handler", "status"),
)
HTTP_SECONDS = Series(
    "engram_http_request_duration_seconds",
    "histogram",
    "From a request's arrival to its answer's last byte.",
    ("handler",),
    buckets=MILLISECONDS_TO_MINUTES,
)

# ── memory tables ────────────────────────────────────────────────────────────────────────────────────────────────────

TABLE = ("table", "layer")
MEMORY = "a memory attached"
MEMORY_ROWS = Series("engram_memory_rows_total", "counter", "Memory rows looked up.", TABLE, needs=MEMORY)
MEMORY_HITS = Series(
    "engram_memory_hits_total",
    "counter",
    "Rows looked up by where they were found: device (hot rows, or a table that lives there), pinned or mapped host "
    "memory. The tiers sum to engram_memory_rows_total.",
    (*TABLE, "tier"),
    needs=MEMORY,
)
MEMORY_PAGE_INS = Series(
    "engram_memory_page_ins_total", "counter", "Pages of the table asked for ahead of a read.", TABLE, needs=MEMORY
)
MEMORY_BYTES = Series(
    "engram_memory_bytes_total",
    "counter",
    "Bytes of memory rows moved: read (out of the table), to_device (over the host link; 0 on a CPU).",
    (*TABLE, "direction"),
    needs=MEMORY,
)
MEMORY_FETCH = Series(
    "engram_memory_fetch_seconds",
    "histogram",
    "From asking for a step's rows to having them.",
    TABLE,
    buckets=FETCHES,
    needs=MEMORY,
)
MEMORY_STALL = Series(
    "engram_memory_stall_seconds_total", "counter", "Seconds a layer waited for rows, in fact.", TABLE, needs=MEMORY
)
MEMORY_RESIDENT = Series(
    "engram_memory_resident_bytes",
    "gauge",
    "Bytes of the table in memory now, by tier, and how they were counted: mincore, sampled (mincore of part), touched "
    "(read, not dropped), copied; the device's hot rows are cached.",
    (*TABLE, "tier", "counted"),
    needs=MEMORY,
)
MEMORY_CAPACITY = Series(
    "engram_memory_cache_capacity_rows", "gauge", "Rows the hot-row cache has room for.", TABLE, needs=MEMORY
)
MEMORY_ADMISSIONS = Series(
    "engram_memory_admissions_total", "counter", "Entries let into the hot-row cache.", TABLE, needs=MEMORY
)
MEMORY_EVICTIONS = Series(
    "engram_memory_evictions_total", "counter", "Entries that made room for a hotter one.", TABLE, needs=MEMORY
)
HOT_LIST_AGE = Series(
    "engram_memory_hot_list_age_seconds",
    "gauge",
    "Age of the list of hot rows that the cache was warmed with or that was saved last.",
    TABLE,
    needs="a hot list",
)

# ── process and host ─────────────────────────────────────────────────────────────────────────────────────────────────

PROCESS = ("process",)
DISK_READ = Series(
    "engram_process_disk_read_bytes_total",
    "counter",
    "Bytes the process made the disk read, mapped pages included.",
    PROCESS,
    needs="Linux",
)
RESIDENT = Series(
    "engram_process_resident_bytes", "gauge", "Resident set, mapped pages included.", PROCESS, needs="Linux"
)
CPU_SECONDS = Series(
    "engram_process_cpu_seconds_total", "counter", "Processor seconds, user and system.", PROCESS, needs="Linux"
)
HOST_LIMIT = Series(
    "engram_host_memory_limit_bytes", "gauge", "Host memory the server may use: the flag's, the cgroup's or all of it."
)

# ── GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

GPU = ("gpu",)
NVIDIA = "an NVIDIA GPU"
GPU_USE = Series("engram_gpu_utilization_ratio", "gauge", "Share of time a kernel ran; 1 is all.", GPU, needs=NVIDIA)
GPU_USED = Series("engram_gpu_memory_used_bytes", "gauge", "Device memory in use, by all processes.", GPU, needs=NVIDIA)
GPU_TOTAL = Series("engram_gpu_memory_total_bytes", "gauge", "Device memory.", GPU, needs=NVIDIA)
GPU_POWER = Series("engram_gpu_power_watts", "gauge", "Power drawn.", GPU, needs=NVIDIA)
GPU_LINK = Series(
    "engram_gpu_host_link_bytes_total",
    "counter",
    "Bytes over the link to the host: to_device, to_host.",
    (*GPU, "direction"),
    needs="an NVIDIA GPU that counts them (Hopper or newer)",
)

# Where each section of the documentation begins.
SECTIONS: dict[Series, str] = {
    RUNNING: "Scheduler",
    KV_USAGE: "KV cache",
    PROMPT_TOKENS: "Tokens",
    SUCCESS: "Requests",
    HTTP_REQUESTS: "HTTP",
    MEMORY_ROWS: "Memory tables",
    DISK_READ: "Processes and host",
    GPU_USE: "GPU",
}

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Series))
HISTOGRAMS = {series.name: series for series in ALL if series.kind == "histogram"}

# What Kubernetes' inference gateways scrape, under the names they know (--vllm-metrics).
VLLM_ALIASES = {series.name.replace("engram_", "vllm:", 1): series for series in (RUNNING, WAITING, KV_USAGE)}


def buckets_from(overrides: Iterable[str]) -> Mapping[str, Bounds]:
    """Histogram name → bounds, with those of `--metrics-buckets` ("NAME=0.01:0.1:1") in place of the defaults.

    NAME may lack the prefix. Raises SettingsError.
    """
    bounds = {name: series.buckets for name, series in HISTOGRAMS.items()}
    for text in overrides:
        name, _, listed = text.partition("=")
        full = name if name.startswith("engram_") else f"engram_{name}"
        if full not in HISTOGRAMS:
            near = difflib.get_close_matches(full, HISTOGRAMS, n=1, cutoff=0.0)[0]
            raise SettingsError(f"--metrics-buckets names {name!r}, which is no histogram; did you mean {near}?")
        try:
            chosen = tuple(float(bound) for bound in listed.split(":"))
        except ValueError:
            chosen = ()
        if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < float("inf"):
            raise SettingsError(
                f"--metrics-buckets gives {name} the bounds {listed!r}; write rising numbers with colons between, such "
                f"as 0.01:0.1:1"
            )
        bounds[full] = chosen
    return bounds
