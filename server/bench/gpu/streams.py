"""Streams through the engine itself, without HTTP: prompts of the text, one answer after another in every stream.

    stream 0   submit ─ TTFT ─ token ─ ITL ─ token … ─ end, submit …
    stream 1   submit ─ …

The engine is the server's: scheduler, chunked prefill, decode steps on the device with one in flight. Forced tokens as
everywhere here: a row of the token table holds the text, whatever was sampled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.batch import Ints
from server.bench.gpu.arms import Memory
from server.bench.gpu.scene import BLOCK_SIZE, ForcedSteps, Scene
from server.memory.device_memory import DeviceMemory
from server.models.attention.paged import PagedBackend
from server.models.decoder import Decoder
from server.runtime.blocks import BlockPool
from server.runtime.device_runner import DeviceRunner
from server.runtime.messages import SamplingParams, Submit
from server.runtime.overlap import OverlappedEngine
from server.runtime.runner import Sizes

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512)
TOKEN_BUDGET = 8192


def engine_of(scene: Scene, model: Decoder, memory: Memory | None) -> OverlappedEngine:
    """An engine over the scene's keys and values."""
    count = len(scene.lengths)
    sizes = Sizes(max_num_seqs=count, max_len=scene.max_len, block_size=BLOCK_SIZE)
    attention = PagedBackend(scene.config, scene.cache)
    memories = memory.memories if memory is not None else None
    device_memory = DeviceMemory(memories, count) if memories is not None else None
    if device_memory is not None:
        device_memory.serve_fetches()
    steps = ForcedSteps(
        model,
        attention,
        device_memory,
        **sizes,
        window=memories.window if memories is not None else 1,
        device=scene.device,
        dummy_block=scene.dummy_block,
        buckets=[size for size in BUCKETS if size < count] + [count],
        graphs=scene.device.type == "cuda",
    )
    steps.capture()
    steps.tell(scene.text(0))
    runner = DeviceRunner(steps, model, attention, memories, **sizes, device=scene.device)
    return OverlappedEngine(
        runner,
        BlockPool(scene.dummy_block, BLOCK_SIZE, prefix_cache=False),
        max_num_seqs=count,
        max_num_batched_tokens=TOKEN_BUDGET,
        max_model_len=scene.max_len,
        vocab_size=scene.config.vocab_size,
        eos_ids=(),
        max_waiting=2 * count,
        packs=dict(memory.view.packs) if memory is not None else None,
    )


@dataclass(slots=True)
class Streams:
    """`prompts` go round. Times in seconds; `busy`: of every step the host's own work, waiting for tokens left out."""

    engine: OverlappedEngine
    prompts: Sequence[Ints]
    new_tokens: int
    packs: tuple[str, ...] = ()
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    tokens: int = 0
    wall: float = 0.0
    busy: list[float] = field(default_factory=list)
    _asked: dict[str, float] = field(default_factory=dict)
    _last: dict[str, float] = field(default_factory=dict)
    _number: int = 0

    def run(self, streams: int, seconds: float, requests: int = 0) -> None:
        """So many streams for about so many seconds, or so many requests in all and to their end."""
        device_steps = self.engine.runner.steps
        assert isinstance(device_steps, ForcedSteps)
        begun = time.perf_counter()
        for _ in range(streams):
            self._submit()
        while self._asked:
            over = self._number >= requests if requests else time.perf_counter() > begun + seconds
            ended = self._step(device_steps)
            for _ in range(0 if over else ended):
                self._submit()
            if over and not requests:
                break
        self.wall = time.perf_counter() - begun
        for name in list(self._asked):
            self.engine.abort(name)
        while self.engine.scheduler.running or self.engine.scheduler.waiting:
            self.engine.step()

    def _submit(self) -> None:
        name, prompt = str(self._number), self.prompts[self._number % len(self.prompts)]
        self._number += 1
        params = SamplingParams(max_tokens=self.new_tokens, temperature=0, ignore_eos=True)
        self._asked[name] = time.perf_counter()
        self.engine.submit(Submit(name, tuple(prompt.tolist()), params, self.packs))

    def _step(self, device_steps: ForcedSteps) -> int:
        """One step; how many answers ended."""
        begun, waited = time.perf_counter(), device_steps.waited
        outputs, ended = self.engine.step().outputs, 0
        now = time.perf_counter()
        self.busy.append(now - begun - (device_steps.waited - waited))
        for output in outputs:
            if output.error is not None:
                raise output.error
            name, count = output.request_id, len(output.token_ids)
            if name not in self._asked:
                continue
            self.tokens += count
            if count and name in self._last:
                self.itl.append(now - self._last[name])
            elif count:
                self.ttft.append(now - self._asked[name])
            if count:
                self._last[name] = now
            if output.finish_reason is not None:
                ended += 1
                self._asked.pop(name)
                self._last.pop(name, None)
        return ended

    def figures(self) -> dict[str, Any]:
        ttft, itl = (np.array(times or [0.0]) * 1e3 for times in (self.ttft, self.itl))
        return {
            "tokens_per_s": self.tokens / self.wall,
            "ttft_ms": {"p50": float(np.percentile(ttft, 50)), "p99": float(np.percentile(ttft, 99))},
            "itl_ms": {"p50": float(np.percentile(itl, 50)), "p99": float(np.percentile(itl, 99))},
            "host_step_us": float(np.median(self.busy)) * 1e6,
            "steps": len(self.busy),
            "answers_begun": len(self.ttft),
        }


def prompts_of(scene: Scene) -> list[Ints]:
    """The scene's lengths of the text, from other places than its waves."""
    ids = scene.trace.pieces(
        len(scene.lengths), scene.max_len, scene.config.vocab_size, languages=scene.languages, first=4099
    )
    return [row[:length] for row, length in zip(ids, scene.lengths.tolist(), strict=True)]
