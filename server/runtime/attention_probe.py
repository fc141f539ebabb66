"""Paged attention, tried and timed at start in this model's shapes: is it right, and whose is faster?

    our kernels against torch's scaled_dot_product_attention     wrong: they are not used, nor anything paged
    torch's varlen_attn against the same                         wrong, refused or not there: our kernels serve
    both timed, as CUDA graphs                                   the one that decodes faster serves

What is timed are zeros, written over the zeros of the cache that will serve. Knows shapes and blocks, no settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from torch import Tensor

from server.batch import Batch, DecodeBatch
from server.models.attention import varlen
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.attention.sdpa import SdpaBackend
from server.models.attention.varlen import VarlenBackend
from server.models.config import ModelConfig
from server.runtime.decode_graph import DecodeGraph
from server.view import BARE

logger = logging.getLogger(__name__)

TRIAL_BLOCK = 16
TRIAL_PAGES, TRIAL_COLUMNS = 4, 8  # blocks of a sequence; of its block table, which is wider than contexts, as served
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of values around 1, TF32 allowed for
TIMED_SEQUENCES, TIMED_CONTEXT, TIMED_CHUNK = 32, 1024, 512  # decode: so many contexts; prefill: the end of one
TIMED_RUNS = 5


@torch.inference_mode()
def choose_paged(config: ModelConfig, cache: KVCache) -> tuple[PagedBackend, str]:
    """Our kernels, or torch's varlen_attn where it decodes faster; and the words of the start-up report."""
    ours = PagedBackend(config, cache)
    reason = varlen_unfit(config, cache)
    if reason is not None:
        return ours, f"paged, by our kernels ({reason})"
    theirs = VarlenBackend(config, cache)
    try:
        (our_decode, our_prefill), (their_decode, their_prefill) = step_times(ours), step_times(theirs)
    except Exception as error:
        logger.debug("attention could not be timed", exc_info=True)
        return ours, f"paged, by our kernels (torch's varlen_attn was not timed: {first_line(error)})"
    our_times = f"decode {our_decode:.2f} ms, prefill {our_prefill:.2f} ms"
    their_times = f"decode {their_decode:.2f} ms, prefill {their_prefill:.2f} ms"
    if their_decode < our_decode:
        return theirs, f"paged, by torch's varlen_attn ({their_times}; our kernels {our_times})"
    return ours, f"paged, by our kernels ({our_times}; torch's varlen_attn {their_times})"


def varlen_unfit(config: ModelConfig, cache: KVCache) -> str | None:
    """Why torch's varlen_attn cannot serve from this cache; None if it can."""
    dtype, device = cache.layers[0].dtype, cache.layers[0].device
    reason = varlen.unavailable(device)
    if reason is not None:
        return reason
    try:
        worst = attention_error(config, dtype, device, VarlenBackend, cache.block_size)
    except Exception as error:
        logger.debug("the trial of varlen_attn failed", exc_info=True)
        return f"torch's varlen_attn refuses {dtype} in blocks of {cache.block_size}: {first_line(error)}"
    if not worst <= TOLERANCE[dtype]:  # NaN included
        return f"torch's varlen_attn differs by {worst:.2g}"
    return None


def attention_error(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: type[PagedBackend] = PagedBackend,
    block_size: int = TRIAL_BLOCK,
) -> float:
    """How far a backend is from torch's at most: over prefill, a mixed batch and decode, for every kind of window."""
    windows = tuple(dict.fromkeys(config.features.windows))
    few = replace(config, num_layers=len(windows), features=replace(config.features, windows=windows))
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    generator = torch.Generator().manual_seed(0)
    long, short = 2 * block_size + block_size // 2, block_size + block_size // 2 + 1
    batches = [
        trial_batch((long, short, long), device, block_size=block_size),
        trial_batch((1, 1, long), device, before=(long, short, 0), block_size=block_size),
        trial_batch((1, 1, 1), device, before=(long + 1, short + 1, long), block_size=block_size),
    ]
    inputs = [torch.randn(batch.num_tokens, width, generator=generator).to(device, dtype) for batch in batches]
    outs: list[list[Tensor]] = []
    for kind in (backend, SdpaBackend):
        attention = kind(few, KVCache(few, 1 + 3 * TRIAL_PAGES, block_size, dtype, device))
        outs.append([])
        for batch, qkv in zip(batches, inputs, strict=True):
            attention.plan(batch)
            outs[-1] += [attention.forward(qkv.clone(), layer).float() for layer in range(len(windows))]
    return float(torch.stack([(a - b).abs().max() for a, b in zip(*outs, strict=True)]).max())


