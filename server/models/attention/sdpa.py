"""Attention by torch's scaled_dot_product_attention over gathered pages: the reference, and the CPU backend.

A step's sequences fall into two kinds. Sequences with one new token (decode) are attended together, padded to the
longest under a mask, with the query heads of one key head folded into query rows, so that keys are never repeated.
Sequences with several (prefill) go one by one; a chunk that starts its sequence attends to itself without a gather.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """One prefill sequence: rows [start, stop) of the batch; `pages` None when the chunk begins its sequence."""

    start: int
    stop: int
    context: int
    pages: Pages | None
    mask: Tensor | None


class SdpaBackend(AttentionBackend):
    name = "sdpa"

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self.cache, self.dtype = cache, cache.layers[0].dtype
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.slots: Tensor
        self.groups: list[DecodeGroup] = []
        self.chunks: list[Chunk] = []

    @property
    def kv_bytes(self) -> int:
        return self.cache.nbytes

    def plan(self, batch: Batch) -> None:
        self.slots = batch.slots
        self.groups, self.chunks = [], []
        starts = batch.query_start.tolist()
        context = batch.context_len.tolist()
        decodes = 0
        while decodes < len(context) and starts[decodes + 1] - starts[decodes] == 1 and context[decodes] > 1:
            decodes += 1
        if decodes:
            padding = decodes * max(context[:decodes]) - sum(context[:decodes])
            alone = padding > CALL_COST_TOKENS * decodes
            step = 1 if alone else decodes
            self.groups = [self._group(batch, a, min(a + step, decodes)) for a in range(0, decodes, step)]
        for b in range(decodes, len(context)):
            self.chunks.append(self._chunk(batch, b, starts[b], starts[b + 1], context[b]))

    def _group(self, batch: Batch, start: int, stop: int) -> DecodeGroup:
        lengths = torch.from_numpy(batch.context_len[start:stop])
        pages_each = -(-int(lengths.max()) // batch.block_size)
        seen = torch.arange(pages_each * batch.block_size) < lengths[:, None]
        taken = pages(batch.block_table[start:stop, :pages_each].reshape(-1))
        return DecodeGroup(start, stop, taken, self._additive(seen[:, None, None, :]))

    def _chunk(self, batch: Batch, b: int, start: int, stop: int, context: int) -> Chunk:
        tokens = stop - start
        if tokens == context:
            return Chunk(start, stop, context, None, None)
        taken = pages(batch.block_table[b, : -(-context // batch.block_size)])
        first = context - tokens
        seen = torch.arange(context) <= torch.arange(first, context)[:, None]
        return Chunk(start, stop, context, taken, self._additive(seen))

    def _additive(self, seen: Tensor) -> Tensor:
        """0 where seen, -inf elsewhere: once per step, instead of once per layer inside the kernel."""
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf)
        return mask.to(self.cache.layers[0].device)

    def forward(self, qkv: Tensor, layer: int) -> Tensor:
        kv = qkv[:, self.q_size :]
        self.cache.write(layer, self.slots, kv)
        if len(self.groups) == 1 and not self.chunks:
            return self._decode(qkv, layer, self.groups[0])
        out = qkv.new_empty(qkv.shape[0], self.q_size)
        for group in self.groups:
            out[group.start : group.stop] = self._decode(qkv[group.start : group.stop], layer, group)
        for chunk in self.chunks:
            out[chunk.start : chunk.stop] = self._prefill(qkv[chunk.start : chunk.stop], layer, chunk)
        return out

    def _decode(self, qkv: Tensor, layer: int, group: DecodeGroup) -> Tensor:
        batch = qkv.shape[0]
        kv = self.cache.read(layer, group.pages).view(batch, -1, 2, self.num_kv_heads, self.head_dim)
        key, value = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        query = qkv[:, : self.q_size].reshape(batch, self.num_kv_heads, -1, self.head_dim)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=group.mask)
        return out.reshape(batch, self.q_size)

    def _prefill(self, qkv: Tensor, layer: int, chunk: Chunk) -> Tensor:
        tokens = qkv.shape[0]
        kv = qkv[:, self.q_size :] if chunk.pages is None else self.cache.read(layer, chunk.pages)[: chunk.context]
        kv = kv.reshape(kv.shape[0], 2, self.num_kv_heads, self.head_dim)
        key, value = kv[:, 0].transpose(0, 1), kv[:, 1].transpose(0, 1)
        query = qkv[:, : self.q_size].reshape(tokens, self.num_heads, self.head_dim).transpose(0, 1)
        out = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return out[0].transpose(0, 1).reshape(tokens, self.q_size)
