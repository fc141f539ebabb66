"""Attention by torch's scaled_dot_product_attention over gathered pages: the reference, and the CPU backend.

A step's sequences fall into two kinds. Sequences with one new token (decode) are attended together, padded to the
longest under a mask, with the query heads of one key head folded into query rows, so that keys are never repeated.
Sequences with several (prefill) go one by one; a chunk that starts its sequence attends to itself without a gather.
Layers with a sliding window have a plan of their own, which reads only the pages that the window touches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from server.batch import Batch
from server.models.attention.base import AttentionBackend
from server.models.attention.kv_cache import KVCache, Pages, pages
from server.models.config import ModelConfig

# Decode sequences padded to the longest pay for the padding; one call each pays per call instead: about 14 µs, as much
# as 240 padded tokens at 0.058 µs (from the figures in docs/experiments.md, 2 cores).
CALL_COST_TOKENS = 240


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode sequences attended by one call: rows [start, stop) of the batch, B · N pages, mask[B, 1, 1, N · bs]."""

    start: int
    stop: int
    pages: Pages
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """One prefill sequence: rows [start, stop) of the batch; `pages` None when the chunk begins its sequence.

    `keys`: how many tokens of the pages count.
    """

    start: int
    stop: int
    keys: int
    pages: Pages | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of one window do in this step."""

    groups: list[DecodeGroup]
    chunks: list[Chunk]


def decoding(batch: Batch) -> int:
    """How many sequences at the batch's start have one new token, and older ones to attend to."""
    one = (np.diff(batch.query_start) == 1) & (batch.context_len > 1)
    return len(one) if one.all() else int(one.argmin())


class SdpaBackend(AttentionBackend):
    name = "sdpa"

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self.cache, self.dtype, self.device = cache, cache.layers[0].dtype, cache.layers[0].device
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.features.query_scale or config.head_dim**-0.5
        self.windows = config.features.windows
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.slots: Tensor
        self.plans: dict[int, Plan] = {}

    def plan(self, batch: Batch) -> None:
        self.slots = batch.slots
        self.plans = {window: self._plan(batch, window) for window in dict.fromkeys(self.windows)}

    def _plan(self, batch: Batch, window: int) -> Plan:
        decodes = decoding(batch)
        return Plan(self._groups(batch, decodes, window), self._chunks(batch, decodes, window))

    def _groups(self, batch: Batch, decodes: int, window: int) -> list[DecodeGroup]:
        groups: list[DecodeGroup] = []
        if decodes:
            read = [min(length, window or length) for length in batch.context_len[:decodes].tolist()]
            padding = decodes * max(read) - sum(read)
            alone = padding > CALL_COST_TOKENS * decodes
            step = 1 if alone else decodes
            groups = [self._group(batch, a, min(a + step, decodes), window) for a in range(0, decodes, step)]
        return groups

    def _chunks(self, batch: Batch, decodes: int, window: int) -> list[Chunk]:
        starts, context = batch.query_start.tolist(), batch.context_len.tolist()
        return [
            self._chunk(batch, b, starts[b], starts[b + 1], context[b], window) for b in range(decodes, len(context))
        ]

    def _group(self, batch: Batch, start: int, stop: int, window: int) -> DecodeGroup:
        size, lengths = batch.block_size, batch.context_len[start:stop]
        oldest = np.maximum(lengths - window, 0) if window else np.zeros_like(lengths)
        first = oldest // size  # page, per sequence
        pages_each = int((-(-lengths // size) - first).max())
        table = batch.host_blocks[start:stop]
        columns = np.minimum(first[:, None] + np.arange(pages_each), table.shape[1] - 1)
        positions = first[:, None] * size + np.arange(pages_each * size)
        seen = (positions < lengths[:, None]) & (positions >= oldest[:, None])
        taken = pages(np.take_along_axis(table, columns, 1).reshape(-1), self.device)
        return DecodeGroup(start, stop, taken, self._additive(torch.from_numpy(seen)[:, None, None, :]))

    def _chunk(self, batch: Batch, b: int, start: int, stop: int, context: int, window: int) -> Chunk:
        """Queries at positions [context - tokens, context); keys from the first page that any of them sees."""
        tokens = stop - start
        begin = context - tokens
        begins = tokens == context
        if begins and not 0 < window < context:
            return Chunk(start, stop, context, None, None)
        page = max(begin - window + 1, 0) // batch.block_size if window and not begins else 0
        positions = torch.arange(page * batch.block_size, context)
        queries = torch.arange(begin, context)[:, None]
        seen = positions <= queries
        if window:
            seen &= positions > queries - window
        taken = pages(batch.host_blocks[b, page : -(-context // batch.block_size)], self.device)
        return Chunk(start, stop, len(positions), None if begins else taken, self._additive(seen))

    def _additive(self, seen: Tensor) -> Tensor:
        """0 where seen, -inf elsewhere: once per step, instead of once per layer inside the kernel."""
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf)
        return mask.to(self.device)

    def forward(self, qkv: Tensor, layer: int) -> Tensor:
        kv = qkv[:, self.q_size :]
        self.cache.write(layer, self.slots, kv)
        plan = self.plans[self.windows[layer]]
        if len(plan.groups) == 1 and not plan.chunks:
            return self._decode(qkv, layer, plan.groups[0])
        out = qkv.new_empty(qkv.shape[0], self.q_size)
        for group in plan.groups:
            out[group.start : group.stop] = self._decode(qkv[group.start : group.stop], layer, group)
        for chunk in plan.chunks:
            out[chunk.start : chunk.stop] = self._prefill(qkv[chunk.start : chunk.stop], layer, chunk)
        return out

    def _decode(self, qkv: Tensor, layer: int, group: DecodeGroup) -> Tensor:
        batch = qkv.shape[0]
        kv = self.cache.read(layer, group.pages).view(batch, -1, 2, self.num_kv_heads, self.head_dim)
        key, value = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        query = qkv[:, : self.q_size].reshape(batch, self.num_kv_heads, -1, self.head_dim)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=group.mask, scale=self.scale)
        return out.reshape(batch, self.q_size)

    def _prefill(self, qkv: Tensor, layer: int, chunk: Chunk) -> Tensor:
        tokens = qkv.shape[0]
        kv = qkv[:, self.q_size :] if chunk.pages is None else self.cache.read(layer, chunk.pages)[: chunk.keys]
        kv = kv.reshape(kv.shape[0], 2, self.num_kv_heads, self.head_dim)
        key, value = kv[:, 0].transpose(0, 1), kv[:, 1].transpose(0, 1)
        query = qkv[:, : self.q_size].reshape(tokens, self.num_heads, self.head_dim).transpose(0, 1)
        out = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return out[0].transpose(0, 1).reshape(tokens, self.q_size)
