"""B sequences in the middle of their answers on one backbone: keys and values, blocks, and the tokens to come.

    lengths[B] ~ uniform(100, 1024) ─ a wave of W steps from there ─ back to the lengths, further on in the text

What a cache of keys and values holds is random: attention reads as much of it whatever it says. All arms of an
experiment share the cache and the weights, take a wave in turn, and read the same forced tokens: the sampled one is
computed and written, then the text's is copied over it on the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.batch import Bools, Ints
from server.bench.gpu.models import dtype_of
from server.bench.gpu.trace import Trace
from server.errors import CapacityError
from server.models.attention.kv_cache import KVCache, kv_bytes_per_token
from server.models.attention.paged import PagedBackend
from server.models.config import ModelConfig
from server.models.decoder import Decoder
from server.runtime.decode_inputs import Sampling
from server.runtime.decode_step import DecodeSteps, Launched
from server.view import MemoryView

BLOCK_SIZE = 32
SHORTEST, LONGEST = 100, 1024
SPARE_DEVICE = 3 << 30  # bytes left on the device for activations, graphs and logits


def drawn_lengths(count: int, longest: int = LONGEST, seed: int = 0) -> Ints:
    """The paper's: uniform(100, 1024)."""
    lengths: Ints = np.random.default_rng(seed).integers(min(SHORTEST, longest // 2), longest, count)
    return lengths


def check_room(lengths: Ints, wave: int, bytes_per_token: int, device: torch.device) -> None:
    """Raises CapacityError with the number of sequences that do fit."""
    if device.type == "cpu":
        return
    free = torch.cuda.mem_get_info(device)[0] - SPARE_DEVICE
    needed = int(slots_of(lengths, wave).sum()) * bytes_per_token
    if needed > free:
        fits = int(len(lengths) * max(free, 0) / needed)
        raise CapacityError(
            f"{len(lengths)} sequences need {needed / (1 << 30):.1f} GiB of keys, values and convolution inputs and "
            f"{free / (1 << 30):.1f} GiB are free on the device; set SEQUENCES={fits // 8 * 8 or fits}"
        )


def slots_of(lengths: Ints, wave: int) -> Ints:
    """[B] token slots, in whole blocks."""
    slots: Ints = -(-(lengths + wave + 1) // BLOCK_SIZE) * BLOCK_SIZE
    return slots


@dataclass(frozen=True, slots=True)
class Scene:
    """blocks[B, N] of the sequences; block 0 pads, the last one is for dummies. `config`: of the backbone."""

    config: ModelConfig
    lengths: Ints
    wave: int
    blocks: Ints
    cache: KVCache
    device: torch.device
    trace: Trace
    languages: int

    @classmethod
    def of(
        cls, config: ModelConfig, lengths: Ints, wave: int, device: torch.device, *, languages: int, conv: int = 0
    ) -> Scene:
        """`conv`: bytes a token slot that memories will take beside keys and values. Raises CapacityError."""
        dtype = dtype_of(config, device)
        check_room(lengths, wave, kv_bytes_per_token(config, dtype) + conv, device)
        pages = slots_of(lengths, wave) // BLOCK_SIZE
        blocks, first = np.zeros((len(lengths), int(pages.max())), np.int64), 1
        for row, count in enumerate(pages.tolist()):
            blocks[row, :count] = np.arange(first, first + count)
            first += count
        cache = KVCache(config, first + 1, BLOCK_SIZE, dtype, device)
        generator = torch.Generator(device=device).manual_seed(1)
        for layer in cache.layers:
            layer.normal_(0.0, 1.0, generator=generator)
        return cls(config, lengths, wave, blocks, cache, device, Trace.stored(), languages)

    @property
    def max_len(self) -> int:
        return int(self.lengths.max()) + self.wave + 1

    @property
    def num_slots(self) -> int:
        return len(self.cache.layers[0]) * BLOCK_SIZE

    @property
    def dummy_block(self) -> int:
        return len(self.cache.layers[0]) - 1

    def text(self, wave: int) -> Ints:
        """[B, max_len] the ids of every position in the wave of this number."""
        return self.trace.pieces(
            len(self.lengths), self.max_len, self.config.vocab_size, languages=self.languages, first=wave * self.wave
        )

    def kv_bytes(self, step: int, count: int) -> int:
        """Keys and values that this step of a wave reads for the first `count` sequences."""
        tokens = int(self.lengths[:count].sum()) + count * (step + 1)
        return tokens * kv_bytes_per_token(self.config, self.cache.layers[0].dtype)


class ForcedSteps(DecodeSteps):
    """Decode steps whose sampled tokens the text replaces; they are copied to the host as sampled.

    `text`: what each row of the token table holds. `waited`: seconds that the host waited for tokens.
    """

    text: Tensor | None = None
    waited = 0.0

    def launch(self, *arguments: Any, **named: Any) -> Launched:
        launched = super().launch(*arguments, **named)
        if self.text is None:
            self.text = torch.zeros_like(self.tokens)
        with torch.inference_mode():
            self.tokens.copy_(self.text)
        return Waited(launched, self)

    def tell(self, ids: Ints) -> None:
        """ids[B, P] of the first B rows' positions; other rows hold 0."""
        told = torch.zeros_like(self.tokens)
        told[: len(ids), self.pad : self.pad + ids.shape[1]] = torch.from_numpy(ids).to(self.device)
        with torch.inference_mode():
            self.tokens.copy_(told)
        self.text = told


class Waited(Launched):
    """A step on its way that tells its steps how long the host waited for it."""

    def __init__(self, launched: Launched, steps: ForcedSteps) -> None:
        self.launched, self.steps, self.logits = launched, steps, launched.logits

    def tokens(self) -> list[int]:
        begun = time.perf_counter()
        found = self.launched.tokens()
        self.steps.waited += time.perf_counter() - begun
        return found


class DeviceArm:
    """Decode steps over the scene: graphs where there is a GPU."""

    def __init__(
        self,
        scene: Scene,
        model: Decoder,
        memory: Any,
        views: Sequence[MemoryView],
        window: int,
        buckets: Sequence[int] = (),
    ) -> None:
        self.scene, self.window, count = scene, window, len(scene.lengths)
        self.views, self.rows = list(views), np.arange(count)
        self._text, self._last = scene.text(0), None  # type: tuple[Ints, Launched | None]
        self.steps = ForcedSteps(
            model,
            PagedBackend(scene.config, scene.cache),
            memory,
            max_num_seqs=count,
            max_len=scene.max_len,
            block_size=BLOCK_SIZE,
            window=window,
            device=scene.device,
            dummy_block=scene.dummy_block,
            buckets=buckets or (count,),
            graphs=scene.device.type == "cuda",
        )
        self.steps.write_blocks(self.rows, padded(scene.blocks, self.steps.blocks.shape[1]))
        self.steps.capture()

    @property
    def graphs(self) -> int:
        """How many were captured."""
        return len(self.steps.captured)

    @property
    def parts(self) -> int:
        """Of the largest graph: it is cut where the host brings rows."""
        graph = self.steps.captured.get(self.steps.most)
        return len(graph.parts) if graph is not None else 0

    def enter(self, wave: int) -> None:
        """The tokens of this wave, on the device and on the host."""
        self._text = self.scene.text(wave)
        self.steps.tell(self._text)

    def launch(self, step: int, count: int = 0) -> Launched:
        """The step-th step of a wave, of the first `count` sequences (0: all); the text replaces what was sampled."""
        some = slice(count or len(self.rows))
        positions = self.scene.lengths[some] + step
        blocks = self.scene.blocks[self.rows[some], positions // BLOCK_SIZE]
        self._last = self.steps.launch(
            self.rows[some],
            positions,
            blocks,
            self._greedy(len(positions)),
            self.views[some],
            windows=partial(self._windows, self.rows[some], positions, self._last),
        )
        return self._last

    @staticmethod
    def _greedy(count: int) -> Sampling:
        return Sampling.plain(np.zeros(count), np.zeros(count, np.int64))

    def _windows(self, rows: Ints, positions: Ints, last: Launched | None) -> tuple[Ints, Bools]:
        """The text's n-grams, where the host brings their rows: known only once the step before is over, as those of
        sampled tokens are."""
        if last is not None:
            last.tokens()
        at = positions[:, None] - np.arange(self.window)
        return self._text[rows[:, None], np.maximum(at, 0)], at < 0


def padded(blocks: Ints, pages: int) -> Ints:
    """blocks[B, N] with block 0 up to `pages` columns."""
    wide = np.zeros((len(blocks), pages), np.int64)
    wide[:, : blocks.shape[1]] = blocks
    return wide
