"""Service: what every route needs, in one place. Names and memories of this server, its engine, its tokenizer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from server.api.auth import Caller, Keys
from server.api.edits.live import LiveEdits
from server.api.limits import Admission
from server.api.metrics import RequestMetrics
from server.api.schemas import MemoryChoice
from server.errors import NotReady, UnknownModelName
from server.metrics import buckets_from
from server.models.renderer import Renderer
from server.models.source import ModelSource
from server.runtime.client import EngineClient
from server.runtime.detokeniser import Pieces
from server.runtime.names import model_of
from server.settings import Settings

# Normalisers may shorten a text before it is cut into tokens: Hangul letters compose three to one.
COMPOSITION = 4


@dataclass(slots=True)
class Service:
    """`longest_piece`: no token covers more characters of a text than this."""

    settings: Settings
    client: EngineClient
    source: ModelSource
    keys: Keys | None = None
    metrics: RequestMetrics = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    admission: Admission = field(init=False)
    edits: LiveEdits = field(init=False)
    pieces: Pieces = field(init=False)
    longest_piece: int = field(init=False)
    renderer: Renderer | None = field(init=False)  # None: the model has no chat template

    def __post_init__(self) -> None:
        self.metrics = RequestMetrics(buckets_from(self.settings.metrics_buckets))
        self.client.step_listeners.append(self.metrics.step)
        self.admission = Admission(self.settings, self.metrics)
        tokenizer = self.source.tokenizer
        end = next(iter(tokenizer.eos_token_ids), None)
        knows = self.keys.knows if self.keys is not None else lambda name: True
        self.edits = LiveEdits(self.settings, self.client, tokenizer.encode, end, knows)
        template = self.source.chat_template
        self.renderer = Renderer(template) if template is not None else None
        self.pieces = Pieces(self.source.tokenizer)
        vocabulary = self.source.tokenizer.backend.get_vocab(with_added_tokens=True)
        self.longest_piece = COMPOSITION * max(map(len, vocabulary))

    @property
    def name(self) -> str:
        """The default model."""
        return self.client.ready.models[0][0]

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.client.ready.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.client.ready.vocab_size

    def model(self, asked: str | None, memory: MemoryChoice | None = None) -> tuple[str, tuple[str, ...]]:
        """A served name and the memories that a request under it reads. Raises UnknownModelName."""
        ready = self.client.ready
        name = asked or self.name
        packs = model_of(name, ready.name, ready.packs, ready.fixed)
        if packs is None:
            served = ", ".join(served for served, _ in ready.models)
            raise UnknownModelName(
                f"the model {name[:200]!r} does not exist here; this server has {served}", param="model"
            )
        return name, () if memory is not None and not memory.enabled else packs

    def check_open(self, caller: Caller) -> None:
        """Raises NotReady or QueueFull if a request that generates would be refused whatever it asks for."""
        self._check_alive()
        self.admission.check(caller)

    def check_ready(self) -> None:
        """Raises NotReady unless all that is served can be: the engine takes requests, every table is readable."""
        self._check_alive()
        if self.client.stats.table_fault is not None:
            raise NotReady(f"a memory table cannot be read: {self.client.stats.table_fault}")

    def _check_alive(self) -> None:
        if not self.client.alive:
            why = f" ({self.client.ended})" if self.client.ended else ""
            raise NotReady(f"the engine is gone{why}; restart the server")
        if self.client.draining:
            raise NotReady("the server is draining and takes no new requests")
