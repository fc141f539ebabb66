"""Decode steps over static tensors: one token a sequence, from the device's token table back into it.

    tokens[row, position] ─ embed ─ blocks, with memory ─ norm ─ logits ─ sample ─► tokens[row, position + 1]

Captured once per bucket as a CUDA graph and replayed; called as it is on a CPU, or with graphs off. A step's input
token is already on the device when the step before it has been launched, so that the host may launch the next step
before it has read the last one's tokens. What is launched runs in stream order, one step after another. A memory whose
rows only the host can read has its say in the midst of a launch, and does wait for the last step's tokens there: the
graph is cut at the layers that read it (`decode_graph.py`).

A bucket is filled up with dummies: they read and write a row of the token table and a KV block of their own.

Shapes: B sequences of a bucket, N pages of the longest context, V vocabulary. Knows rows, positions and blocks;
nothing of sequences, requests or scheduling.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from kernels.sampling import Filters, sample
from server.batch import Bools, DecodeBatch, Ints
from server.errors import CapacityError
from server.memory.staged_rows import Place, Windows
from server.models.attention.paged import PagedBackend
from server.models.decoder import Decoder, MemoryStep
from server.runtime.decode_graph import DecodeGraph, ran_out
from server.runtime.decode_inputs import Sampling, StepInputs
from server.runtime.launched import Launched, Turn
from server.view import MemoryView

logger = logging.getLogger(__name__)

WARM_UPS = 2  # before a capture: the first compiles, the second finds what the first left behind

Arrive = Callable[[Place], None]


class DeviceMemoryStep(MemoryStep, Protocol):
    """A step's memory, forked onto a stream of its own."""

    def join(self) -> None:
        """Lets the step's stream wait for what was forked."""


class DeviceMemory(Protocol):
    """The packs whose rows are read within a decode step. K packs, in the order of attachment."""

    @property
    def up_layers(self) -> frozenset[int]:
        """The layers whose up-projection it replaces."""

    def serve_fetches(self) -> None:
        """Rows that the host asks for, as prefills do, are read by the device too, where it can."""

    def serves(self, views: Sequence[MemoryView], positions: Ints | None = None) -> bool:
        """Whether a decode step of these views, at positions[B], can be done on the device."""

    def sees(self, views: Sequence[MemoryView]) -> Bools:
        """[K, B] which of B views see which pack; B may be 0."""

    def prepare(
        self,
        views: Sequence[MemoryView],
        askers: Ints | None = None,
        positions: Ints | None = None,
        windows: Windows | None = None,
    ) -> None:
        """Before each launch: writes what varies to static tensors. Arguments as those of `DecodeSteps.launch`."""

    def begin(self, batch: DecodeBatch, arrive: Arrive) -> DeviceMemoryStep:
        """Within the step: hashes and lookups, forked onto a side stream. The step calls `arrive` before each place
        whose rows the host brings; nothing is left on the side stream then."""

    def arrive(self, place: Place) -> None:
        """Within a launch: the rows that the host brings to this place. May wait for the step before."""

    def between(self, batch: DecodeBatch) -> None:
        """After each launch, without waiting: counters and admission."""


