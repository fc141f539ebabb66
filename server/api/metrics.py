"""The values that the API process counts itself, and the exposition of all. Names and meanings: `server/metrics.py`.

A token must cost next to nothing: plain lists and floats of the one event loop, without locks, that become Prometheus
families only when someone scrapes. The engine's totals are read from its latest statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.registry import Collector

from server import metrics
from server.api.engine_metrics import engine_families, gateway_families
from server.api.families import Buckets, Labels, Observations, family, histogram
from server.api.gpu_metrics import Gpus
from server.api.process_metrics import host_families, process_families
from server.metrics import Bounds, Series
from server.runtime.client import EngineClient
from server.runtime.messages import FinishReason, StepOutputs
from server.settings import Settings


class RequestMetrics:
    """What the API process counts itself. `buckets`: histogram name → bounds, those of `--metrics-buckets`."""

    def __init__(self, buckets: Mapping[str, Bounds] | None = None) -> None:
        self._bounds = metrics.buckets_from(()) if buckets is None else buckets
        self._histograms: dict[Series, Observations] = {}
        self.first_token = self._histogram(metrics.TTFT)
        self.between_tokens = self._histogram(metrics.INTER_TOKEN)
        self.time_per_token = self._histogram(metrics.TIME_PER_TOKEN)
        self.end_to_end = self._histogram(metrics.E2E)
        self.queue = self._histogram(metrics.QUEUE)
        self.prefill = self._histogram(metrics.PREFILL)
        self.decode = self._histogram(metrics.DECODE)
        self.inference = self._histogram(metrics.INFERENCE)
        self.prompt_length = self._histogram(metrics.PROMPT_LENGTH)
        self.prefill_length = self._histogram(metrics.PREFILL_TOKENS)
        self.generation_length = self._histogram(metrics.GENERATION_LENGTH)
        self.longest_generation = self._histogram(metrics.LONGEST_GENERATION)
        self.max_tokens = self._histogram(metrics.MAX_TOKENS)
        self.choices = self._histogram(metrics.CHOICES)
        self.step_tokens = self._histogram(metrics.STEP_TOKENS)
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = self.unknown_fields = 0
        reasons: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
        self.finished: Counter[FinishReason] = Counter(dict.fromkeys(reasons, 0))
        self.refused: Counter[str] = Counter(dict.fromkeys(("unauthorized", "requests", "tokens", "concurrency"), 0))
        self.http: Counter[Labels] = Counter()  # (method, handler, status)
        self.http_seconds: dict[str, Observations] = {}
        self.fetch_bounds = self._bounds[metrics.MEMORY_FETCH.name]

    def step(self, outputs: StepOutputs) -> None:
        """A step listener of the engine's client."""
        if outputs.tokens:
            self.step_tokens.observe(outputs.tokens)

    def started(self, prompt: int, cached: int, ttft: float, queued: float, prefill: float) -> None:
        """A request has its first token: lengths in tokens, times in seconds."""
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.prompt_length.observe(prompt)
        self.prefill_length.observe(prompt - cached)
        self.first_token.observe(ttft)
        self.queue.observe(queued)
        self.prefill.observe(prefill)

    def completed(self, n: int, max_tokens: int, longest: int) -> None:
        """All n sequences of a request that had a token have ended; `longest` in tokens."""
        self.choices.observe(n)
        self.max_tokens.observe(max_tokens)
        self.longest_generation.observe(longest)

    def ended(self, tokens: int, inference: float, decode: float) -> None:
        """A sequence that had a token has ended."""
        self.generation_length.observe(tokens)
        self.inference.observe(inference)
        self.decode.observe(decode)
        if tokens > 1:
            self.time_per_token.observe(decode / (tokens - 1))

    def answered(self, method: str, handler: str, status: int, seconds: float) -> None:
        """An HTTP request is over."""
        self.http[method, handler, str(status)] += 1
        observations = self.http_seconds.get(handler)
        if observations is None:
            bounds = self._bounds[metrics.HTTP_SECONDS.name]
            observations = self.http_seconds[handler] = Observations(bounds)
        observations.observe(seconds)

    def families(self, model: str) -> Iterator[Metric]:
        for series, observed in self._histograms.items():
            yield histogram(series, model, {(): (observed.cumulative(), observed.sum)})
        computed = self.prompt_tokens - self.cached_tokens
        sources: dict[Labels, float] = {("local_compute",): computed, ("local_cache_hit",): self.cached_tokens}
        yield family(metrics.PROMPT_TOKENS, model, {(): self.prompt_tokens})
        yield family(metrics.PROMPT_TOKENS_BY_SOURCE, model, sources)
        yield family(metrics.PROMPT_TOKENS_CACHED, model, {(): self.cached_tokens})
        yield family(metrics.GENERATION_TOKENS, model, {(): self.generation_tokens})
        yield family(metrics.UNKNOWN_FIELDS, model, {(): self.unknown_fields})
        yield family(metrics.SUCCESS, model, {(reason,): count for reason, count in self.finished.items()})
        yield family(metrics.REFUSED, model, {(reason,): count for reason, count in self.refused.items()})
        yield family(metrics.HTTP_REQUESTS, model, dict(self.http))
        seconds: dict[Labels, Buckets] = {
            (handler,): (o.cumulative(), o.sum) for handler, o in self.http_seconds.items()
        }
        yield histogram(metrics.HTTP_SECONDS, model, seconds)

    def _histogram(self, series: Series) -> Observations:
        made = self._histograms[series] = Observations(self._bounds[series.name])
        return made


class Scrape(Collector):
    """Everything this server exports but what prometheus_client knows of its own process."""

    def __init__(self, requests: RequestMetrics, engine: EngineClient, model: str, settings: Settings) -> None:
        self._requests, self._engine, self._model, self._settings = requests, engine, model, settings
        self._gpus = Gpus()

    def collect(self) -> Iterable[Metric]:
        model, stats = self._model, self._engine.stats
        yield from engine_families(stats, model, self._settings.block_size, self._requests.fetch_bounds)
        if self._settings.vllm_metrics:
            yield from gateway_families(stats, model)
        yield from self._requests.families(model)
        yield from process_families(model, {"api": None, "engine": self._engine.pid})
        yield from host_families(model, self._settings.host_memory_limit)
        yield from self._gpus.families(model)


def registry(requests: RequestMetrics, engine: EngineClient, model: str, settings: Settings) -> CollectorRegistry:
    """A registry of its own: two apps in one process do not share numbers. Adds the API process's CPU and memory."""
    own = CollectorRegistry()
    own.register(Scrape(requests, engine, model, settings))
    ProcessCollector(registry=own)
    return own