def trial_batch(
    tokens: tuple[int, ...],
    device: torch.device,
    *,
    before: tuple[int, ...] = (),
    block_size: int = TRIAL_BLOCK,
    pages: int = TRIAL_PAGES,
    blocks: int = 0,
) -> Batch:
    """A batch of sequences with `pages` blocks each, `before` tokens of which are known.

    `blocks` of the cache: sequences share them where there are too few; 0: there are enough.
    """
    counts, starts = np.array(tokens), np.array(before or (0,) * len(tokens))
    positions = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
    own = np.arange(pages * len(counts)).reshape(len(counts), pages)
    table = np.zeros((len(counts), max(pages, TRIAL_COLUMNS)), np.int64)
    table[:, :pages] = 1 + (own % (blocks - 1) if blocks else own)
    of = np.repeat(np.arange(len(counts)), counts)
    slots = table[of, positions // block_size] * block_size + positions % block_size
    ids = np.zeros(len(positions), np.int64)
    return Batch(
        token_ids=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(slots).to(device),
        block_table=torch.from_numpy(table).to(device),
        host_blocks=table,
        query_start=np.concatenate(([0], counts.cumsum())),
        context_len=starts + counts,
        views=(BARE,),
        view_of=ids,
        windows=ids[:, None],
        blocked=np.zeros((len(ids), 1), np.bool_),
        sample_at=torch.zeros(0, dtype=torch.int64, device=device),
        block_size=block_size,
    )


def decode_batch(batch: Batch) -> DecodeBatch:
    """A batch of one token a sequence, as decode steps give it."""
    count, device = batch.num_sequences, batch.slots.device
    return DecodeBatch(
        tokens=batch.token_ids[:, None],
        pad=0,
        row_of=torch.arange(count, device=device),
        positions=batch.positions,
        block_table=batch.block_table,
        context_len=torch.from_numpy(batch.context_len).to(device),
        slots=batch.slots,
        sees=torch.zeros(0, count, dtype=torch.bool, device=device),
        block_size=batch.block_size,
    )


def step_times(attention: PagedBackend) -> tuple[float, float]:
    """Milliseconds that all layers' attention takes, of a decode step and of a chunk of a prompt."""
    cache, device = attention.cache, attention.device
    size, blocks = cache.block_size, len(cache.layers[0])
    shape = dict(block_size=size, pages=-(-TIMED_CONTEXT // size), blocks=blocks)
    known = (TIMED_CONTEXT - 1,) * TIMED_SEQUENCES
    decode = decode_batch(trial_batch((1,) * TIMED_SEQUENCES, device, before=known, **shape))
    chunk = trial_batch((TIMED_CHUNK,), device, before=(TIMED_CONTEXT - TIMED_CHUNK,), **shape)
    width = attention.q_size + cache.layers[0].shape[-1]
    zeros = torch.zeros(TIMED_CHUNK, width, dtype=cache.layers[0].dtype, device=device)

    def all_layers(tokens: int) -> None:
        for layer in range(len(cache.layers)):
            attention.forward(zeros[:tokens], layer)

    def decode_step() -> None:
        attention.plan_decode(decode)
        all_layers(TIMED_SEQUENCES)

    decode_time = milliseconds(decode_step, device)
    attention.plan(chunk)
    return decode_time, milliseconds(lambda: all_layers(TIMED_CHUNK), device)


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """A step's median time on the device, replayed as a CUDA graph: without what launching takes the host.

    Raises what the step raises, also where it cannot be captured; stream and allocator are as they were then.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # compiles, allocates workspaces
    stream.synchronize()
    graph: DecodeGraph[int] = DecodeGraph.captured(lambda cut: step(), torch.cuda.graph_pool_handle(), stream)
    replay = graph.parts[0].replay
    replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_RUNS + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize(device)
    return float(median(begun.elapsed_time(done) for begun, done in pairwise(marks)))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