def bucket_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, 32, … and `most` itself."""
    return tuple(sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most}))


class DecodeSteps:
    """`max_len`: the longest context; `window`: how far back memory looks; `dummy_block`: a KV block that only dummies
    use. `buckets`: batch sizes, `bucket_sizes(max_num_seqs)` by default; `graphs`: replay captured graphs.
    """

    def __init__(
        self,
        model: Decoder,
        attention: PagedBackend,
        memory: DeviceMemory | None,
        *,
        max_num_seqs: int,
        max_len: int,
        block_size: int,
        window: int,
        device: torch.device,
        dummy_block: int,
        buckets: Sequence[int] = (),
        graphs: bool,
    ) -> None:
        self.model, self.attention, self.memory, self.device = model, attention, memory, device
        self.buckets = tuple(sorted(buckets)) or bucket_sizes(max_num_seqs)
        self.most, self.pad, self.graphs = self.buckets[-1], window - 1, graphs
        self.captured: dict[int, DecodeGraph[Place]] = {}
        self.capture_seconds, self.capture_bytes = 0.0, 0
        self._shared: tuple[torch.cuda.Stream, Any] | None = None  # the stream of all captures, and their memory pool
        self._dummies = {"dummy_row": max_num_seqs, "dummy_block": dummy_block, "block_size": block_size}
        # one row more, for dummies; one position more, for the token after the longest context
        self.tokens = torch.zeros(max_num_seqs + 1, self.pad + max_len + 1, dtype=torch.int64, device=device)
        self.blocks = torch.zeros(max_num_seqs + 1, -(-max_len // block_size), dtype=torch.int64, device=device)
        self.inputs = self._inputs(memory)
        self._block_table = torch.zeros(self.most, self.blocks.shape[1], dtype=torch.int64, device=device)
        self._logits = torch.zeros(self.most, model.config.vocab_size, dtype=torch.float32, device=device)
        self._sampled = torch.zeros(self.most, dtype=torch.int64, device=device)
        self._turns = [Turn(self.most, pinned=device.type == "cuda") for _ in range(2)]
        self._batches = {bucket: self._batch(bucket) for bucket in self.buckets}

    @torch.inference_mode()
    def renew(self, memory: DeviceMemory, window: int) -> None:
        """Another memory from the next launch on, once the device has done all it was given. Graphs are captured anew,
        each before its first use: a tenth of a second here and there, and not seconds at once. Raises what allocating
        raises; nothing changes then."""
        inputs, pad, tokens = self._inputs(memory), max(window - 1, self.pad), self.tokens
        if pad > self.pad:
            tokens = torch.zeros(len(tokens), tokens.shape[1] + pad - self.pad, dtype=torch.int64, device=self.device)
            tokens[:, pad:] = self.tokens[:, self.pad :]
        self.memory, self.inputs, self.pad, self.tokens = memory, inputs, pad, tokens
        self.captured.clear()
        self._shared = None
        self._batches = {bucket: self._batch(bucket) for bucket in self.buckets}

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Computes the largest step once, of dummies alone, memory included. Raises what its kernels raise."""
        self._compute(self._batches[self.most], self._arrive)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Warms up and captures every bucket, the largest first, over one shared memory pool.

        progress(done, all) is told of every bucket. Raises CapacityError if the device has no room; graphs are off
        then. Nothing to do without graphs.
        """
        if not self.graphs:
            return
        begun, free, bucket = time.perf_counter(), torch.cuda.mem_get_info(self.device)[0], self.most
        try:
            for done, bucket in enumerate(reversed(self.buckets), 1):
                self._capture(bucket)
                if progress is not None:
                    progress(done, len(self.buckets))
        except Exception as error:
            if not ran_out(error):
                raise
            self.give_up_graphs()
            raise CapacityError(no_room(bucket, self.most, free)) from error
        self.capture_seconds = time.perf_counter() - begun
        self.capture_bytes = max(free - torch.cuda.mem_get_info(self.device)[0], 0)

    def give_up_graphs(self) -> None:
        """From now on steps are computed as they are."""
        self.graphs = False
        self.captured.clear()
        torch.cuda.empty_cache()

    def _capture_late(self, bucket: int) -> None:
        """A graph that is missing since the memory changed. Where that fails steps are computed as they are."""
        self.inputs.clear()
        if self.memory is not None:
            self.memory.prepare(())
        try:
            self._capture(bucket)
        except Exception:
            logger.warning("decode steps run without CUDA graphs: one could not be captured anew", exc_info=True)
            self.give_up_graphs()

    @torch.inference_mode()
    def _capture(self, bucket: int) -> None:
        """All inputs are dummies. Kernels are compiled and workspaces allocated before, on the capturing stream, which
        all buckets share: cuBLAS keeps a workspace per stream.
        """
        if self._shared is None:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._shared = stream, torch.cuda.graph_pool_handle()
        batch, (stream, pool) = self._batches[bucket], self._shared
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._compute(batch, self._arrive)
        stream.synchronize()
        self.captured[bucket] = DecodeGraph.captured(lambda cut: self._compute(batch, cut), pool, stream)

    @torch.inference_mode()
    def launch(
        self,
        rows: Ints,
        positions: Ints,
        blocks: Ints,
        sampling: Sampling,
        views: Sequence[MemoryView],
        askers: Ints | None = None,
        windows: Windows | None = None,
    ) -> Launched:
        """Computes the next token of B sequences; returns at once, or once the host has brought their rows.

        rows[B], positions[B] of the tokens to compute, which stand in the token table; blocks[B]: the KV block of
        each position, entered into the rows of the block table by the step itself; views[B]; askers[B]: which request
        each is of, where anybody counts; windows(): the n-grams that end at these tokens and what of them is blocked,
        [B, n], asked for where the host reads rows, in the midst of the launch. The sampled tokens are written at the
        next position.
        """
        count = len(rows)
        bucket = next(size for size in self.buckets if size >= count)
        if self.graphs and bucket not in self.captured:
            self._capture_late(bucket)
        batch = self._batches[bucket]
        if self.memory is not None:
            self.memory.prepare(views, askers, positions, windows)
        sees = self.memory.sees(views) if self.memory is not None else np.zeros((0, count), np.bool_)
        self.inputs.send(bucket, rows, positions, blocks, sampling, sees)
        if bucket in self.captured:
            self.captured[bucket].replay(self._arrive)
        else:
            self._compute(batch, self._arrive)
        launched = self._read(count)
        if self.memory is not None:
            self.memory.between(batch)
        return launched

    def _read(self, count: int) -> Launched:
        """Begins the copy of the sampled tokens to the host."""
        turn = self._turns.pop(0)
        self._turns.append(turn)
        turn.finish()
        turn.host[:count].copy_(self._sampled[:count], non_blocking=True)
        if turn.done is not None:
            turn.done.record()
        turn.launched = Launched(turn.host[:count], self._logits[:count], turn.done)
        return turn.launched

    def _inputs(self, memory: DeviceMemory | None) -> StepInputs:
        packs = len(memory.sees(())) if memory is not None else 0
        return StepInputs(self.most, packs, **self._dummies, device=self.device)

    def _batch(self, bucket: int) -> DecodeBatch:
        fields = self.inputs.fields
        return DecodeBatch(
            tokens=self.tokens,
            pad=self.pad,
            row_of=fields.lane("row_of")[:bucket],
            positions=fields.lane("positions")[:bucket],
            block_table=self._block_table[:bucket],
            context_len=fields.lane("context_len")[:bucket],
            slots=fields.lane("slots")[:bucket],
            sees=fields.sees[:, :bucket],
            block_size=self.inputs.block_size,
        )

    def _arrive(self, place: Place) -> None:
        assert self.memory is not None  # nobody else asks
        self.memory.arrive(place)

    def _compute(self, batch: DecodeBatch, arrive: Arrive) -> None:
        """What a graph holds."""
        fields, bucket = self.inputs.fields, batch.num_tokens
        self.blocks.index_put_((batch.row_of, fields.lane("pages")[:bucket]), fields.lane("blocks")[:bucket])
        torch.index_select(self.blocks, 0, batch.row_of, out=batch.block_table)
        memory = self.memory.begin(batch, arrive) if self.memory is not None else None
        self.attention.plan_decode(batch)
        hidden = self.model.states(batch.token_ids, batch.positions, self.attention, memory)
        logits = self.model.logits(hidden, out=self._logits[:bucket])
        top_k, top_p, min_p, heat, seeds = (
            fields.lane(name)[:bucket] for name in ("top_k", "top_p", "min_p", "temperature", "seeds")
        )
        everything = torch.where(top_k > 0, top_k, logits.shape[1])
        sampled = sample(logits, heat, seeds, batch.context_len, Filters(everything, top_p, min_p))
        self.tokens.index_put_((batch.row_of, self.pad + batch.context_len), sampled)
        self._sampled[:bucket].copy_(sampled)
        if memory is not None:
            memory.join()

    @torch.inference_mode()
    def write_tokens(self, rows: Ints, positions: Ints, ids: Ints) -> None:
        """rows[M], positions[M], ids[M] into the token table. Of a fresh sequence the last `window` ids are enough."""
        row, column, token = torch.from_numpy(np.stack((rows, self.pad + positions, ids))).to(self.device)
        self.tokens.index_put_((row, column), token)

    @torch.inference_mode()
    def write_blocks(self, rows: Ints, blocks: Ints) -> None:
        """blocks[M, N], padded with block 0, into rows[M] of the block table: of sequences that did not decode here."""
        self.blocks.index_copy_(0, torch.from_numpy(rows).to(self.device), torch.from_numpy(blocks).to(self.device))


def no_room(bucket: int, most: int, free: int) -> str:
    """What to lower, and to what value, if the graph of a bucket does not fit."""
    return (
        f"{free} bytes were free on the device and the decode graph of {bucket} sequences does not fit; set "
        f"--max-num-seqs {max(most // 2, 1)}, lower --kv-bytes or start with --cuda-graphs off"
    )
